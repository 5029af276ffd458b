"""The engine process and the server's side of it, with a core that needs no model."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from engine.config import EngineConfig, SchedulerConfig
from engine.interface import Engine, EngineDeadError, QueueFullError
from engine.messages import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    GrammarSpec,
    Progress,
    RequestOutput,
    SpeculationStats,
    StepOutputs,
)
from engine.process import AsyncEngine, OutputStream
from engine.sampling_params import SamplingParams
from engine.worker import run_engine
from tests.unit.engine import fake_core

CORE = "tests.unit.engine.fake_core:build"
GUARD_SECONDS = 60.0


def make_engine(model: str = "ok", on_progress: Callable[[str], None] | None = None, /, **limits: int) -> AsyncEngine:
    return AsyncEngine(EngineConfig(model, scheduler=SchedulerConfig(**limits)), on_progress, core_factory=CORE)


@asynccontextmanager
async def guarded(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    """No test hangs, and no process stays behind."""
    try:
        async with asyncio.timeout(GUARD_SECONDS):
            yield engine
    finally:
        await engine.shutdown()
        assert not multiprocessing.active_children()


@asynccontextmanager
async def running(**limits: int) -> AsyncIterator[AsyncEngine]:
    async with guarded(make_engine(**limits)) as engine:
        await engine.start()
        yield engine


def ask(request_id: str, *tokens: int) -> GenerateRequest:
    return GenerateRequest(request_id, tokens, SamplingParams(max_tokens=1000))


def salted(request_id: str, salt: object) -> GenerateRequest:
    return replace(ask(request_id, 1), cache_salt=salt)  # type: ignore[arg-type]


async def tokens_of(stream: OutputStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


def constrained(request_id: str, source: str, *tokens: int) -> GenerateRequest:
    return replace(ask(request_id, *tokens), grammar=GrammarSpec(source))


def test_nobody_waits_for_a_grammar_to_compile_but_its_request() -> None:
    async def scenario() -> None:
        async with running() as engine:
            slow = asyncio.create_task(tokens_of(engine.generate(constrained("slow", "slow", 1, 2))))
            behind = asyncio.create_task(tokens_of(engine.generate(constrained("behind", "quick", 3))))
            assert await tokens_of(engine.generate(ask("other", 4, 5))) == [4, 5]
            assert not slow.done()
            assert await tokens_of(engine.generate(ask("release", 6))) == [6]
            assert (await slow, await behind) == ([1, 2], [3])

    asyncio.run(scenario())


def test_a_grammar_that_does_not_compile_fails_its_request_alone() -> None:
    async def scenario() -> None:
        async with running() as engine:
            (output,) = [output async for output in engine.generate(constrained("bad", "wrong", 1))]
            assert (output.finish_reason, output.error) == (FinishReason.ERROR, "no such grammar")
            assert await tokens_of(engine.generate(constrained("good", "fine", 2))) == [2]

    asyncio.run(scenario())


def test_a_grammar_that_never_compiles_does_not_keep_the_process_alive() -> None:
    async def scenario() -> None:
        engine = make_engine()
        async with guarded(engine):
            await engine.start()
            engine.generate(constrained("forever", "slow", 1))
            await tokens_of(engine.generate(ask("other", 4)))
            await engine.shutdown()
            assert await engine.wait_closed() is None

    asyncio.run(scenario())


def test_a_request_that_is_aborted_while_its_grammar_compiles_never_runs() -> None:
    async def scenario() -> None:
        async with running() as engine:
            gone = engine.generate(constrained("hold-gone", "slow", 1))
            await gone.aclose()
            await tokens_of(engine.generate(ask("release", 6)))
            assert await tokens_of(engine.generate(constrained("after", "fine", 2))) == [2]
            assert engine.stats().num_running == 0

    asyncio.run(scenario())


def test_start_reports_progress_and_the_model() -> None:
    async def scenario() -> None:
        progress: list[str] = []
        engine: Engine = make_engine("ok", progress.append)
        assert isinstance(engine, AsyncEngine)
        assert not engine.is_alive
        assert engine.pid is None
        assert engine.heartbeat_age == 0.0
        with pytest.raises(EngineDeadError, match="not started"):
            _ = engine.info
        with pytest.raises(EngineDeadError, match="not started"):
            engine.generate(ask("a", 1))
        async with guarded(engine):
            await engine.start()
            assert progress == ["loading ok", "ready soon"]
            assert engine.info == fake_core.INFO
            assert engine.is_alive
            assert 0.0 <= engine.heartbeat_age < GUARD_SECONDS
            assert engine.stats() == EngineStats()
            with pytest.raises(RuntimeError, match="starts once"):
                await engine.start()

    asyncio.run(scenario())


def test_outputs_stream_until_the_finish() -> None:
    async def scenario() -> None:
        async with running() as engine:
            outputs = [output async for output in engine.generate(ask("a", 5, 6, 7))]
            assert [token for output in outputs for token in output.token_ids] == [5, 6, 7]
            assert [output.finish_reason for output in outputs][-1] is FinishReason.LENGTH
            assert all(output.finish_reason is None for output in outputs[:-1])
            assert engine.stats() == EngineStats(num_steps=3)

    asyncio.run(scenario())


def test_requests_interleave() -> None:
    async def scenario() -> None:
        async with running() as engine:
            streams = [engine.generate(ask(f"r{i}", *range(i, i + 20))) for i in range(5)]
            assert await asyncio.gather(*map(tokens_of, streams)) == [list(range(i, i + 20)) for i in range(5)]

    asyncio.run(scenario())


def test_outputs_that_wait_are_merged() -> None:
    async def scenario() -> None:
        async with running() as engine:
            unread = engine.generate(ask("unread", *range(50)))
            await tokens_of(engine.generate(ask("longer", *range(60))))
            assert [output async for output in unread] == [
                RequestOutput("unread", tuple(range(50)), FinishReason.LENGTH, num_cached_tokens=3)
            ]

    asyncio.run(scenario())


def test_outputs_tell_what_drafting_did_so_far_and_what_was_cached() -> None:
    async def scenario() -> None:
        async with running() as engine:
            stream = engine.generate(ask("hold", *range(40)))
            await tokens_of(engine.generate(ask("longer", *range(50))))
            merged = await anext(stream)  # the first output and those in columns behind it
            assert merged == RequestOutput(
                "hold", tuple(range(40)), num_cached_tokens=3, speculation=SpeculationStats(num_forwards=40)
            )
            await stream.aclose()

    asyncio.run(scenario())


def test_columns_are_the_outputs_of_their_requests() -> None:
    outputs = [
        RequestOutput("a", (1, 2), speculation=SpeculationStats(3, 2, 8, 5)),
        RequestOutput("b", (3,), speculation=SpeculationStats(1)),
    ]
    last = RequestOutput("c", (4,), FinishReason.LENGTH)
    step = StepOutputs(EngineStats(), (last,), fake_core.columns_of(outputs))
    assert pickle.loads(pickle.dumps(step)).outputs == step.outputs == (last, *outputs)
    assert not step.is_empty
    assert StepOutputs(EngineStats()).is_empty


def test_a_running_id_is_refused() -> None:
    async def scenario() -> None:
        async with running() as engine:
            stream = engine.generate(ask("hold", 1))
            with pytest.raises(ValueError, match="'hold' is already running"):
                engine.generate(ask("hold", 1))
            await stream.aclose()

    asyncio.run(scenario())


async def close(stream: OutputStream) -> None:
    await stream.aclose()
    await stream.aclose()
    assert await tokens_of(stream) == []


async def read_and_close(stream: OutputStream) -> None:
    assert (await anext(stream)).token_ids[0] == 1
    await stream.aclose()


async def cancel_the_reader(stream: OutputStream) -> None:
    assert (await anext(stream)).token_ids[0] == 1
    reader = asyncio.create_task(tokens_of(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


@pytest.mark.parametrize("leave", [close, read_and_close, cancel_the_reader])
def test_leaving_early_aborts(leave: Callable[[OutputStream], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with running() as engine:
            watcher = engine.generate(ask("watch"))
            await leave(engine.generate(ask("hold", 1)))
            assert (await anext(watcher)).error == "aborted hold"

    asyncio.run(scenario())


def test_dropping_the_stream_aborts() -> None:
    async def scenario() -> None:
        async with running() as engine:
            watcher = engine.generate(ask("watch"))
            engine.generate(ask("hold", 1))
            gc.collect()
            assert (await anext(watcher)).error == "aborted hold"

    asyncio.run(scenario())


def test_gauges_fall_when_the_last_request_is_aborted() -> None:
    async def scenario() -> None:
        async with running() as engine:
            held = engine.generate(ask("hold", 1))
            await anext(held)
            assert engine.stats().num_running == 1
            await held.aclose()
            while engine.stats().num_running:  # noqa: ASYNC110 - no event tells of new statistics
                await asyncio.sleep(0)

    asyncio.run(scenario())


def test_closing_after_the_finish_aborts_nothing() -> None:
    async def scenario() -> None:
        async with running() as engine:
            watcher = engine.generate(ask("watch"))
            finished = engine.generate(ask("a", 1))
            await tokens_of(finished)
            await finished.aclose()
            await engine.generate(ask("hold", 1)).aclose()
            assert (await anext(watcher)).error == "aborted hold"

    asyncio.run(scenario())


def test_outputs_of_an_aborted_request_are_dropped() -> None:
    async def scenario() -> None:
        async with running() as engine:
            await engine.generate(ask("gone", *range(500))).aclose()
            assert await tokens_of(engine.generate(ask("a", 1, 2))) == [1, 2]

    asyncio.run(scenario())


def test_a_full_queue_is_refused_at_the_call() -> None:
    async def scenario() -> None:
        async with running(max_num_seqs=1, max_waiting_requests=1) as engine:
            first, second = engine.generate(ask("hold1", 1)), engine.generate(ask("hold2", 1))
            with pytest.raises(QueueFullError, match="1 requests are waiting"):
                engine.generate(ask("third", 1))
            await first.aclose()
            assert await tokens_of(engine.generate(ask("third", 1))) == [1]
            await second.aclose()

    asyncio.run(scenario())


def test_waiting_prompt_tokens_are_limited() -> None:
    async def scenario() -> None:
        async with running(max_waiting_tokens=4) as engine:
            alone = engine.generate(ask("alone", 1, 2, 3, 4, 5, 6))  # over the limit, but nothing waits
            await tokens_of(alone)
            mute = engine.generate(ask("mute", 1, 2, 3))
            with pytest.raises(QueueFullError, match="3 prompt tokens are waiting"):
                engine.generate(ask("a", 1, 2))
            hold = engine.generate(ask("hold", 1))
            await anext(hold)  # has started, so that its token waits no more
            assert await tokens_of(engine.generate(ask("b", 1))) == [1]
            await mute.aclose()
            assert await tokens_of(engine.generate(ask("c", 1, 2, 3, 4))) == [1, 2, 3, 4]
            await hold.aclose()

    asyncio.run(scenario())


def test_a_request_that_cannot_be_sent_fails_alone() -> None:
    async def scenario() -> None:
        async with running() as engine:
            output = await anext(engine.generate(salted("a", lambda: None)))
            assert output.finish_reason is FinishReason.ERROR
            assert output.error is not None
            assert "cannot be sent to the engine" in output.error
            assert await tokens_of(engine.generate(ask("b", 1, 2))) == [1, 2]

    asyncio.run(scenario())


def kill(engine: AsyncEngine) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("strike", "message"),
    [
        (kill, "killed by SIGKILL"),
        (lambda engine: engine.generate(ask("exit", 1)), "ended with exit code 7"),
        (lambda engine: engine.generate(ask("raise", 1)), "stopped in a step: RuntimeError: device lost"),
        (lambda engine: engine.generate(ask("unreadable", 1)), "sent what cannot be read: ValueError: garbage"),
        (lambda engine: engine.generate(salted("a", fake_core.Unreadable())), "ended with exit code 1"),
    ],
)
def test_death_reaches_everyone(strike: Callable[[AsyncEngine], object], message: str) -> None:
    async def scenario() -> None:
        async with running() as engine:
            held, mute = engine.generate(ask("hold", 1)), engine.generate(ask("mute", 1))
            await anext(held)
            stricken = strike(engine)
            for stream in (held, mute):
                with pytest.raises(EngineDeadError, match=message):
                    await anext(stream)
            reason = await engine.wait_closed()
            assert reason is not None
            assert message in reason
            assert "\n" not in reason
            assert not engine.is_alive
            with pytest.raises(EngineDeadError, match=message):
                engine.generate(ask("late", 1))
            await engine.shutdown()
            assert await engine.wait_closed() == reason
            del stricken

    asyncio.run(scenario())


def test_what_came_before_the_death_can_still_be_read() -> None:
    async def scenario() -> None:
        async with running() as engine:
            done, unread = engine.generate(ask("a", 1, 2)), engine.generate(ask("hold", 3, 4))
            await tokens_of(engine.generate(ask("b", 1, 2, 3)))
            kill(engine)
            await engine.wait_closed()
            assert await tokens_of(done) == [1, 2]
            assert (await anext(unread)).token_ids == (3, 4)
            with pytest.raises(EngineDeadError):
                await anext(unread)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("model", "message", "has_traceback"),
    [
        ("foreseen", "no such model; name a folder", False),
        ("unforeseen", "the engine cannot start: ZeroDivisionError: oops (the traceback is in the log)", True),
    ],
)
def test_a_failed_start_says_why(model: str, message: str, has_traceback: bool, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with guarded(make_engine(model)) as engine:
            with pytest.raises(EngineDeadError) as caught:
                await engine.start()
            assert str(caught.value) == message
            assert await engine.wait_closed() == message

    asyncio.run(scenario())
    assert ("Traceback" in capfd.readouterr().err) is has_traceback


def test_shutdown_is_orderly_and_idempotent() -> None:
    async def scenario() -> None:
        async with running() as engine:
            held = engine.generate(ask("hold", 1))
            await anext(held)
            await asyncio.gather(engine.shutdown(), engine.shutdown())
            await engine.shutdown()
            assert await engine.wait_closed() is None
            assert not multiprocessing.active_children()
            assert not engine.is_alive
            with pytest.raises(EngineDeadError, match="shut down"):
                await anext(held)
            with pytest.raises(EngineDeadError, match="shut down"):
                engine.generate(ask("late", 1))

    asyncio.run(scenario())


def test_the_process_ends_without_taking_itself_apart(capfd: pytest.CaptureFixture[str]) -> None:
    """That takes a second with torch, and longer beside other work."""

    async def scenario() -> None:
        async with guarded(make_engine("long farewell")) as engine:
            await engine.start()
            await engine.shutdown()
            assert await engine.wait_closed() is None

    asyncio.run(scenario())
    assert "taken apart" not in capfd.readouterr().out


def test_shutdown_before_the_start() -> None:
    async def scenario() -> None:
        async with guarded(make_engine()) as engine:
            await engine.shutdown()
            assert await engine.wait_closed() is None

    asyncio.run(scenario())


def test_shutdown_while_loading() -> None:
    async def scenario() -> None:
        loading = asyncio.Event()
        async with guarded(make_engine("stuck", lambda _: loading.set())) as engine:
            start = asyncio.create_task(engine.start())
            await loading.wait()
            await engine.shutdown()
            with pytest.raises(EngineDeadError, match="shut down"):
                await start
            assert await engine.wait_closed() is None

    asyncio.run(scenario())


def test_the_process_leaves_signals_to_the_server() -> None:
    async def scenario() -> None:
        async with running() as engine:
            assert engine.pid is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(engine.pid, number)
            assert await tokens_of(engine.generate(ask("a", 1, 2))) == [1, 2]

    asyncio.run(scenario())


def test_the_process_ends_with_the_server_even_while_loading() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    heartbeat = context.RawValue("d", 0.0)
    process = context.Process(target=run_engine, args=(EngineConfig("stuck"), theirs, heartbeat, CORE))
    process.start()
    theirs.close()
    assert ours.poll(GUARD_SECONDS)
    assert ours.recv() == Progress("loading stuck")
    assert 0.0 < heartbeat.value <= time.monotonic()
    ours.close()
    process.join(GUARD_SECONDS)
    assert process.exitcode == 1
    process.close()


def test_a_server_that_forgets_the_shutdown_still_exits() -> None:
    program = f"""
import asyncio
from engine.config import EngineConfig
from engine.process import AsyncEngine
engine = AsyncEngine(EngineConfig("ok"), core_factory="{CORE}")
asyncio.run(engine.start())
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=GUARD_SECONDS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_server_side_imports_no_torch() -> None:
    program = "import sys, engine.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=GUARD_SECONDS, check=False).returncode == 0
