"""Random schedules on the real loop and scheduler: whatever happens, requests get their tokens and pages are never mixed up.

The device is a fake that checks every page it reads and writes (``tests.engine.fake_device``).
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core import EngineCore
from engine.sampling_params import DecodingMode
from engine.step import StepPlan
from tests.engine.driver import MAX_STEPS, Transcript, assert_idle
from tests.engine.fake_device import MAX_MODEL_LEN, STOP_TOKEN, FakeLimits, Script, fake_engine, make_script

MODES = (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR, DecodingMode.AUTO)
PREFIXES = (tuple(i % 3 for i in range(20)), tuple(i % 4 for i in range(20)))
tokens = st.integers(0, 3)


@st.composite
def limits(draw: st.DrawFn) -> FakeLimits:
    page_size = draw(st.integers(1, 9))
    max_num_seqs = draw(st.integers(1, 5))
    block_length = draw(st.integers(2, 6))
    return FakeLimits(
        page_size=page_size,
        num_pages=1 + -(-MAX_MODEL_LEN // page_size) + draw(st.sampled_from((0, 1, 4, 60))),
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + draw(st.sampled_from((0, 1, 7, 30, 200))),
        depth=draw(st.integers(0, 1)),
        block_length=block_length,
        num_branches=draw(st.integers(1, block_length)),
        share_prefixes=draw(st.booleans()),
        guess_rate=draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def texts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt that may begin like others do, and its answer, perhaps with a stop token."""
    prompt = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 20))]
    prompt += tuple(draw(st.lists(tokens, min_size=0 if prompt else 1, max_size=5)))
    output = tuple(draw(st.lists(tokens, min_size=1, max_size=MAX_MODEL_LEN - len(prompt))))
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(output) - 1))
        output = (*output[:cut], STOP_TOKEN, *output[cut + 1 :])
    return prompt, output


def watch_phases(core: EngineCore) -> None:
    """Assert of every plan that its linear requests are in one phase: nobody redrafts beside one that verifies."""
    scheduler = core.scheduler
    schedule = scheduler.schedule

    def scheduled() -> StepPlan | None:
        plan = schedule()
        if plan is not None:
            linear = [
                (drafts, branches)
                for slot, (_, drafts, branches, *_) in zip(plan.slots.tolist(), plan.shapes.tolist(), strict=True)
                if scheduler._request(slot).message.decoding is DecodingMode.LINEAR
            ]
            verifies = any(drafts > 1 for drafts, _ in linear)
            redrafts = any(branches for _, branches in linear)
            assert not (verifies and redrafts), f"two phases in one step: {linear}"
        return plan

    scheduler.schedule = scheduled  # type: ignore[method-assign]


class Schedules(RuleBasedStateMachine):
    """Arrivals, aborts and steps in any order, under any limits."""

    @initialize(limits=limits())
    def start(self, limits: FakeLimits) -> None:
        self.core, self.device = fake_engine(limits)
        watch_phases(self.core)
        self.scripts: dict[str, Script] = {}
        self.aborted: set[str] = set()
        self.transcript = Transcript()

    @rule(
        text=texts(),
        mode=st.sampled_from(MODES),
        salt=st.sampled_from(("", "", "b")),
        stops=st.sampled_from(((), (), (3,), (2, 200))),
    )
    def arrive(
        self, text: tuple[tuple[int, ...], tuple[int, ...]], mode: DecodingMode, salt: str, stops: tuple[int, ...]
    ) -> None:
        """``stops`` are ordinary tokens of other requests."""
        script = make_script(f"r{len(self.scripts)}", *text, mode, salt, stops)
        self.scripts[script.request.request_id] = self.device.scripts[script.request.request_id] = script
        self.core.add(script.request)

    @precondition(lambda self: self.core.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.core.scheduler.requests)))
        self.aborted.add(name)
        self.core.abort(name)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    def _step(self) -> None:
        for output in self.core.step().outputs:
            assert output.request_id not in self.aborted, "an aborted request speaks"
            self.transcript.add(output)
        self.core.scheduler.check_integrity()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.scheduler.check_integrity()
        for name, script in self.scripts.items():
            given = self.transcript.tokens(name)
            assert given == script.expected[: len(given)], f"{name} was given wrong tokens"

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(MAX_STEPS):
            if not self.core.has_work:
                break
            self._step()
        assert not self.core.has_work, "the engine makes no progress"
        assert_idle(self.core)
        for name in self.scripts.keys() - self.aborted:
            assert self.transcript.tokens(name) == self.scripts[name].expected
            self.transcript.answer(name)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=250, stateful_step_count=30)
