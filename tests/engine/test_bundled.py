"""The promise on the bundled checkpoint in float32, where two tokens may tie: every mismatch has to be shown to be a tie.

The requests are those of the losslessness suite, with every option at random; half of them ask what the model was trained to
answer. What they must answer is ``ar`` without pressure: one request at a time in the first workload, then eight.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from engine.messages import GenerateRequest
from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode, SamplingParams
from kernels.backend import select_kernels
from tests.engine.bundled import double_model, is_tie, question_prompts
from tests.engine.driver import drive
from tests.engine.oracle import Answer, context_of, next_token_logits, noisy_scores, processed
from tests.engine.real_text import FOLDER, real_text_language
from tests.engine.test_losslessness import BASE_SEED
from tests.engine.tiny import tiny_engine
from tests.engine.workload import Tally, Workload, make_workload, random_requests, run_plan, same

TIE, ROUNDING, CROWD = 1e-4, 1e-4, 5
NUM_WORKLOADS, NUM_REQUESTS = 8, 38
PLANS = ("linear", "tidar, 1 branch", "tidar, all branches", "auto, another plan at every step")


@dataclass
class Seen:
    """What all workloads met together."""

    tally: Tally
    num_answers: int = 0
    num_ties: int = 0


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen(Tally())


@pytest.fixture(scope="module")
def model() -> Transformer:
    config, device = read_model_config(FOLDER), torch.device("cpu")
    kernels = select_kernels("auto", device, torch.float32, config.num_kv_heads)
    return load_model(FOLDER, config, torch.float32, device, kernels=kernels)


@pytest.fixture(scope="module")
def exact_model() -> Transformer:
    return double_model()


def plainly(model: Transformer, requests: list[GenerateRequest], at_a_time: int) -> dict[str, Answer]:
    """The answers of ``ar``."""
    core = tiny_engine(model, page_size=64, max_num_seqs=at_a_time, grammars=real_text_language().compiler())
    transcript = drive(core, [replace(request, decoding=DecodingMode.AR) for request in requests])
    return {request.request_id: transcript.answer(request.request_id) for request in requests}


def make(model: Transformer, number: int) -> Workload:
    """Every other request asks a question that the model knows, and little turns its answer away."""
    rng, questions, language = random.Random(f"{BASE_SEED} bundled {number}"), question_prompts(), real_text_language()
    requests = random_requests(rng, language, "request", NUM_REQUESTS)
    for i in range(0, NUM_REQUESTS, 2):
        sampling = replace(requests[i].sampling, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0)
        requests[i] = replace(requests[i], prompt_token_ids=rng.choice(questions), sampling=sampling)
    return make_workload(rng, model, language, requests, lambda rs: plainly(model, rs, 1 if number == 0 else 8))


@pytest.mark.parametrize("number", range(NUM_WORKLOADS))
def test_every_exact_mode_equals_ar_or_the_mismatch_is_a_tie(
    number: int, model: Transformer, exact_model: Transformer, seen: Seen
) -> None:
    workload = make(model, number)
    for plan in PLANS:
        run = run_plan(random.Random(f"{BASE_SEED} bundled {number} {plan}"), workload, plan, CROWD)
        for request in workload.requests:
            given, expected = run.transcript.answer(request.request_id), workload.answers[request.request_id]
            if given.token_ids != expected.token_ids:
                pair = given.token_ids, expected.token_ids
                assert is_tie(exact_model, request, *pair, TIE), f"{plan}: {request} gives {pair[0]}, plainly {pair[1]}"
                seen.num_ties += 1
            else:
                assert same(given, expected, ROUNDING), f"{plan}: {request} gives\n{given}, plainly\n{expected}"
        seen.num_answers += len(workload.requests)
        seen.tally.count_run(plan, run)
    seen.tally.count_workload(workload)


def test_ties_are_counted_and_rare(seen: Seen, record_property: Callable[[str, object], None]) -> None:
    if seen.tally.workloads < NUM_WORKLOADS:
        pytest.skip("only some of the workloads were run")
    record_property("ties", seen.num_ties)
    print(f"bundled model in float32: {seen.num_ties} ties in {seen.num_answers} answers")
    assert seen.num_answers == len(PLANS) * NUM_WORKLOADS * NUM_REQUESTS
    assert seen.num_ties <= seen.num_answers // 100
    assert seen.tally.num_requests >= 300
    assert seen.tally.sums["accepted_7"] >= 100, "the drafts of a whole block are accepted"
    assert seen.tally.sums["num_preemptions"] >= 10
    assert min(seen.tally.options.values()) >= 10, f"{seen.tally.options}"


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 3, "frequency_penalty": 1.0}], ids=lambda o: next(iter(o))
)
def test_what_counts_as_a_tie_is_a_gap_of_the_raw_logits(exact_model: Transformer, options: dict[str, float]) -> None:
    prompt, sampling = question_prompts()[3], SamplingParams(4, seed=5, **options)  # type: ignore[arg-type]
    request = GenerateRequest("r", prompt, sampling)
    output = plainly(exact_model, [request], 1)["r"].token_ids
    context = context_of(exact_model, request, list(output[:2]), real_text_language().tokenizer)
    noisy = noisy_scores(
        processed(next_token_logits(exact_model, [*prompt, *output[:2]]), sampling, context), sampling, len(prompt) + 2
    )
    rival = sorted(range(len(noisy)), key=noisy.__getitem__)[-2]
    gap = (noisy[output[2]] - noisy[rival]) * (sampling.temperature or 1.0)
    other = (*output[:2], rival)
    assert is_tie(exact_model, request, output, other, 1.01 * gap)
    assert not is_tie(exact_model, request, output, other, 0.99 * gap)
    assert not is_tie(exact_model, request, output, output[:2], 100.0), "an answer that is cut short"
