"""``--batch-invariant`` on the GPU: the bundled model's log-probabilities in bfloat16 are equal floats in any batch."""

from __future__ import annotations

import pytest

from engine.messages import GenerateRequest
from engine.sampling_params import DecodingMode, SamplingParams
from tests.engine.bundled import PLANS, bundled_engine, question_prompts
from tests.engine.driver import drive
from tests.engine.oracle import Answer


def run(
    mode: DecodingMode, num_branches: int | None, seqs: int, *, depth: int = 0, invariant: bool = True, **options
) -> list[Answer]:
    core = bundled_engine(num_branches, depth, seqs, "bfloat16", "cuda", kernels="triton", batch_invariant=invariant, **options)
    requests = [
        GenerateRequest(str(i), prompt, SamplingParams(32, seed=i, temperature=i % 2, logprobs=20, prompt_logprobs=2), mode)
        for i, prompt in enumerate(question_prompts())
    ]
    transcript = drive(core, requests)
    return [transcript.answer(request.request_id) for request in requests]


@pytest.mark.parametrize("quantize_fp8", [False, True])
def test_every_mode_gives_the_same_bits_in_any_batch(quantize_fp8):
    alone = run(DecodingMode.AR, 1, 1, quantize_fp8=quantize_fp8)
    for mode, num_branches in (*PLANS.values(), (DecodingMode.AR, 1), (DecodingMode.AUTO, 1)):
        assert run(mode, num_branches, 16, quantize_fp8=quantize_fp8) == alone, mode


def test_captured_steps_do_so_too():
    """Requests without log-probabilities are replayed: their tokens have to be those of the others."""
    alone = [answer.token_ids for answer in run(DecodingMode.AR, 1, 1)]
    for mode, num_branches in PLANS.values():
        core = bundled_engine(num_branches, 1, 16, "bfloat16", "cuda", kernels="triton", batch_invariant=True)
        requests = [
            GenerateRequest(str(i), prompt, SamplingParams(32, seed=i, temperature=i % 2), mode)
            for i, prompt in enumerate(question_prompts())
        ]
        transcript = drive(core, requests)
        assert [transcript.tokens(request.request_id) for request in requests] == alone, mode
        assert core.graphs.num_replays > 0


def test_without_the_setting_bits_do_depend_on_the_batch():
    alone = run(DecodingMode.AR, 1, 1, invariant=False)
    together = run(DecodingMode.TIDAR, 1, 16, invariant=False)
    assert any(one.logprobs != other.logprobs for one, other in zip(alone, together, strict=True))
