"""A long prompt is computed in chunks beside requests that decode, and neither keeps the other from getting on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from engine.core import EngineCore
from engine.messages import RequestOutput, TokenColumns
from engine.sampling_params import DecodingMode
from engine.step import StepPlan, StepResult
from tests.engine.driver import drive
from tests.engine.fake_device import FakeLimits, fake_engine, make_script

AR, LINEAR, TIDAR = DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR
LONG, STREAMS = "long", ("a", "b", "c")
BUDGET, BLOCK_LENGTH, LONG_PROMPT = 16, 4, (0, 1, 2, 3) * 50
"""All branches of one stream take more rows than there are in a step, and the prompt more than a dozen steps."""


@dataclass
class ChunkSteps:
    """The steps from the admission of the long prompt to the one that computes the last of it."""

    prompt_rows: list[int] = field(default_factory=list)
    """Of each of these steps but the last."""

    tokens: list[dict[str, int]] = field(default_factory=list)
    """How many each stream got that had its first token when the step was planned."""

    def watch(self, core: EngineCore) -> None:
        scheduler, table = core.scheduler, core.scheduler.table
        schedule, apply = scheduler.schedule, scheduler.apply
        streams_of_step: dict[int, list[str]] = {}
        is_computed = False

        def scheduled() -> StepPlan | None:
            nonlocal is_computed
            decoding = [r.request_id for r in scheduler.running if table.num_tokens_S[r.slot] > r.num_prompt_tokens]
            plan = schedule()
            slots = {r.request_id: r.slot for r in scheduler.running}
            if plan is None or LONG not in slots:
                return plan
            rows = {slot: (prefill, drafts) for slot, (prefill, drafts, *_) in zip(plan.slots, plan.shapes, strict=True)}
            prefill, drafts = rows.get(slots[LONG], (0, 0))
            is_computed |= drafts > 0
            if not is_computed:
                self.prompt_rows.append(int(prefill))
                streams_of_step[plan.step_id] = decoding
            return plan

        def applied(plan: StepPlan, result: StepResult) -> tuple[list[RequestOutput], TokenColumns]:
            if plan.step_id in streams_of_step:
                names = [table.request_ids[slot] for slot in plan.slots.tolist()]
                emitted = dict(zip(names, result.counts[:, 0].tolist(), strict=True))
                self.tokens.append({name: emitted.get(name, 0) for name in streams_of_step[plan.step_id]})
            return apply(plan, result)

        scheduler.schedule, scheduler.apply = scheduled, applied  # type: ignore[method-assign]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("is_older", [False, True], ids=["streams first", "prompt first"])
@pytest.mark.parametrize(
    "modes", [(AR,) * 3, (LINEAR,) * 3, (TIDAR,) * 3, (AR, LINEAR, TIDAR)], ids=["ar", "linear", "tidar", "each another"]
)
def test_every_stream_and_the_prompt_get_on_in_every_step(depth: int, is_older: bool, modes: tuple[DecodingMode, ...]) -> None:
    limits = FakeLimits(num_pages=600, budget=BUDGET, depth=depth, block_length=BLOCK_LENGTH, num_branches=BLOCK_LENGTH)
    core, device = fake_engine(replace(limits, max_model_len=1000))
    scripts = [make_script(name, (1, 2, 3), (0, 1, 2) * 200, mode) for name, mode in zip(STREAMS, modes, strict=True)]
    scripts.append(make_script(LONG, LONG_PROMPT, (1, 2, 3), modes[0]))
    device.scripts = {s.request.request_id: s for s in scripts}
    steps = ChunkSteps()
    steps.watch(core)
    transcript = drive(core, [s.request for s in scripts], dict.fromkeys(STREAMS, 1) if is_older else {LONG: 6})
    assert all(transcript.answer(s.request.request_id).token_ids == s.expected for s in scripts)
    assert len(steps.prompt_rows) >= len(LONG_PROMPT) // BUDGET
    assert min(steps.prompt_rows) >= BUDGET // 4, "the prompt is computed by the row"
    for number, tokens in enumerate(steps.tokens):
        assert min(tokens.values(), default=1) >= 1, f"step {number} of the prompt: {tokens}"
    # Streams that come after the prompt need a few steps to their own first token.
    assert sum(set(tokens) == {*STREAMS} for tokens in steps.tokens) >= len(steps.tokens) - 6 * is_older
