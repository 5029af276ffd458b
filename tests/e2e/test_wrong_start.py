"""What a user can get wrong at the start: one clear line, a non-zero exit status, never a traceback."""

import json
import shutil
import socket
import subprocess

import pytest

from benchmarks.bundled import MODEL
from tests.e2e.conftest import ROOT, command


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def remove_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("damage", "flags", "expected"),
    [
        (lambda f: edit_config(f, architectures=["BertModel"]), [], "Qwen3ForCausalLM"),
        (truncate_weights, [], "model.safetensors"),
        (remove_tokenizer, [], "tokenizer"),
        (lambda f: (f / "config.json").write_text("{"), [], "config.json"),
        (lambda f: edit_config(f, tidar={"block_length": 8, "prediction": "same_position"}), [], "mask_token_id"),
        (nothing, ["--num-pages", "4"], "--num-pages"),
        (nothing, ["--num-pages", "10000000000"], "GiB of memory are free. Ways out: lower --num-pages to"),
        (nothing, ["--max-model-len", "100000"], "max_model_len"),
        (nothing, ["--device", "tpu"], "device"),
        (nothing, ["--max-num-batched-tokens", "2"], "--max-num-batched-tokens"),
    ],
    ids=["architecture", "weights", "tokenizer", "json", "tidar", "pool", "memory", "length", "device", "budget"],
)  # fmt: skip
def test_a_checkpoint_or_flag_that_cannot_work(tmp_path, damage, flags, expected):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    damage(folder)
    done = subprocess.run(
        command("serve", str(folder), "--port", "0", *flags), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command("serve", "--port", port), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 1
    assert port in done.stderr
    assert "Traceback" not in done.stderr
