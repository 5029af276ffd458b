"""A step is launched without waiting for the device, whatever its requests ask for, and read when its event says so."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core import EngineCore
from engine.download import Download
from engine.messages import FinishReason, GenerateRequest
from engine.sampling_params import DecodingMode
from engine.step import StepPlan
from engine.upload import upload
from tests.engine.driver import Transcript, drive
from tests.engine.fake_capture import tensors_in
from tests.engine.pretended_gpu import DEVICE, DeviceTensor, PretendedGpu, WouldWaitError, pretended_gpu, to_device
from tests.engine.tiny import MAX_MODEL_LEN, tiny_engine, tiny_model
from tests.engine.vocabulary import TINY
from tests.engine.workload import by_diffusion, random_requests, same

LIMITS: dict[str, Any] = {"page_size": 4, "max_num_seqs": 4, "budget": 30, "depth": 1, "num_branches": 2}
FEW_PAGES = 2 + MAX_MODEL_LEN // 4


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu() as gpu:
        yield gpu


def rerun(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A capture; what a replay waits for is seen as well."""
    first = run()

    def replay() -> None:
        for old, new in zip(tensors_in(first), tensors_in(run()), strict=True):
            old.copy_(new)

    return first, replay


def engine_on_device(is_captured: bool, **limits: Any) -> EngineCore:
    model = copy.deepcopy(tiny_model("qwen3", 0, 1.0))
    to_device(model)
    return tiny_engine(model, **{**LIMITS, **limits}, capture=rerun if is_captured else None)


def run_strictly(
    gpu: PretendedGpu, core: EngineCore, requests: list[GenerateRequest], arrivals: Mapping[str, int]
) -> Transcript:
    """``drive``, which itself reads from the device."""
    schedule, transcript, pending, step = core.scheduler.schedule, Transcript(), list(requests), 0

    def scheduled() -> StepPlan | None:
        plan = schedule()
        gpu.is_draining = plan is None  # then there is nothing better to do than to wait
        return plan

    core.scheduler.schedule = scheduled  # type: ignore[method-assign]
    while core.has_work or pending:
        for request in [r for r in pending if arrivals[r.request_id] <= step]:
            pending.remove(request)
            core.add(request)
        gpu.is_strict = True
        outputs = core.step().outputs
        gpu.is_strict = False
        for output in outputs:
            assert output.finish_reason is not FinishReason.ERROR, output.error
            transcript.add(output)
        step += 1
    return transcript


def check_answers(transcript: Transcript, requests: list[GenerateRequest]) -> None:
    """They are those of the same engine on a CPU."""
    expected = drive(tiny_engine(tiny_model("qwen3", 0, 1.0), **LIMITS), requests)
    for request in requests:
        assert same(transcript.answer(request.request_id), expected.answer(request.request_id)), request


@pytest.mark.parametrize("is_captured", [False, True])
def test_no_step_waits_for_the_device_whatever_is_asked_for(gpu: PretendedGpu, is_captured: bool) -> None:
    rng = random.Random(7)
    requests = [replace(r, grammar=None) for r in random_requests(rng, TINY, "request", 14)]
    requests += [by_diffusion(r) for r in random_requests(rng, TINY, "lossy", 2)]
    wanted = [request.sampling for request in requests]
    assert all(any(getattr(s, name) is not None for s in wanted) for name in ("logprobs", "prompt_logprobs"))
    assert all(
        any(getattr(s, name) for s in wanted) for name in ("has_penalties", "logit_bias", "min_tokens", "top_k", "min_p")
    )
    # The lossy ones come when the others are nearly done: no step of theirs is replayed.
    arrivals = {r.request_id: rng.randrange(20) + 40 * (r.decoding is DecodingMode.DIFFUSION) for r in requests}
    core = engine_on_device(is_captured, num_pages=FEW_PAGES)
    transcript = run_strictly(gpu, core, requests, arrivals)
    stats = core.scheduler.stats()
    assert not gpu.waits, "the host waited for the step that it had just launched"
    assert stats.num_preemptions > 0
    assert (dict(stats.launches).get("replayed", 0) > 10) == is_captured
    check_answers(transcript, requests)


