"""The benchmark for a GPU runs here from end to end, tiny and on the CPU: where there is one it only has to be started."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import record, runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Record
from benchmarks.gpu.runner import Part, all_parts, run_all, run_apart, run_part
from benchmarks.gpu.sections import SECTIONS, checks, peers, yardsticks
from benchmarks.gpu.sections.base import Section
from benchmarks.gpu.sections.throughput import expected_tokens
from benchmarks.gpu.shapes import MODELS, kv_bytes, weight_bytes
from benchmarks.gpu.targets import judge
from benchmarks.gpu.timing import MIN_REPEATS, CudaTimer
from engine.decode.goodput import PlanShape

ROOT = Path(__file__).parents[3]
PEERS = Path(__file__).parent / "fake_peers"


@pytest.fixture
def few_checks(tmp_path, monkeypatch):
    """Stands for ``tests/gpu``."""
    folder = tmp_path / "checks"
    folder.mkdir()
    (folder / "test_right.py").write_text("def test_it(record_property):\n    record_property('ties', 3)\n")
    monkeypatch.setattr(checks, "TESTS", str(folder))
    return folder


@pytest.fixture
def fake_peers(monkeypatch):
    """Peers that have the real ones' entry points; what they put in the import path goes away with the test."""
    names = ("flashinfer", "flash_attn_interface", "generate", "model", "minisgl", "minisgl.llm", "minisgl.core")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield PEERS
    for name in names:
        sys.modules.pop(name, None)


def dry_run(out: Path, *arguments: str) -> int:
    return main(["--out", str(out), "--dry-run", "--model", "8b", *arguments])


def test_every_section_runs_and_is_reported(tmp_path, capsys, few_checks):
    out = tmp_path / "out"
    assert dry_run(out) == 0
    records = record.read_all(out)
    assert [*records] == sorted(part.name for part in all_parts(["8b"]))
    for name, found in records.items():
        assert (found.status, found.error) == ("done", None), name
        assert found.cells, name
        assert not [cell for cell in found.cells if "error" in cell], name
        assert found.warnings == [], name
        assert found.machine["torch"] == torch.__version__, name
        assert found.machine["commit"], name
    assert [cell["is_equal"] for cell in records["start.8b"].cells if "is_equal" in cell] == [True]
    report = (out / "report.txt").read_text()
    assert capsys.readouterr().out.endswith(report)
    assert [line for line in report.splitlines() if line.startswith("# ")] == [
        f"# {name}" for name in (*(section.name for section in SECTIONS), "targets", "machines")
    ]
    assert "cannot be made" not in report
    line = json.loads(report.splitlines()[-1])
    assert {*line["parts"].values()} == {"done"}
    assert all(target["found"] is None for target in line["targets"]), "a dry run reaches no target"


def test_a_run_goes_on_from_one_file(tmp_path, few_checks, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert dry_run(first, "--section", "machine", "gemm") == 0
    second.mkdir()
    (second / record.ALL).write_text((first / record.ALL).read_text())
    capsys.readouterr()
    assert dry_run(second, "--section", "machine", "elementwise") == 0
    out = capsys.readouterr().out
    assert "machine: there already" in out
    assert "no time was left" not in out
    assert "elementwise.8b: done" in out
    assert {*record.read_all(second)} == {"machine", "gemm.8b", "elementwise.8b"}
    assert record.read(second, "machine") == record.read(first, "machine")
    assert {*json.loads((second / record.ALL).read_text())["parts"]} == {"machine", "gemm.8b", "elementwise.8b"}
    (second / "report.txt").unlink()
    assert dry_run(second, "--section", "report") == 0
    assert (second / "report.txt").exists()


def test_a_part_that_was_under_way_when_a_run_broke_off_is_begun_anew(tmp_path):
    record.write(tmp_path, Record("machine", "", cells=[{"figure": 1}]))
    assert dry_run(tmp_path, "--section", "machine") == 0
    found = record.read(tmp_path, "machine")
    assert found.status == "done"
    assert {"figure": 1} not in found.cells


def test_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"unknown sections \['atention'\]: use checks, "):
        dry_run(tmp_path, "--section", "atention")


