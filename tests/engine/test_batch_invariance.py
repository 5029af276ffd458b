"""``--batch-invariant``: every exact mode, alone and in any batch, gives the same bits.

Log-probabilities are a continuous function of the logits, so that equal floats are all but equal logits. The bundled model in
float32 answers random requests with all their options, first each alone by plain decoding with its whole prompt in one step,
then all of them in every plan: with strangers, in engines whose limits cut prompts into chunks and preempt.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from engine.messages import GenerateRequest
from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode
from kernels.backend import Kernels, select_kernels
from tests.engine.bundled import FOLDER
from tests.engine.driver import drive
from tests.engine.oracle import Answer
from tests.engine.real_text import real_text_language
from tests.engine.tiny import tiny_engine
from tests.engine.workload import PLANS, Tally, Workload, make_workload, random_requests, run_plan

BASE_SEED = int(os.environ.get("TIDAR_TEST_SEED", "0"))
CPU = torch.device("cpu")
WORKLOADS, NUM_REQUESTS = 9, 12


def kernels(batch_invariant: bool) -> Kernels:
    return select_kernels("auto", CPU, torch.float32, 2, batch_invariant)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model(FOLDER, read_model_config(FOLDER), torch.float32, CPU, kernels=kernels(batch_invariant=True))


@pytest.fixture(scope="module")
def tallies() -> defaultdict[str, Tally]:
    return defaultdict(Tally)


def with_logprobs(request: GenerateRequest) -> GenerateRequest:
    """Those of the prompt not always: a prompt that is asked about is never shared."""
    of_prompt = 3 if len(request.prompt_token_ids) % 3 == 0 else None
    return replace(request, sampling=replace(request.sampling, logprobs=20, prompt_logprobs=of_prompt))


def alone(model: Transformer, request: GenerateRequest) -> Answer:
    """Plain decoding of one request in an engine of its own."""
    compiler = real_text_language().compiler()
    core = tiny_engine(model, grammars=compiler, max_num_seqs=1, budget=512, prefix_caching=False, mode=DecodingMode.AR)
    return drive(core, [replace(request, decoding=DecodingMode.AR)]).answer(request.request_id)


def workload_of(rng: random.Random, model: Transformer, count: int) -> Workload:
    """Random requests, and what each is answered alone."""
    language = real_text_language()
    requests = [with_logprobs(request) for request in random_requests(rng, language, "request", count)]
    return make_workload(rng, model, language, requests, lambda rs: {r.request_id: alone(model, r) for r in rs})


@pytest.mark.parametrize("number", range(WORKLOADS), ids=lambda n: f"w{n:02}")
def test_every_mode_gives_the_same_bits_in_any_batch(number: int, model: Transformer, tallies: dict[str, Tally]) -> None:
    rng = random.Random(f"{BASE_SEED} invariance {number}")
    workload = workload_of(rng, model, NUM_REQUESTS)
    for plan in PLANS:
        run = run_plan(random.Random(f"{BASE_SEED} invariance {number} {plan}"), workload, plan)
        for request in workload.requests:
            given, expected = run.transcript.answer(request.request_id), workload.answers[request.request_id]
            assert given == expected, f"{plan}: {request} gives\n{given}, and alone\n{expected}"
        tallies["all"].count_run(plan, run)
    tallies["all"].count_workload(workload)


def test_the_workloads_met_what_they_are_about(tallies: dict[str, Tally]) -> None:
    tally = tallies["all"]
    if tally.workloads != WORKLOADS:
        pytest.skip("only some of the workloads were run")
    assert tally.num_requests >= 100
    rare = {name: tally.sums[name] for name in ("num_preemptions", "chunks", "prefix_cache_hits", "branch_hits", "accepted_4")}
    assert min(rare.values()) >= 20, rare


def test_without_the_setting_bits_do_depend_on_the_batch() -> None:
    """Otherwise the tests above would show nothing."""
    model = load_model(FOLDER, read_model_config(FOLDER), torch.float32, CPU, kernels=kernels(batch_invariant=False))
    rng = random.Random(f"{BASE_SEED} invariance")
    workload = workload_of(rng, model, 4)
    run = run_plan(rng, workload, "tidar, 1 branch")
    assert any(run.transcript.answer(name).logprobs != answer.logprobs for name, answer in workload.answers.items())
