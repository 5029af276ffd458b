"""Many requests side by side: what happens to some of them in a step must not touch the others."""

from __future__ import annotations

import itertools
import random

import pytest

from engine.sampling_params import DecodingMode
from tests.engine.driver import drive
from tests.engine.fake_device import STOP_TOKEN, FakeLimits, Script, fake_engine, make_script

MODES = (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR)
BLOCK_LENGTH = 6


def random_script(rng: random.Random, name: str, mode: DecodingMode) -> Script:
    """An answer that may end in the middle of a block, at a stop id of its own that others use as a word."""
    prompt = tuple(rng.choices(range(4), k=rng.randint(1, 12)))
    output = tuple(rng.choices((0, 1, 2, 3, STOP_TOKEN), (19, 19, 19, 19, 1), k=rng.randint(1, 34)))
    return make_script(name, prompt, output, mode, stops=rng.choice(((), (), (), (rng.randrange(4),), (70_000,))))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_pages", [60, 1000])
@pytest.mark.parametrize("modes", [(mode,) for mode in MODES] + [MODES], ids=lambda modes: "+".join(m.value for m in modes))
def test_stops_and_aborts_in_the_middle_of_a_block_touch_nobody_else(
    depth: int, num_pages: int, modes: tuple[DecodingMode, ...]
) -> None:
    rng = random.Random(f"{depth} {num_pages} {modes}")
    limits = FakeLimits(4, num_pages, max_num_seqs=40, budget=400, depth=depth, block_length=BLOCK_LENGTH, guess_rate=0.9)
    core, device = fake_engine(limits)
    scripts = [random_script(rng, f"r{i}", rng.choice(modes)) for i in range(90)]
    device.scripts = {s.request.request_id: s for s in scripts}
    arrivals = {name: rng.randint(0, 12) for name in device.scripts}
    aborts = {name: arrivals[name] + rng.randint(0, 6) for name in rng.sample(sorted(device.scripts), 25)}
    transcript = drive(core, [s.request for s in scripts], arrivals, aborts)
    for script in scripts:
        name = script.request.request_id
        if name not in aborts:
            assert transcript.answer(name).token_ids == script.expected
        else:
            assert transcript.tokens(name) == script.expected[: len(transcript.tokens(name))]
    assert (core.scheduler.stats().num_preemptions > 0) == (num_pages == 60)
    cut = [s for s in scripts if len(s.expected) < len(s.token_ids) - len(s.request.prompt_token_ids)]
    assert len(cut) > 15, "too few answers end at a stop id"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_batch_of_linear_requests_stays_in_one_phase(depth: int) -> None:
    core, device = fake_engine(FakeLimits(4, 1000, 32, 2000, depth, BLOCK_LENGTH, guess_rate=1.0))
    # One after the other, so that by themselves they would be in either phase.
    scripts = [make_script(f"r{i}", (1, 2), (0, 1, 2) * 15, DecodingMode.LINEAR) for i in range(32)]
    device.scripts = {s.request.request_id: s for s in scripts}
    plans: list[set[tuple[int, int]]] = []
    lay_out = device.lay_out

    def watched(plan):  # type: ignore[no-untyped-def]
        plans.append({(drafts, branches) for _, drafts, branches, *_ in plan.shapes.tolist()})
        return lay_out(plan)

    device.lay_out = watched  # type: ignore[method-assign]
    transcript = drive(core, [s.request for s in scripts], {f"r{i}": i // 4 for i in range(32)})
    assert all(transcript.answer(s.request.request_id).token_ids == s.expected for s in scripts)
    # Once all are here, and before the first one is near its end, everybody redrafts and everybody verifies, in turn.
    steady = plans[9:13]
    assert {frozenset(plan) for plan in steady} == {frozenset({(1, 1)}), frozenset({(BLOCK_LENGTH, 0)})}
    assert all(one != other for one, other in itertools.pairwise(steady))