def test_red_checks_are_told_with_every_speed(tmp_path, few_checks):
    (few_checks / "test_wrong.py").write_text("def test_it():\n    assert 1 == 2, 'what is wrong'\n")
    (few_checks / "test_absent.py").write_text("import no_such_module\n")
    (few_checks / "test_engine.py").write_text(
        "import pytest\n\nfrom engine.config import PAGE_SIZE\n\n\n@pytest.mark.skip\ndef test_it():\n    assert PAGE_SIZE\n"
    )
    assert dry_run(tmp_path / "out", "--section", "checks", "machine") == 0
    cells = record.read(tmp_path / "out", "checks").cells
    counts = {cell["file"]: (cell["passed"], cell["failed"], cell["is_red"]) for cell in cells if "file" in cell}
    red, green, skipped = (0, 1, True), (1, 0, False), (0, 0, False)
    assert counts == {"test_absent.py": red, "test_wrong.py": red, "test_right.py": green, "test_engine.py": skipped}
    assert sum(cell.get("ties", 0) for cell in cells) == 3
    assert any("what is wrong" in cell.get("message", "") for cell in cells)
    assert record.read(tmp_path / "out", "machine").warnings == ["tests/gpu was red: see the section checks"]
    assert "WARNING: tests/gpu was red" in (tmp_path / "out" / "report.txt").read_text()


def section(name: str, cells, seconds: float = 60.0) -> Section:
    return Section(name, "?", lambda bench, part: cells(), lambda records: "", seconds)


def broken():
    yield {"figure": 1}
    raise RuntimeError("out of luck")


def test_a_part_that_fails_keeps_what_it_had_and_the_others_go_on(tmp_path):
    bench = Bench(tmp_path, is_dry=True)
    parts = [Part(section("first", broken), ""), Part(section("second", lambda: iter([{"figure": 2}])), "")]
    assert run_all(bench, parts, float("inf"), None) == []
    first, second = record.read(tmp_path, "first"), record.read(tmp_path, "second")
    assert (first.status, first.cells) == ("failed", [{"figure": 1}])
    assert "out of luck" in first.error
    assert (second.status, second.cells) == ("done", [{"figure": 2}])


def test_time_is_kept(tmp_path):
    bench = Bench(tmp_path, is_dry=True)
    endless = Part(section("endless", lambda: iter(lambda: {"figure": 1}, None), seconds=0.05), "")
    assert run_part(bench, endless).status == "cut"
    long, short = (Part(section(name, lambda: iter([]), seconds), "") for name, seconds in (("long", 900.0), ("short", 30.0)))
    assert [part.name for part in run_all(bench, [long, short], 10.0, None)] == ["long"]
    assert record.read(tmp_path, "short").status == "done"


def test_a_part_runs_in_a_process_of_its_own(tmp_path):
    bench, part = Bench(tmp_path, is_dry=True), all_parts(["8b"], ["machine"])[0]
    found = run_apart(bench, part, ["--out", str(tmp_path), "--dry-run"])
    assert (found.status, len(found.cells)) == ("done", 5)


@pytest.mark.parametrize(
    ("ended", "problem"),
    [
        (subprocess.TimeoutExpired("", 1.0), "killed after"),
        (subprocess.CompletedProcess([], -11), "the process ended with -11"),
    ],
)
def test_a_process_that_breaks_off_leaves_a_record(tmp_path, monkeypatch, ended, problem):
    bench, part = Bench(tmp_path, is_dry=True), all_parts(["8b"], ["gemm"])[0]

    def run(*args, **options):
        record.write(tmp_path, Record("gemm", "8b", cells=[{"figure": 1}]))
        if isinstance(ended, Exception):
            raise ended
        return ended

    monkeypatch.setattr(runner.subprocess, "run", run)
    found = run_apart(bench, part, [])
    assert (found.status, found.cells) == ("failed", [{"figure": 1}])
    assert problem in found.error
    if isinstance(ended, Exception):
        found = run_apart(bench, part, [], seconds_left=30.0)
        assert (found.status, found.error) == ("running", None), "the run had no time, which is not the part's fault"


