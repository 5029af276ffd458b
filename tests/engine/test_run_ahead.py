"""A step is launched before the host has read the one before it; what ends in between must leave no trace."""

from __future__ import annotations

import pytest

from engine.core import EngineCore
from engine.messages import FinishReason
from engine.request import Request
from engine.sampling_params import DecodingMode
from tests.engine.driver import Transcript, assert_idle, drive
from tests.engine.fake_device import STOP_TOKEN, FakeDevice, FakeLimits, Script, fake_engine, make_script

PROMPT = (1, 2, 3, 1, 2)


def add(core: EngineCore, device: FakeDevice, *scripts: Script) -> None:
    for script in scripts:
        device.scripts[script.request.request_id] = script
        core.add(script.request)


def step(core: EngineCore, transcript: Transcript) -> None:
    for output in core.step().outputs:
        transcript.add(output)
    core.scheduler.check_integrity()


def drain(core: EngineCore, transcript: Transcript) -> None:
    while core.has_work:
        step(core, transcript)
    assert_idle(core)


def in_flight(core: EngineCore) -> dict[str, int]:
    """How many launched steps, not read yet, have rows of each running request that will count."""
    scheduler, counts = core.scheduler, dict.fromkeys((r.request_id for r in core.scheduler.running), 0)
    for plan, epochs in scheduler._launched.values():
        for slot, epoch in zip(plan.slots.tolist(), epochs.tolist(), strict=True):
            if scheduler.table.epoch_S[slot] == epoch:
                counts[scheduler.table.request_ids[slot]] += 1
    return counts


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_is_launched_before_the_one_before_it_is_read_only_at_depth_1(depth: int) -> None:
    core, device = fake_engine(FakeLimits(depth=depth))
    add(core, device, make_script("a", PROMPT, (1,) * 6, DecodingMode.AR))
    drain(core, Transcript())
    launched, read = device.events.index(("launch", 2)), device.events.index(("read", 1))
    assert (launched < read) == (depth == 1)
    steps = [step_id for event, step_id in device.events if event == "read"]
    assert steps == sorted(steps), "steps are read in the order of their launch"


@pytest.mark.parametrize("depth", [0, 1])
def test_no_step_is_launched_for_a_request_that_surely_ends_before(depth: int) -> None:
    core, device = fake_engine(FakeLimits(depth=depth))
    add(core, device, make_script("a", PROMPT, (1, 2, 3), DecodingMode.AR))
    drain(core, Transcript())
    assert [event for event, _ in device.events].count("launch") == 3


def test_the_surplus_of_a_step_launched_after_the_stop_token_is_dropped() -> None:
    core, device = fake_engine(FakeLimits(depth=1, max_num_seqs=1))
    first = make_script("a", PROMPT, (1, 2, STOP_TOKEN, 3, 1, 2, 3), DecodingMode.AR)
    # It takes the slot and, the pool being small, the pages of the first while a step of the first is in flight.
    second = make_script("b", PROMPT[::-1], (2, 2, 1, 3, 1))
    add(core, device, first, second)
    transcript = Transcript()
    while "b" not in in_flight(core):
        step(core, transcript)
    assert [event for event, _ in device.events].count("launch") > 3 + 1, "nothing was in flight after the stop token"
    drain(core, transcript)
    assert transcript.answer("a").token_ids == (1, 2, STOP_TOKEN)
    assert transcript.answer("a").finish_reason is FinishReason.STOP
    assert transcript.answer("b").token_ids == second.expected


def test_a_request_aborted_in_flight_never_speaks_again_and_its_id_can_be_used_at_once() -> None:
    core, device = fake_engine(FakeLimits(depth=1))
    add(core, device, make_script("a", PROMPT, (1,) * 20), make_script("b", PROMPT, (2,) * 20))
    transcript = Transcript()
    for _ in range(3):
        step(core, transcript)
    assert in_flight(core) == {"a": 1, "b": 1}
    before = transcript.tokens("a")
    core.abort("a")
    core.scheduler.check_integrity()
    assert in_flight(core) == {"b": 1}
    again = make_script("a", (3, 3), (3, 2, 1, 0))
    add(core, device, again)
    drain(core, transcript)
    assert transcript.tokens("a") == before + again.expected, "the aborted request was given tokens, or gave its own to another"
    assert transcript.tokens("b") == (2,) * 20


