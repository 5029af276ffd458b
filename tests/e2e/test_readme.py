"""README's examples as a reader would run them: one program out of its Python blocks, and its curl command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import httpx

from tests.e2e.conftest import ROOT

ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


def test_the_python_blocks_run_one_after_the_other(url):
    program = "\n".join(blocks("python"))
    assert ADDRESS in program
    program = program.replace(ADDRESS, url)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    text, metrics, parsed, call, logprob = done.stdout.strip().splitlines()
    assert "os.path.join" in text
    assert "tokens_per_forward" in metrics
    assert parsed.startswith("module=")
    assert re.fullmatch(r"Function\(arguments='\{.*\}', name='look_up'\)", call)
    assert "top_logprobs=[" in logprob


def test_the_curl_command_streams(url):
    [command] = [block for block in blocks("console") if block.startswith("curl")]
    program, address, *options = shlex.split(command.replace("\\\n", " "))
    sent = dict(zip(options[::2], options[1::2], strict=True))
    name, _, value = sent["-H"].partition(": ")
    answer = httpx.post(address.replace(ADDRESS, url), content=sent["-d"], headers={name: value}, timeout=60)
    assert program == "curl"
    assert answer.status_code == 200
    assert json.loads(sent["-d"])["stream"]
    assert answer.text.endswith("data: [DONE]\n\n")