def test_a_grammar_waits_once_a_step_and_once_for_drafts_drawn_again(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(8)
    requests = random_requests(rng, TINY, "request", 9)
    assert 2 < sum(r.grammar is not None for r in requests) < 7
    core = engine_on_device(is_captured=False)
    follow, num_followed = core.decoder.grammars.follow, 0

    def counted(*args: Any) -> None:
        nonlocal num_followed
        num_followed += 1
        follow(*args)

    monkeypatch.setattr(core.decoder.grammars, "follow", counted)
    transcript = run_strictly(gpu, core, requests, dict.fromkeys((r.request_id for r in requests), 0))
    redraws = [frames for frames in gpu.waits if "resample" in frames]
    assert all("follow" in frames for frames in gpu.waits)
    assert len(gpu.waits) - len(redraws) == num_followed > 10
    assert redraws, "no grammar forbade a draft"
    check_answers(transcript, requests)


def device_numbers(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=DEVICE).view(shape)


WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a number into an element": lambda t, i: t.__setitem__(1, 5),
    "a number into an element of two indices": lambda t, i: t[None].__setitem__((0, 1), 5),
    "a number into gathered elements": lambda t, i: t.__setitem__(i, 5),
    "item": lambda t, i: t[0].item(),
    "int": lambda t, i: int(t[0]),
    "bool": lambda t, i: bool((t > 1).any()),
    "tolist": lambda t, i: t.tolist(),
    "numpy": lambda t, i: t.numpy(),
    "cpu": lambda t, i: t.cpu(),
    "to the host": lambda t, i: t.to("cpu", non_blocking=True),
    "into pageable memory": lambda t, i: torch.empty(4, dtype=torch.long).copy_(t, non_blocking=True),
    "into pinned memory at once": lambda t, i: torch.empty(4, dtype=torch.long, pin_memory=True).copy_(t),
    "a tensor of Python's numbers": lambda t, i: torch.tensor([1, 2], device=DEVICE),
    "from pageable memory": lambda t, i: torch.zeros(4).to(DEVICE, non_blocking=True),
    "from pinned memory at once": lambda t, i: torch.zeros(4).pin_memory().to(DEVICE),
    "into a tensor from pageable memory": lambda t, i: t.copy_(torch.zeros(4)),
    "a boolean index": lambda t, i: t[t > 1],
    "a boolean index to write": lambda t, i: t.__setitem__(t > 1, t.new_zeros(())),
    "an index of the host": lambda t, i: t[torch.zeros(1, dtype=torch.long)],
    "a tensor of the host": lambda t, i: t + torch.ones(4),
    "nonzero": lambda t, i: t.nonzero(),
    "masked_select": lambda t, i: t.masked_select(t > 1),
    "unique": lambda t, i: t.unique(),
    "repeat_interleave": lambda t, i: t.repeat_interleave(t),
    "equal": lambda t, i: torch.equal(t, t),
}


@pytest.mark.parametrize("operation", WAITS.values(), ids=WAITS)
def test_the_lint_finds_what_waits(gpu: PretendedGpu, operation: Callable[[Tensor, Tensor], object]) -> None:
    numbers, index = device_numbers(4), device_numbers(2)
    operation(numbers, index)
    gpu.is_strict = True
    with pytest.raises(WouldWaitError):
        operation(numbers, index)


def test_what_does_not_wait_is_left_alone(gpu: PretendedGpu) -> None:
    gpu.is_strict = True
    numbers, index = upload([5, 6, 7, 8], DEVICE), upload([0, 3], DEVICE)
    numbers[1:3] = 0
    numbers[index] = numbers[index] + 1
    numbers.index_fill_(0, index[:1], 9)
    assert isinstance(numbers.repeat_interleave(2) + torch.tensor(1), DeviceTensor)
    copies = Download(numbers, numbers[:2].double())
    early = copies._copies[0].tolist()
    numbers.zero_()
    read = copies.read()
    gpu.is_strict = False
    assert [part.tolist() for part in read] == [[9, 0, 0, 9], [9.0, 0.0]]
    assert early != [9, 0, 0, 9], "what is read too early must show"
    assert not gpu.waits, "something was launched behind the copies"
    Download(numbers).read()
    assert not gpu.waits
    gpu.is_strict = True
    Download(numbers).read()
    assert [frames.count("read") for frames in gpu.waits] == [1]