def test_yardsticks_compute_the_attention_of_the_step(tmp_path, fake_peers):
    bench = Bench(tmp_path, is_dry=True, peers=fake_peers)
    with torch.inference_mode():
        cells = list(yardsticks.run(bench, "8b.flashinfer"))
        others = list(yardsticks.run(bench, "8b.flash_attention"))
    assert not [cell for cell in (*cells, *others) if "error" in cell]
    errors = [cell["max_error"] for cell in cells if not cell["kernels"].endswith("no mask")]
    assert len(errors) == 8
    assert max(errors) < 1e-5
    assert {cell["kernels"] for cell in others} == {"flash-attention 3, causal, no mask"}


@pytest.mark.parametrize("who", ["gpt_fast", "mini_sglang"])
def test_peers_are_run_by_their_entry_points(tmp_path, fake_peers, who):
    cells = list(peers.run(Bench(tmp_path, is_dry=True, peers=fake_peers), f"8b.{who}"))
    assert len(cells) == 1
    assert "error" not in cells[0], cells[0]
    assert cells[0]["tokens_per_second"] != 0


def test_absent_peers_are_named(tmp_path):
    cells = list(peers.run(Bench(tmp_path, is_dry=True, peers=tmp_path), "8b.gpt_fast"))
    assert cells[0]["absent"] == "AbsentError: the peers have no folder gpt-fast"


def test_a_time_on_the_device_is_that_of_the_run_alone(monkeypatch):
    """The clock of this device stands still but for what is put on it."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def elapsed_time(self, other):
            return other.time - self.time

    def spend(ms):
        now[0] += ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: spend(10.0))
    runs = []

    def run():
        runs.append(1)
        spend(2.0 if len(runs) > 3 else 50.0)

    assert CudaTimer()(run, lambda: spend(7.0)) == 2.0
    assert len(runs) >= 2 * MIN_REPEATS


def test_shapes_move_what_they_should():
    assert {name: weight_bytes(config) for name, config in MODELS.items()} == {"8b": 15_136_194_560, "1.5b": 3_087_138_816}
    assert {name: kv_bytes(config) for name, config in MODELS.items()} == {"8b": 147_456, "1.5b": 28_672}


@pytest.mark.parametrize(("chance", "tokens"), [(0.902, 8.25), (0.885, 7.45)])
def test_imposed_acceptance_gives_the_papers_tokens_per_forward(chance, tokens):
    assert expected_tokens(PlanShape(16, 16), chance) == pytest.approx(tokens, abs=0.02)


def test_targets_are_judged_by_the_cells_that_they_name():
    step = {"model": "8b", "kernels": "triton", "batch": 1, "context": 1024, "temperature": 0.0}
    rate = {"model": "8b", "batch": 8, "depth": 1}
    records = {
        "step.8b.triton": Record("step", "8b.triton", cells=[
            step | {"plan": "ar", "of_bandwidth": 0.9}, step | {"plan": "tidar 8x8", "over_ar": 1.21},
            step | {"plan": "ar", "of_bandwidth": 0.1, "temperature": 1.0}]),
        "throughput.8b.plans": Record("throughput", "8b.plans", cells=[
            rate | {"plan": "ar", "tokens_per_second": 100.0}, rate | {"plan": "auto", "tokens_per_second": 350.0}]),
    }  # fmt: skip
    verdicts = {outcome.what: outcome.verdict for outcome in judge(records)}
    assert verdicts["AR step, batch 1, context 1k, 8b: part of the copy bandwidth"] == "reached, by 5.9%"
    assert verdicts["72-row step over an AR step, 8b, 1k"] == "missed, by 10.0%"
    assert verdicts["auto over AR, synthetic_acceptance=0.902, 8b, batch 8"] == "reached, by 0.0%"
    assert verdicts["128-row step over an AR step, 8b, 1k"] == "not measured (section step)"
    dry = {name: replace(found, machine={"is_dry_run": True}) for name, found in records.items()}
    assert {outcome.found for outcome in judge(dry)} == {None}


def test_nothing_is_needed_that_a_machine_with_a_gpu_may_lack():
    """Neither what the HTTP server is made of nor the grammar library, for the benchmark or for the tests that it runs."""
    names = [
        "benchmarks.gpu.__main__",
        *(f"tests.gpu.{file.stem}" for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))),
    ]
    lacking = ("fastapi", "pydantic", "uvicorn", "prometheus_client", "llguidance", "openai")
    code = f"import importlib, sys; sys.modules.update(dict.fromkeys({lacking})); [importlib.import_module(n) for n in {names}]"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