def test_aborting_everything_in_flight_leaves_an_idle_engine() -> None:
    core, device = fake_engine(FakeLimits(depth=1))
    add(core, device, make_script("a", PROMPT, (1,) * 20))
    transcript = Transcript()
    step(core, transcript)
    core.abort("a")
    assert core.has_work, "the launched step still has to be read"
    drain(core, transcript)
    assert not transcript.outputs


def test_a_request_preempted_in_flight_loses_that_step_and_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    core, device = fake_engine(FakeLimits(depth=1, page_size=4, num_pages=13, max_num_seqs=3, guess_rate=1.0))
    scripts = [make_script(name, (*PROMPT, i), (i, *range(4)) * 5) for i, name in enumerate("abc")]
    lost: list[int] = []
    preempt = core.scheduler._preempt

    def spy(request: Request) -> None:
        lost.append(in_flight(core)[request.request_id])
        preempt(request)
        assert request.request_id not in in_flight(core)

    monkeypatch.setattr(core.scheduler, "_preempt", spy)
    device.scripts |= {s.request.request_id: s for s in scripts}
    transcript = drive(core, [s.request for s in scripts])
    assert any(lost), "no request was preempted while a step of it was in flight"
    assert core.scheduler.stats().num_preemptions == len(lost)
    for script in scripts:
        assert transcript.answer(script.request.request_id).token_ids == script.expected


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_preempted_while_its_prompt_is_computed_starts_again(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = FakeLimits(page_size=2, num_pages=22, max_num_seqs=2, budget=3, depth=depth, share_prefixes=False, guess_rate=0.0)
    core, device = fake_engine(limits)
    scripts = [make_script("a", (1,) * 6, (2,) * 30), make_script("b", (3,) * 30, (1, 2, 3))]
    device.scripts = {s.request.request_id: s for s in scripts}
    computed: list[int] = []
    preempt = core.scheduler._preempt

    def spy(request: Request) -> None:
        assert request.request_id == "b", "the newest is preempted"
        computed.append(core.scheduler.kv.num_computed_S[request.slot])
        preempt(request)

    monkeypatch.setattr(core.scheduler, "_preempt", spy)
    transcript = drive(core, [s.request for s in scripts])
    assert any(0 < count < 29 for count in computed)
    for script in scripts:
        assert transcript.answer(script.request.request_id).token_ids == script.expected


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_that_never_fit_are_answered_at_once(depth: int) -> None:
    core, _ = fake_engine(FakeLimits(depth=depth))
    core.add(make_script("long", PROMPT, (1,) * 100).request)
    core.add(make_script("empty", (), (1,)).request)
    outputs = {output.request_id: output for output in core.step().outputs}
    assert outputs["long"].error == (
        "the prompt has 5 tokens and 100 more are wanted, but the context holds 48: shorten the prompt or lower max_tokens"
    )
    assert outputs["empty"].error == "the prompt is empty: send at least one token"
    assert {output.finish_reason for output in outputs.values()} == {FinishReason.ERROR}
    assert not core.has_work


@pytest.mark.parametrize("depth", [0, 1])
def test_what_was_computed_behind_a_stop_is_shared_with_nobody(depth: int) -> None:
    """Its tokens are not the request's, and in the table stand those of the slot's request before."""
    core, device = fake_engine(FakeLimits(page_size=1, max_num_seqs=1, num_branches=4, guess_rate=1.0, depth=depth))
    before = make_script("before", (1, 2), (3, 0, 1, 2, 3, 0, 1, 2))
    stopped = make_script("stopped", (1, 3), (2, STOP_TOKEN, 0, 0, 0, 0, 0))
    after = make_script("after", (1, 3, 2, STOP_TOKEN, 1, 2, 3), (0, 1))
    for script in (before, stopped, after):
        device.scripts = {script.request.request_id: script}
        transcript = drive(core, [script.request])
        assert transcript.tokens(script.request.request_id) == script.expected
    assert transcript.outputs["after"][-1].num_cached_tokens == 4
