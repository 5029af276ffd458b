"""lm-eval through ``/v1/completions`` in ``ar`` and ``tidar`` mode, beside its own Transformers backend on the same weights.

The tasks are local: held-out questions about the standard library, as a choice of answers (log-likelihoods of echoed
prompts), as generation, and as texts whose likelihood is summed. ``linear`` and ``tidar`` have to give the very numbers of
``ar``, and all of them those of Transformers within 1e-3. ``make eval`` installs the extra ``eval`` and runs it. Ends with one
line of JSON, and fails if the numbers differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.bundled import MODEL
from benchmarks.report import finish, table
from benchmarks.stdlib_questions import Judge, load_held_out

TASKS = Path(__file__).parent / "lm_eval_tasks"
MODES = ("ar", "linear", "tidar")
LARGEST_GAP = 1e-3
READY_SECONDS = 120.0


def write_tasks(folder: Path, num_questions: int) -> list[str]:
    """Write the questions, and the task files with their address; return the tasks' names."""
    items, rng = Judge().items, random.Random(0)
    held_out = load_held_out()
    known = [q for name in ("close", "far") for q in held_out[name] if q.intent != "refusal"]
    questions = rng.sample(known, min(num_questions, len(known)))
    lines = []
    for question in questions:
        answer = items[f"{question.intent}:{question.name}"].answer
        others = [item.answer for item in items.values() if item.intent == question.intent and item.answer != answer]
        choices = [answer, *rng.sample(others, 3)]
        rng.shuffle(choices)
        entry = {"question": question.question, "answer": answer, "choices": choices, "right": choices.index(answer)}
        lines.append(json.dumps(entry))
    data = folder / "questions.jsonl"
    data.write_text("\n".join(lines) + "\n")
    names = []
    for file in sorted(TASKS.glob("*.yaml")):
        task = yaml.safe_load(file.read_text()) | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / file.name).write_text(yaml.safe_dump(task))
        names.append(task["task"])
    return names


@contextmanager
def server(mode: str, port: int, log: Path) -> Iterator[str]:
    """A server of the bundled model in one mode; its completions address. Raises RuntimeError with what it said."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--decoding", mode]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            if not _is_ready(process, f"http://127.0.0.1:{port}/health/ready"):
                raise RuntimeError(f"the server did not become ready:\n{log.read_text()}")
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.terminate()
            process.wait()


def _is_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


def num_draft_tokens(url: str) -> int:
    """How many drafts a server has verified, as its metrics tell."""
    text = httpx.get(url.replace("/v1/completions", "/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:spec_decode_num_draft_tokens_total")]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines)


def evaluate(model: str, arguments: dict[str, Any], tasks: list[str], folder: Path) -> dict[str, float]:
    """The tasks' metrics by lm-eval, named ``task/metric``."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # Its progress bars hide what is reported here.
    with (folder / "lm_eval.log").open("a") as log, redirect_stderr(log):
        manager = TaskManager(include_path=str(folder))
        results = simple_evaluate(model, arguments, tasks, task_manager=manager, bootstrap_iters=0, batch_size=8)
    assert results is not None
    return {
        f"{task}/{name.split(',')[0]}": value
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


def main() -> int:
    """Run all backends, print a table, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--port", type=int, default=8799)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", LMEVAL_LOG_LEVEL="ERROR")
    numbers: dict[str, dict[str, float]] = {}
    drafted: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("HF_HOME", str(folder / "cache"))
        tasks = write_tasks(folder, options.questions)
        for mode in MODES:
            print(f"{mode}: {', '.join(tasks)} through a server", flush=True)
            with server(mode, options.port, folder / "server.log") as url:
                client = {"model": "tidar-stdlib", "base_url": url, "tokenizer": str(MODEL), "tokenizer_backend": "huggingface"}
                numbers[mode] = evaluate("local-completions", client, tasks, folder)
                drafted[mode] = num_draft_tokens(url)
        print("transformers: the same by lm-eval's own backend", flush=True)
        weights = {"pretrained": str(MODEL), "dtype": "float32", "device": "cpu"}
        numbers["transformers"] = evaluate("hf", weights, tasks, folder)
    names = sorted(numbers["ar"])
    print(table(("metric", *numbers), [(n, *(f"{numbers[backend][n]:.6f}" for backend in numbers)) for n in names]))
    print(f"draft tokens verified: {drafted}")
    equal = all(numbers[mode] == numbers["ar"] for mode in MODES)
    gap = max(abs(numbers["ar"][n] - numbers["transformers"][n]) for n in names)
    print(f"every mode gives the numbers of ar: {equal}; largest gap to Transformers: {gap:.2e}")
    results = {"questions": options.questions, "numbers": numbers, "draft_tokens": drafted, "equal": equal, "gap": gap}
    finish("lm_eval_parity", results, options.out)
    has_drafted = all((drafted[mode] > 0) == (mode != "ar") for mode in MODES)
    return 0 if equal and has_drafted and gap <= LARGEST_GAP else 1


if __name__ == "__main__":
    sys.exit(main())
