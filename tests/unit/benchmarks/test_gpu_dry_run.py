"""The benchmark for a GPU runs here from end to end, tiny and on the CPU: where there is one it only has to be started."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import loop, record, runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.calls import CALL_MINUTES, CALLS
from benchmarks.gpu.engines import AR, Limits, StepRig, plan_name
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.record import Record
from benchmarks.gpu.report import write_report
from benchmarks.gpu.runner import Part, all_parts, run_all, run_apart, run_part
from benchmarks.gpu.sections import SECTIONS, attention, checks, peers, step, streams, throughput, yardsticks
from benchmarks.gpu.sections.base import Section
from benchmarks.gpu.sections.throughput import expected_tokens
from benchmarks.gpu.shapes import MODELS, kv_bytes, weight_bytes
from benchmarks.gpu.targets import RATES, TARGETS, judge
from benchmarks.gpu.timing import MIN_REPEATS, CudaTimer
from engine.decode.goodput import PlanShape
from kernels.backend import REFERENCE

ROOT = Path(__file__).parents[3]
PEERS = Path(__file__).parent / "fake_peers"


SMOKE, MORE = "import pytest\n\n@pytest.mark.smoke\n", "def test_more():\n    pass\n"


@pytest.fixture
def few_checks(tmp_path, monkeypatch):
    """Stands for ``tests/gpu``."""
    folder = tmp_path / "checks"
    folder.mkdir()
    (folder / "test_right.py").write_text(f"{SMOKE}def test_it(record_property):\n    record_property('ties', 3)\n\n{MORE}")
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
    (second / record.FILE).write_text((first / record.FILE).read_text())
    capsys.readouterr()
    assert dry_run(second, "--section", "machine", "elementwise") == 0
    out = capsys.readouterr().out
    assert "machine: there already" in out
    assert "no time was left" not in out
    assert "elementwise.8b: done" in out
    assert {*record.read_all(second)} == {"machine", "gemm.8b", "elementwise.8b"}
    assert record.read(second, "machine") == record.read(first, "machine")
    assert {path.name for path in second.iterdir()} == {"results.json", "report.txt"}
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
    (few_checks / "test_wrong.py").write_text(SMOKE + "def test_it():\n    assert 1 == 2, 'what is wrong'\n")
    (few_checks / "test_absent.py").write_text("import no_such_module\n")
    (few_checks / "test_engine.py").write_text(
        "from engine.config import PAGE_SIZE\n\n" + SMOKE + "@pytest.mark.skip\ndef test_it():\n    assert PAGE_SIZE\n"
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


def test_the_rest_of_the_checks_has_a_section_of_its_own(tmp_path, few_checks):
    assert dry_run(tmp_path, "--section", "checks", "checks-all") == 0
    records = record.read_all(tmp_path)
    assert [[(c["file"], c["passed"]) for c in records[name].cells] for name in checks.CHECKS] == 2 * [[("test_right.py", 1)]]
    assert records["checks-all"].warnings == []


def test_warnings_of_other_versions_do_not_fail_a_check(tmp_path, few_checks):
    text = "import warnings\n" + SMOKE + "def test_it():\n    warnings.warn('this is old', UserWarning)\n"
    (few_checks / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (few_checks / "test_right.py").write_text(text)
    assert dry_run(tmp_path / "out", "--section", "checks") == 0
    assert record.read(tmp_path / "out", "checks").cells[0]["passed"] == 1


def test_a_check_that_hangs_is_interrupted_and_the_others_of_its_file_are_known(
    tmp_path, few_checks, monkeypatch, time_begins_with
):
    monkeypatch.setattr(checks, "MARGIN_SECONDS", 0.0)
    ready = tmp_path / "ready"
    time_begins_with(ready)
    hangs = f"    open({str(ready)!r}, 'w').close()\n    __import__('time').sleep(600)\n"
    text = SMOKE + f"def test_first():\n    pass\n\n@pytest.mark.smoke\ndef test_second():\n{hangs}"
    (few_checks / "test_right.py").write_text(text)
    bench = Bench(tmp_path, is_dry=True)
    bench.deadline = time.perf_counter() + 2.0
    counts, failure = checks.run(bench, "")
    assert (counts["passed"], counts["failed"], counts["is_red"]) == (1, 1, True)
    assert counts["error"].startswith("not finished after ")
    assert failure == {"test": "test_right.py, after test_first", "message": "under way when the time was over"}


def of(name: str, cells, seconds: float = 60.0) -> Section:
    return Section(name, "?", lambda bench, part: cells(), lambda records: "", seconds)


def broken():
    yield {"figure": 1}
    raise RuntimeError("out of luck")


def test_a_part_that_fails_keeps_what_it_had_and_the_others_go_on(tmp_path):
    bench = Bench(tmp_path, is_dry=True)
    parts = [Part(of("first", broken), ""), Part(of("second", lambda: iter([{"figure": 2}])), "")]
    assert run_all(bench, parts, float("inf"), None) == []
    first, second = record.read(tmp_path, "first"), record.read(tmp_path, "second")
    assert (first.status, first.cells) == ("failed", [{"figure": 1}])
    assert "out of luck" in first.error
    assert (second.status, second.cells) == ("done", [{"figure": 2}])


def endless():
    return iter(lambda: {"figure": 1}, None)


def test_a_part_is_cut_when_its_time_is_over(tmp_path):
    bench, part = Bench(tmp_path, is_dry=True), Part(of("endless", endless, seconds=60.0), "")
    assert run_part(bench, part, 0.05).status == "cut"
    assert record.read(tmp_path, "endless").bound == 0.05
    assert run_part(bench, Part(of("short", endless, seconds=0.05), ""), 60.0).status == "cut"


def test_where_minutes_are_short_every_part_gets_its_share(tmp_path, monkeypatch):
    """The clock stands still but for the parts, of which the second leaves time to the others."""
    now, given = [100.0], {}

    def run_part(bench, part, seconds):
        given[part.name] = round(seconds)
        now[0] += 1.0 if part.name == "quick" else seconds
        return Record(part.name, "", "cut", bound=seconds)

    monkeypatch.setattr(runner, "run_part", run_part)
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    bench = Bench(tmp_path, is_dry=True)
    parts = [Part(of(name, endless, seconds), "") for name, seconds in (("long", 900.0), ("quick", 450.0), ("last", 450.0))]
    assert run_all(bench, parts, 10.0, None) == []
    assert given == {"long": 300, "quick": 150, "last": 299}
    assert [part.name for part in run_all(bench, parts, 2.0, None, {"long": 10.0, "quick": 120.0, "last": 20.0})] == []
    assert given == {"long": 10, "quick": 94, "last": 109}, "what wants little gets it"
    assert [part.name for part in run_all(bench, parts, 0.5, None)] == ["long", "quick", "last"]


def test_a_second_try_costs_nothing(tmp_path):
    bench, part = Bench(tmp_path, is_dry=True), Part(of("cells", lambda: iter([{"figure": i} for i in range(9)])), "")
    first = Record("cells", "", "cut", bound=30.0, cells=[{"figure": 0}] * 5)
    record.write(tmp_path, first)
    run_all(bench, [part], float("inf"), None)
    assert record.read(tmp_path, "cells") == first, "it is there"
    shorter = Part(of("cells", lambda: ({"figure": 1 / (1 - i)} for i in range(9))), "")
    run_all(bench, [shorter], float("inf"), None, retry=True)
    assert record.read(tmp_path, "cells") == first
    run_all(bench, [part], float("inf"), None, retry=True)
    assert (record.read(tmp_path, "cells").status, len(record.read(tmp_path, "cells").cells)) == ("done", 9)


def test_a_second_try_that_is_green_replaces_a_red_one_with_more_cells(tmp_path):
    bench, outcomes = Bench(tmp_path, is_dry=True), [[{"is_red": True}, {"test": "one that fails"}], [{"is_red": False}]]
    part = Part(of("checks", lambda: iter(outcomes.pop(0))), "")
    for _ in range(3):
        run_all(bench, [part], float("inf"), None, retry=True)
    assert outcomes == [], "what is green is not run again"
    assert record.read(tmp_path, "checks").cells == [{"is_red": False}]


def test_what_a_part_has_found_is_in_the_file_after_every_cell(tmp_path):
    seen = []

    def cells():
        for i in range(3):
            yield {"figure": i}
            seen.append(len(json.loads((tmp_path / record.FILE).read_text())["parts"]["cells"]["cells"]))

    run_part(Bench(tmp_path, is_dry=True), Part(of("cells", cells), ""))
    assert seen == [1, 2, 3]


def test_a_machine_that_cannot_be_described_is_a_finding_of_the_part(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "provenance", lambda device: 1 / 0)
    found = run_part(Bench(tmp_path, is_dry=True), Part(of("cells", endless), ""))
    assert (found.status, found.cells) == ("failed", [])
    assert "ZeroDivisionError" in record.read(tmp_path, "cells").error


def test_three_calls_give_a_first_look_at_everything():
    bounds = {part.name: part.section.seconds for part in all_parts([*MODELS])}
    for call in CALLS:
        assert all(seconds <= bounds[name] for name, seconds in call.items())
        assert sum(call.values()) <= 60 * CALL_MINUTES
    names = [name for call in CALLS for name in call]
    assert len(names) == len({*names})
    first = {*CALLS[0], *CALLS[1]}
    for target in (*TARGETS, *RATES):
        assert first.issuperset(target.parts), target.what
    for model in MODELS:
        assert {name.split(".")[0] for name in names if f".{model}" in name} >= {
            "gemm", "attention", "step", "throughput", "peers", "yardsticks", "streams"}  # fmt: skip
    commands = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    assert all(f"--minutes 9 --call {i}" in commands for i in (1, 2, 3))


def test_a_part_runs_in_a_process_of_its_own(tmp_path):
    bench, part = Bench(tmp_path, is_dry=True), all_parts(["8b"], ["machine"])[0]
    found = run_apart(bench, part, ["--out", str(tmp_path), "--dry-run"])
    assert (found.status, len(found.cells)) == ("done", 5)


@pytest.mark.parametrize(
    ("ended", "problem"),
    [
        (subprocess.TimeoutExpired("", 1.0), "killed after"),
        (-11, "the process ended with -11"),
    ],
)
def test_a_process_that_breaks_off_leaves_a_record(tmp_path, monkeypatch, ended, problem):
    bench, part = Bench(tmp_path, is_dry=True), all_parts(["8b"], ["gemm"])[0]

    def run(*args):
        record.write(tmp_path, Record("gemm", "8b", cells=[{"figure": 1}]))
        if isinstance(ended, Exception):
            raise ended
        return ended

    monkeypatch.setattr(runner, "run_group", run)
    found = run_apart(bench, part, [])
    assert (found.status, found.cells) == ("failed", [{"figure": 1}])
    assert problem in found.error
    if isinstance(ended, Exception):
        found = run_apart(bench, part, [], seconds_left=30.0)
        assert (found.status, found.error) == ("running", None), "the run had no time, which is not the part's fault"


def test_yardsticks_compute_the_attention_of_the_step(tmp_path, fake_peers):
    bench = Bench(tmp_path, is_dry=True, peers=fake_peers)
    with torch.inference_mode():
        kinds = ("masked", "merged", "causal")
        cells = [cell for kind in kinds for cell in yardsticks.run(bench, f"8b.flashinfer_{kind}")]
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


def test_a_yardstick_without_a_figure_is_named_with_the_reason():
    records = [
        Record("yardsticks", "8b.flash_attention", "done", cells=[{"kernels": "flash_attention", "absent": "no module"}]),
        Record("yardsticks", "8b.flashinfer_masked", "failed", "killed after 165 s", bound=75.0),
        Record("yardsticks", "8b.flashinfer_causal", "cut", bound=40.0, cells=[{"kernels": "flashinfer", "error": "no nvcc"}]),
        Record("yardsticks", "1.5b.flashinfer_masked", "cut", bound=40.0),
        Record("yardsticks", "8b.flashinfer_merged", "done", cells=[{"kernels": "flashinfer", "us": 7.0}]),
    ]
    assert yardsticks.show(records).splitlines()[-4:] == [
        "8b.flash_attention: absent (no module)",
        "8b.flashinfer_masked: no figure (killed after 165 s)",
        "8b.flashinfer_causal: no figure (no nvcc)",
        "1.5b.flashinfer_masked: no figure (nothing was measured in 40 s)",
    ]


def test_streams_of_both_settings_share_one_start_and_no_prompt_is_known(tmp_path, monkeypatch):
    cores, prompts = [], []

    def start(*args, **options):
        cores.append(throughput.start(*args, **options))
        return cores[-1]

    def make_requests(count, length, *args):
        made = loop.make_requests(count, length, *args)
        prompts.extend(request.prompt_token_ids for request in made if length == 200)
        return made

    monkeypatch.setattr(streams, "start", start)
    monkeypatch.setattr(streams, "make_requests", make_requests)
    with torch.inference_mode():
        cells = list(streams.run(Bench(tmp_path, is_dry=True), "8b"))
    assert len(cores) == 1
    assert len(prompts) == len({*prompts}) == 8
    settings = [(cell["max_rows"], cell["mode"], cell["arrivals"]) for cell in cells if "error" not in cell and "mode" in cell]
    assert settings == [(rows, mode, n) for rows in (64, 128) for mode in ("auto", "ar") for n in (1, 0)]


def test_every_engine_has_a_graph_pool_of_its_own_and_release_gives_engines_up(tmp_path):
    bench = Bench(tmp_path, is_dry=True)
    model = random_model(bench.config("8b"), bench.dtype, bench.device, REFERENCE)
    rigs = [StepRig(bench, model, Limits(2, 256, 9, 64)) for _ in range(2)]
    assert rigs[0].capture is not rigs[1].capture
    rigs[0].ms(1, AR, 64)
    assert [rig.capture.num_graphs for rig in rigs] == [1, 0]
    gone = weakref.ref(rigs[0].core)
    gc.disable()
    try:
        rigs.clear()
        bench.release()
        assert gone() is None
    finally:
        gc.enable()


def test_engines_measure_anew_and_leave_nothing_behind(tmp_path):
    code = (
        "from benchmarks.gpu.bench import Bench; from benchmarks.gpu.engines import *; from pathlib import Path\n"
        "bench = Bench(Path('out'), is_dry=True)\n"
        "config = lambda: engine_config(bench, bench.config('8b'), Limits(2, 256, 9, 64), DecodeConfig())\n"
        "folders = [Path(config().cost_cache) for _ in range(2)]\n"
        "assert folders[0] != folders[1]\n"
        "print(*(folder.is_dir() and not list(folder.iterdir()) for folder in folders))\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("costs-")]


def test_results_tell_what_the_engines_were_made_of(tmp_path):
    assert dry_run(tmp_path, "--section", "step", "throughput") == 0
    for name, found in record.read_all(tmp_path).items():
        engine = next(cell["engine"] for cell in found.cells if "engine" in cell)
        assert engine["operations"]["paged_attention"] == "kernels.paged_attention.reference.paged_attention", name
        assert engine["settings"]["kernels"] == engine["kernels"] == "reference", name
        assert any(cell.get("graphs", 0) > 0 for cell in found.cells), name
    report = (tmp_path / "report.txt").read_text()
    assert "8b.triton: kernels reference, from Triton: none; linear layers: not measured;" in report
    assert "graphs took 0.00 GiB" in report


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


def step_and_loop(card: str) -> dict[str, Record]:
    step = {"model": "8b", "kernels": "triton", "batch": 1, "context": 1024, "temperature": 0.0}
    rate = {"model": "8b", "depth": 1}
    machine = {"device": card}
    return {
        "step.8b.triton": Record("step", "8b.triton", machine=machine, cells=[
            step | {"plan": "ar", "of_bandwidth": 0.9}, step | {"plan": "tidar 8x8", "over_ar": 1.21},
            step | {"plan": "ar", "of_bandwidth": 0.1, "temperature": 1.0}]),
        "throughput.8b.plans": Record("throughput", "8b.plans", machine=machine, cells=[
            rate | {"batch": 8, "plan": "ar", "tokens_per_second": 100.0},
            rate | {"batch": 8, "plan": "auto", "tokens_per_second": 350.0},
            rate | {"batch": 1, "plan": "ar", "tokens_per_second": 252.0}]),
    }  # fmt: skip


def test_the_cells_that_the_targets_name_come_first():
    """Records of the first cells alone, each with every figure, have one for every target."""
    steps = list(itertools.islice(step.order(step.CONTEXTS, step.BATCHES, step.PLANS), 5))
    loops = list(itertools.islice(throughput.order(throughput.BATCHES, list(throughput.FIXED)), 10))
    records = {}
    for model in MODELS:
        found = {"model": model, "kernels": "triton", "of_bandwidth": 1.0, "over_ar": 1.0, "temperature": 0.0}
        records[f"step.{model}.triton"] = Record(
            "step",
            f"{model}.triton",
            cells=[found | {"context": context, "batch": batch, "plan": plan_name(plan)} for context, batch, plan in steps],
        )
        records[f"throughput.{model}.plans"] = Record(
            "throughput",
            f"{model}.plans",
            cells=[found | {"batch": batch, "plan": plan, "depth": 1, "tokens_per_second": 1.0} for batch, plan in loops],
        )
    records["attention.8b"] = Record("attention", "8b", cells=[
        {"model": "8b", "kernels": "triton", "batch": attention.BATCHES[0], "context": attention.CONTEXTS[0],
         "rows_each": plan.num_rows, "tflops": 1.0} for plan in attention.PLANS[:3]])  # fmt: skip
    assert {o.parts for o in judge(records) if o.found is None} == {("throughput.8b.long",)}, "which has one cell"


def test_targets_are_judged_by_the_cells_that_they_name():
    records = step_and_loop("NVIDIA H200")
    verdicts = {outcome.what: outcome.verdict for outcome in judge(records)}
    assert verdicts["AR step, batch 1, context 1k, 8b: part of the copy bandwidth"] == "reached, by 5.9%"
    assert verdicts["72-row step over an AR step, 8b, 1k"] == "missed, by 10.0%"
    assert verdicts["auto over AR, synthetic_acceptance=0.902, 8b, batch 8"] == "reached, by 0.0%"
    assert verdicts["128-row step over an AR step, 8b, 1k"] == "not measured (step.8b.triton)"
    assert verdicts["AR, batch 1, 8b: tokens per second"] == "reached, by 5.0%"
    dry = {name: replace(found, machine={"is_dry_run": True}) for name, found in records.items()}
    assert {outcome.found for outcome in judge(dry)} == {None}


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
def test_rates_are_not_judged_on_another_card_but_ratios_are(tmp_path, card):
    records = step_and_loop(card)
    verdicts = {outcome.what: outcome.verdict for outcome in judge(records)}
    assert verdicts["AR, batch 1, 8b: tokens per second"] == f"not judged: targets are for an H200, this is {card}"
    assert verdicts["72-row step over an AR step, 8b, 1k"] == "missed, by 10.0%"
    for found in records.values():
        record.write(tmp_path, found)
    lines = [line for line in write_report(tmp_path).splitlines() if "missed, by" in line or "not judged:" in line]
    assert lines
    assert all(line.count(card) == 1 + ("not judged" in line) for line in lines if not line.startswith("{"))


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
