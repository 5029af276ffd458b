"""What a CPU can only pretend: a whole run without a wait, and logits in memory that a captured step has borrowed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from engine.cuda_graphs import borrow
from engine.sampling_params import DecodingMode
from tests.engine.bundled import bundled_engine, question_prompts, requests_for
from tests.engine.driver import drive
from tests.gpu.waiting import no_waiting

EVERYTHING: dict[str, Any] = {
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "min_tokens": 3,
    "logit_bias": ((9, 1.0), (11, -3.0)),
    "logprobs": 5,
}


def mixed_requests(seed: int = 0):
    """Some plain, some with every option, in every exact mode."""
    rng = random.Random(seed)
    modes = (DecodingMode.AR, DecodingMode.LINEAR, DecodingMode.TIDAR)
    for request in requests_for(question_prompts(), 0.8, DecodingMode.TIDAR):
        sampling = dataclasses.replace(request.sampling, **rng.choice(({}, EVERYTHING, {"logprobs": 0})))
        yield dataclasses.replace(request, sampling=sampling, decoding=rng.choice(modes))


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_a_run_with_admissions_prompts_and_every_option_never_waits_for_the_device(enforce_eager):
    core = bundled_engine(2, 1, 6, dtype="bfloat16", device="cuda", kernels="triton", enforce_eager=enforce_eager)
    with no_waiting():
        for request in mixed_requests():
            core.add(request)
        while core.has_work:
            core.step()
    assert enforce_eager or core.graphs.num_replays > 10


def test_once_warm_a_run_takes_no_memory_from_the_driver():
    """Tensors of a step come from what torch's allocator keeps."""
    core = bundled_engine(2, 1, 6, dtype="bfloat16", device="cuda", kernels="triton")
    taken = []
    for _ in range(2):
        drive(core, list(mixed_requests()))
        taken.append(torch.cuda.memory_stats()["num_device_alloc"])
    assert taken[0] == taken[1]


def test_log_probabilities_behind_a_replayed_step_are_those_of_an_uncaptured_one():
    requests = list(mixed_requests(1))
    both = [
        drive(bundled_engine(2, 1, 6, dtype="float64", device="cuda", enforce_eager=eager), requests) for eager in (True, False)
    ]
    for request in requests:
        eager, replayed = (transcript.answer(request.request_id) for transcript in both)
        assert replayed.token_ids == eager.token_ids
        assert len(replayed.logprobs) == (0 if request.sampling.logprobs is None else len(replayed.token_ids))
        for one, other in zip(replayed.logprobs, eager.logprobs, strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_borrowed_memory_is_that_of_the_tensor(dtype, device):
    tensor = torch.arange(24, device=device).view(4, 6).to(dtype)
    borrowed = borrow(tensor)
    assert (borrowed.data_ptr(), borrowed.dtype, borrowed.shape) == (tensor.data_ptr(), dtype, tensor.shape)
    assert torch.equal(borrowed, tensor)
    tensor[2, 3] = 77
    assert borrowed[2, 3] == 77
    before = torch.cuda.memory_allocated(device)
    del tensor
    assert torch.cuda.memory_allocated(device) < before, "borrowing keeps nothing"
