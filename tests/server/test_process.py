"""The whole process: start, signals, the engine's death, and what is printed on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import chat, sse_data, stream_text

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]
HANGING = chat(stream=True, max_tokens=1000)


class Server:
    def __init__(self, process):
        self.process = process
        self.lines = []
        self.url = ""

    async def until_ready(self):
        async with asyncio.timeout(60):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line)
                if match := re.match(r"ready at (\S+)", line):
                    self.url = match[1]
                    return
        raise AssertionError(f"not ready: {self.lines}")

    async def end(self):
        async with asyncio.timeout(60):
            out, err = await self.process.communicate()
        return self.process.returncode, "".join(self.lines) + out.decode(), err.decode()


@contextlib.asynccontextmanager
async def start(folder, *flags, **environment):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.server.serve_fake", str(folder), "--port", "0", *flags),
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Server(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@contextlib.asynccontextmanager
async def hanging_stream(url):
    """A stream that has begun and does not end by itself; yields what reads it to the end."""
    async with (
        httpx.AsyncClient(base_url=url, timeout=30) as client,
        client.stream("POST", "/v1/chat/completions", json=HANGING) as response,
    ):
        parts = response.aiter_text()
        begun = await anext(parts)

        async def rest():
            return sse_data(begun + "".join([part async for part in parts]))

        yield client, rest


async def test_sigterm_finishes_what_runs_within_the_timeout(tokenizer_folder):
    async with start(tokenizer_folder, "--shutdown-timeout", "1") as server:
        await server.until_ready()
        async with hanging_stream(server.url) as (client, rest):
            server.process.send_signal(signal.SIGTERM)
            while (ready := await client.get("/health/ready")).status_code == 200:
                pass
            assert ready.status_code == 503
            refused = await client.post("/v1/chat/completions", json=chat())
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            events = await rest()
        assert stream_text(events[:-1])
        assert events[-1]["error"]["code"] == "server_shutting_down"
        status, out, err = await server.end()
    assert status == 0, err
    assert "torch was not imported" in out
    assert "Traceback" not in err


async def test_an_idle_server_ends_at_once(tokenizer_folder):
    async with start(tokenizer_folder, "--api-key", "secret", "--served-model-name", "tiny") as server:
        await server.until_ready()
        async with httpx.AsyncClient(base_url=server.url) as client:
            answer = await client.post(
                "/v1/chat/completions", json=chat(max_tokens=5), headers={"Authorization": "Bearer secret"}
            )
        assert answer.json()["model"] == "tiny"
        server.process.send_signal(signal.SIGINT)
        status, out, err = await server.end()
    assert status == 0, err
    assert "curl" in out
    assert "max_model_len         10000" in out, "the resolved configuration, not what was asked for"
    assert "secret" not in out + err
    assert answer.headers["x-request-id"] in err


async def test_a_second_interrupt_ends_at_once(tokenizer_folder):
    async with start(tokenizer_folder, "--shutdown-timeout", "600") as server:
        await server.until_ready()
        async with hanging_stream(server.url) as (client, rest):
            server.process.send_signal(signal.SIGINT)
            while (await client.get("/health/ready")).status_code == 200:
                pass
            server.process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.TransportError):
                await rest()
        assert (await server.end())[0] == 130


async def test_the_engines_death_ends_the_process(tokenizer_folder):
    async with start(tokenizer_folder) as server:
        await server.until_ready()
        async with hanging_stream(server.url) as (client, rest):
            last = await client.post("/v1/chat/completions", json=chat(seed=13))
            assert last.status_code == 503
            events = await rest()
        assert events[-1]["error"]["code"] == "engine_unavailable"
        status, _, err = await server.end()
    assert status == 1
    assert "tidar serve: the engine process was killed by SIGKILL" in err
    assert "Traceback" not in err


async def test_sigterm_does_not_wait_for_a_slow_start(tokenizer_folder):
    async with start(tokenizer_folder, FAKE_SLOW_TOKENIZER="1") as server:
        assert await server.process.stdout.readline() == b"loading the tokenizer\n"
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            status, out, err = await server.end()
    assert (status, err) == (0, "")
    assert "ready" not in out


async def test_a_failed_start_is_one_line(tokenizer_folder):
    async with start(tokenizer_folder, FAKE_START_FAILURE="no weights in the folder") as server:
        status, out, err = await server.end()
    assert (status, err) == (1, "tidar serve: no weights in the folder\n")
    assert "ready" not in out


async def test_a_missing_tokenizer_is_one_line(tmp_path):
    async with start(tmp_path) as server:
        status, _, err = await server.end()
    assert status == 1
    assert re.fullmatch(r"tidar serve: .* has no tokenizer files.*\n", err)


async def test_a_port_in_use_is_one_line_before_anything_is_loaded(tokenizer_folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        async with start(tokenizer_folder, "--port", str(port), FAKE_START_FAILURE="it was loaded") as server:
            status, _, err = await server.end()
    assert status == 1
    assert err.startswith(f"port {port} on 127.0.0.1 is in use")


@pytest.mark.parametrize("module", ["server.cli", "server.app", "server.serve", "server.terminal"])
async def test_importing_the_server_loads_neither_torch_nor_transformers(module):
    code = f"import sys, json, {module}; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert json.loads(out) == []
