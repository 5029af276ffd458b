"""``tidar chat`` against a real socket, with lines piped in."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import pytest

from tests.server.conftest import listening, text_script
from tests.server.fake_engine import End, FakeEngine

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def terminal(url, *flags, **environment):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server.cli", "chat", "--url", url, *flags),
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def talk(url, lines, *flags, **environment):
    async with terminal(url, *flags, **environment) as process, asyncio.timeout(180):
        out, err = await process.communicate(lines.encode())
    return process.returncode, out.decode(), err.decode()


async def test_a_conversation(make_app, tokenizer):
    engine = FakeEngine(lambda r: text_script(tokenizer, f"answer {len(engine.requests)} 🙂", step=2))
    flags = ("--temperature", "0.5", "--system", "be kind", "--max-tokens", "40")
    async with listening(make_app(engine, api_keys=("k",))) as url:
        lines = "one\n/mode ar\ntwo\n\n/nonsense\n/reset\nthree\n/exit\nnever\n"
        status, out, err = await talk(url, lines, *flags, TIDAR_CHAT_API_KEY="k")
    assert (status, err) == (0, "")
    for number in (1, 2, 3):
        assert f"answer {number} 🙂\n[" in out
    assert out.count("tokens/forward]") == 3
    assert "2.00 tokens/forward" in out
    assert "/reset forgets" in out
    assert [r.decoding.value for r in engine.requests] == ["auto", "ar", "ar"]
    assert all(r.sampling.temperature == 0.5 and r.sampling.max_tokens == 40 for r in engine.requests)
    prompts = [tokenizer.decode(r.prompt_token_ids, skip_special_tokens=False) for r in engine.requests]
    assert "<|assistant|>answer 1 🙂<|end|><|user|>two" in prompts[1]
    assert prompts[2].endswith("<|system|>be kind<|end|><|user|>three<|end|><|assistant|>")


async def test_errors_are_one_line_and_the_conversation_goes_on(make_app, tokenizer):
    ends = iter((End.ERROR, End.DIE, End.EOS))
    engine = FakeEngine(lambda r: text_script(tokenizer, "hello", end=next(ends)))
    async with listening(make_app(engine)) as url:
        status, out, err = await talk(url, "one\ntwo\nthree\n")
    assert status == 0
    assert out.count("tokens/s") == 1
    assert len(engine.requests) == 3
    assert "[the engine is not running" in err
    assert "Traceback" not in err


async def test_ctrl_c_stops_the_answer_and_not_the_program(make_app, tokenizer):
    ends = iter((End.HANG, End.EOS))
    engine = FakeEngine(lambda r: text_script(tokenizer, "hello", end=next(ends)))
    async with listening(make_app(engine)) as url, terminal(url) as process, asyncio.timeout(180):
        process.stdin.write(b"one\n")
        assert await process.stdout.readexactly(5) == b"hello"
        process.send_signal(signal.SIGINT)
        await engine.until(lambda e: e.aborted)
        out, err = await process.communicate(b"two\n")
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b" [stopped]\n[")
    assert b"\nhello\n[" in out


async def test_no_server():
    status, _, err = await talk("http://127.0.0.1:9", "hi\n")
    assert status == 1
    assert err.startswith("tidar chat: no server answers at http://127.0.0.1:9")
    assert err.count("\n") == 1


async def test_a_wrong_key(make_app):
    async with listening(make_app(FakeEngine(), api_keys=("k",))) as url:
        status, _, err = await talk(url, "hi\n")
    assert (status, err) == (1, "tidar chat: a valid API key is needed: send it as 'Authorization: Bearer KEY'\n")
