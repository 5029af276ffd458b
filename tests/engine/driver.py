"""Steps an engine until it has nothing left to do, and collects what each client would see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engine.core import EngineCore
from engine.decode.inputs import StepInputs
from engine.messages import FinishReason, GenerateRequest, RequestOutput
from engine.model_runner import ModelRunner
from tests.engine.oracle import Answer

MAX_STEPS = 5000


@dataclass
class Transcript:
    """The outputs of every request, in order."""

    outputs: dict[str, list[RequestOutput]] = field(default_factory=dict)

    def add(self, output: RequestOutput) -> None:
        earlier = self.outputs.setdefault(output.request_id, [])
        assert not earlier or earlier[-1].finish_reason is None, f"{output.request_id} speaks after its end"
        earlier.append(output)

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs.get(request_id, []) for token in output.token_ids)

    def answer(self, request_id: str) -> Answer:
        last = self.outputs[request_id][-1]
        assert last.finish_reason is not None, f"{request_id} has no end"
        assert last.error is None, last.error
        outputs = self.outputs[request_id]
        return Answer(
            self.tokens(request_id),
            last.finish_reason,
            last.stop_token_id,
            tuple(entry for output in outputs for entry in output.logprobs),
            tuple(entry for output in outputs for entry in output.prompt_logprobs),
        )


def drive(
    core: EngineCore,
    requests: Sequence[GenerateRequest],
    arrivals: Mapping[str, int] | None = None,
    aborts: Mapping[str, int] | None = None,
) -> Transcript:
    """Add each request before the step given by ``arrivals`` (default: the first), abort before that given by ``aborts``."""
    check_writes(core)
    transcript, pending = Transcript(), list(requests)
    arrivals, aborts = arrivals or {}, aborts or {}
    step = 0
    while core.has_work or pending:
        for request in [r for r in pending if arrivals.get(r.request_id, 0) <= step]:
            pending.remove(request)
            core.add(request)
        aborted = [name for name, when in aborts.items() if when == step]
        for name in aborted:
            core.abort(name)
        for output in core.step().outputs:
            assert output.finish_reason is not FinishReason.ERROR, output.error
            assert aborts.get(output.request_id, step + 1) > step, "an aborted request speaks"
            transcript.add(output)
        core.scheduler.check_integrity()
        step += 1
        assert step < MAX_STEPS, "the engine makes no progress"
    assert_idle(core)
    return transcript


def check_writes(core: EngineCore) -> None:
    """From now on, AssertionError where a step would keep K/V in a page that its request does not own."""
    if not isinstance(core.runner, ModelRunner):
        return
    execute = core.runner.execute

    def checked(inputs: StepInputs) -> Tensor | None:
        owned = {r.slot: {0, *core.scheduler.kv.page_ids(r.slot)} for r in core.scheduler.running}
        slots = inputs.slot_N[inputs.layout.request_R].tolist()
        for slot, page in zip(slots, (inputs.slot_mapping_R // core.info.page_size).tolist(), strict=True):
            # Nobody owns the null slot of a replayed step, whose rows write to the null page as all padding does.
            assert page in owned.get(slot, {0}), f"the request in slot {slot} writes to page {page}"
        return execute(inputs)

    core.runner.execute = checked  # type: ignore[method-assign]


def assert_idle(core: EngineCore) -> None:
    """No slot and no page stays behind."""
    scheduler = core.scheduler
    scheduler.check_integrity()
    assert not scheduler.requests
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_pages - 1, "a page leaked"
    assert len(scheduler.table.free_slots) == scheduler.config.max_num_seqs, "a slot leaked"
