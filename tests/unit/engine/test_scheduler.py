"""Who is scheduled, with which bounds, and what the scheduler makes of a judged step."""

from __future__ import annotations

from engine.config import DecodeConfig, SchedulerConfig
from engine.decode.policy import policies
from engine.kv_cache_manager import KVCacheManager
from engine.messages import FinishReason, GenerateRequest, RequestOutput, StepOutputs
from engine.page_pool import PagePool
from engine.sampling_params import DecodingMode, SamplingParams
from engine.scheduler import Scheduler
from engine.step import DraftPlan, RequestResult, StepPlan, StepResult

K, EOS = 4, 50


def make(num_pages: int = 50, page_size: int = 4, seqs: int = 4, budget: int = 100, branches: int = 1) -> Scheduler:
    kv = KVCacheManager(PagePool(num_pages), page_size, seqs)
    config = DecodeConfig(DecodingMode.TIDAR, None, branches)
    return Scheduler(SchedulerConfig(seqs, budget), kv, policies(config, K, budget), (EOS,), 60)


def ask(
    name: str, length: int, wanted: int = 20, mode: DecodingMode = DecodingMode.TIDAR, **sampling: object
) -> GenerateRequest:
    first = 100 * (1 + ord(name[0]))
    params = SamplingParams(wanted, **sampling)  # type: ignore[arg-type]
    return GenerateRequest(name, tuple(range(first, first + length)), params, mode)


def plan_of(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check_integrity()
    return plan


def names(scheduler: Scheduler, plan: StepPlan) -> list[str]:
    """Whose the rows of a plan are."""
    by_slot = {r.slot: r.request_id for r in scheduler.running}
    return [by_slot[slot] for slot in plan.slots.tolist()]


def shares(scheduler: Scheduler, plan: StepPlan) -> dict[str, tuple[int, int, int]]:
    """Prefill tokens, drafts and branches of each request."""
    return dict(zip(names(scheduler, plan), map(tuple, plan.shapes[:, :3].tolist()), strict=True))


def apply(scheduler: Scheduler, plan: StepPlan, **results: tuple[tuple[int, ...], int]) -> list[RequestOutput]:
    """Results by request: the tokens emitted, and the drafts held afterwards."""
    judged = []
    for name, num_drafts in zip(names(scheduler, plan), plan.num_drafts.tolist(), strict=True):
        token_ids, held = results.get(name, ((), 1))
        judged.append(RequestResult(token_ids, num_drafts, held, len(token_ids)))
    others, tokens = scheduler.apply(plan, StepResult.of(plan.step_id, judged))
    scheduler.check_integrity()
    return list(StepOutputs(scheduler.stats(), tuple(others), tokens).outputs)


def test_a_short_prompt_is_computed_and_redrafted_in_one_step() -> None:
    scheduler = make()
    scheduler.add(ask("a", 6))
    plan = plan_of(scheduler)
    assert shares(scheduler, plan) == {"a": (5, 1, 1)}
    first, sampling = ask("a", 6).prompt_token_ids, ask("a", 6).sampling
    (share,) = plan.requests()
    assert share.prefill_token_ids == first[:5]
    slot = share.slot
    (admission,) = plan.admissions
    assert (admission.slot, admission.num_computed, admission.last_token_id, admission.wanted) == (slot, 0, first[5], 20)
    assert (admission.prompt_token_ids, admission.output_token_ids, admission.sampling) == (first, (), sampling)
    pages = scheduler.kv.page_ids(slot)
    assert plan.page_updates.tolist() == [[slot, number, page] for number, page in enumerate(pages)]


def test_a_long_prompt_is_computed_in_chunks() -> None:
    scheduler = make(budget=7)
    scheduler.add(ask("a", 18))
    seen = []
    for _ in range(3):
        plan = plan_of(scheduler)
        seen.append(shares(scheduler, plan)["a"])
        apply(scheduler, plan, a=((1,), 1) if plan.num_drafts[0] else ((), 1))
    # 17 tokens and the certain draft; a branch of 4 masks no longer fits beside them.
    assert seen == [(7, 0, 0), (7, 0, 0), (3, 1, 0)]


def test_running_requests_come_first_and_rows_never_exceed_the_budget() -> None:
    scheduler = make(budget=12)
    scheduler.add(ask("a", 3))
    plan = plan_of(scheduler)
    scheduler.add(ask("b", 30))
    apply(scheduler, plan, a=((1,), K))
    plan = plan_of(scheduler)
    assert shares(scheduler, plan) == {"a": (0, 4, 1), "b": (4, 0, 0)}
    assert plan.num_rows == 12


def test_a_budget_too_small_for_branches_drops_them_before_the_drafts() -> None:
    scheduler = make(budget=5, branches=K)
    scheduler.add(ask("a", 1))
    plan = plan_of(scheduler)
    assert shares(scheduler, plan) == {"a": (0, 1, 1)}
    apply(scheduler, plan, a=((1,), K))
    assert shares(scheduler, plan_of(scheduler)) == {"a": (0, 4, 0)}


def test_every_running_request_gets_a_row_when_the_budget_is_as_small_as_it_may_be() -> None:
    scheduler = make(seqs=2, budget=2)
    for name in "ab":
        scheduler.add(ask(name, 1, mode=DecodingMode.AR))
    assert shares(scheduler, plan_of(scheduler)) == {"a": (0, 1, 0), "b": (0, 1, 0)}


def test_drafts_of_the_oldest_never_take_the_row_of_another_request() -> None:
    scheduler = make(seqs=4, budget=8, branches=4)
    for name in "abcd":
        scheduler.add(ask(name, 2, mode=DecodingMode.TIDAR))
    served: dict[str, int] = dict.fromkeys("abcd", 0)
    for _ in range(12):
        plan = plan_of(scheduler)
        if len(scheduler.running) == 4 and not plan.admissions:
            assert set(shares(scheduler, plan)) == set("abcd")
        for name in shares(scheduler, plan):
            served[name] += 1
        apply(scheduler, plan, **{name: ((7,), K) for name, (_, drafts, _) in shares(scheduler, plan).items() if drafts})
    assert min(served.values()) >= 8


def test_drafts_of_running_requests_do_not_keep_a_waiting_one_out() -> None:
    scheduler = make(seqs=4, budget=20, branches=4)
    scheduler.add(ask("a", 2))
    plan = plan_of(scheduler)
    apply(scheduler, plan, a=((7,), K))
    assert shares(scheduler, plan_of(scheduler)) == {"a": (0, K, 4)}, "alone, it takes all rows"
    scheduler = make(seqs=4, budget=20, branches=4)
    scheduler.add(ask("a", 2))
    apply(scheduler, plan_of(scheduler), a=((7,), K))
    scheduler.add(ask("b", 3))
    assert set(shares(scheduler, plan_of(scheduler))) == {"a", "b"}


def test_requests_wait_for_a_slot_in_the_order_of_their_arrival() -> None:
    scheduler = make(seqs=2)
    for name in "abc":
        scheduler.add(ask(name, 3, wanted=1))
    plan = plan_of(scheduler)
    assert list(shares(scheduler, plan)) == ["a", "b"]
    outputs = apply(scheduler, plan, a=((1,), 1), b=((2,), 1))
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH] * 2
    assert list(shares(scheduler, plan_of(scheduler))) == ["c"]


def test_pages_of_rejected_drafts_are_kept_until_somebody_needs_them() -> None:
    scheduler = make(num_pages=1 + 9, page_size=1)
    scheduler.add(ask("a", 1, wanted=30))
    apply(scheduler, plan_of(scheduler), a=((1,), K))
    plan = plan_of(scheduler)
    assert shares(scheduler, plan) == {"a": (0, 4, 1)}
    kv, slot = scheduler.kv, scheduler.running[0].slot
    before = kv.page_ids(slot).copy()
    assert len(before) == 1 + 4
    apply(scheduler, plan, a=((2, 3), 1))
    assert (kv.page_ids(slot), kv.num_computed_S[slot]) == (before, 3)
    # One page is free beside the kept ones that the redraft does not need: only together are they enough.
    scheduler.add(ask("b", 4))
    plan = plan_of(scheduler)
    assert set(shares(scheduler, plan)) == {"a", "b"}
    assert kv.page_ids(slot) == before[:4], "pages of exact K/V, and those that a launched step writes to, stay"
    assert scheduler.counters.num_preemptions == 0


def test_a_request_that_needs_pages_takes_those_that_others_keep_before_its_drafts_are_cut() -> None:
    scheduler = make(num_pages=1 + 9, page_size=1)
    for name in "ab":
        scheduler.add(ask(name, 1, wanted=30))
    apply(scheduler, plan_of(scheduler), a=((1,), 1), b=((2,), K))
    apply(scheduler, plan_of(scheduler), a=((1,), K), b=((3,), 1))
    assert [len(scheduler.kv.page_ids(r.slot)) for r in scheduler.running] == [2, 5], "b keeps three pages"
    assert scheduler.kv.pool.num_free == 2
    assert shares(scheduler, plan_of(scheduler)) == {"a": (0, 4, 1), "b": (0, 1, 1)}
    assert scheduler.counters.num_preemptions == 0


def test_drafts_are_cut_to_the_pages_at_hand_before_anyone_is_preempted() -> None:
    scheduler = make(num_pages=5, page_size=4)
    scheduler.add(ask("a", 6, wanted=30))
    scheduler.add(ask("b", 7, wanted=30))
    apply(scheduler, plan_of(scheduler), a=((1,), K), b=((2,), K))
    assert scheduler.kv.pool.num_free == 0
    plan = plan_of(scheduler)
    # Both pages of a end at position 8: of its 4 drafts from position 6 on, two fit.
    assert shares(scheduler, plan) == {"a": (0, 2, 1), "b": (0, 1, 1)}
    assert scheduler.counters.num_preemptions == 0


def at_the_end_of_their_pages() -> Scheduler:
    """Two running requests that have filled all pages, and a third that waits."""
    scheduler = make(num_pages=5, page_size=4, seqs=2)
    for name, length in (("a", 7), ("b", 7), ("c", 1)):
        scheduler.add(ask(name, length, wanted=30))
    for token in (1, 2):
        apply(scheduler, plan_of(scheduler), a=((token,), K), b=((token,), K))
    assert [r.request_id for r in scheduler.waiting] == ["c"]
    return scheduler


def test_the_newest_request_is_preempted_and_comes_back_with_all_its_tokens() -> None:
    scheduler = at_the_end_of_their_pages()
    plan = plan_of(scheduler)
    assert shares(scheduler, plan) == {"a": (0, 4, 1)}
    assert scheduler.counters.num_preemptions == 1
    assert [r.request_id for r in scheduler.waiting] == ["b", "c"], "it waits at the front"
    (output,) = apply(scheduler, plan, a=((EOS,), 1))
    assert output.finish_reason is FinishReason.STOP
    plan = plan_of(scheduler)
    first = plan.admissions[0]
    assert names(scheduler, plan)[0] == "b"
    assert (first.last_token_id, first.wanted) == (2, 28)
    assert first.num_computed + plan.num_prefill[0] == 8
    assert shares(scheduler, plan)["b"][1:] == (1, 1), "the drafts that it held are gone"
    assert scheduler.counters.prompt_tokens == 7 + 7 + 1, "a prompt is counted once"


def test_a_request_waits_until_its_prompt_and_one_token_have_room() -> None:
    for length, admitted in ((7, ["a", "b"]), (8, ["a"])):
        scheduler = make(num_pages=5, page_size=4)
        scheduler.add(ask("a", 7))
        scheduler.add(ask("b", length))
        assert list(shares(scheduler, plan_of(scheduler))) == admitted


def test_tokens_after_the_stop_token_are_dropped() -> None:
    scheduler = make()
    scheduler.add(ask("a", 3, stop_token_ids=(7,)))
    apply(scheduler, plan_of(scheduler), a=((1,), K))
    (output,) = apply(scheduler, plan_of(scheduler), a=((5, 7, 8, 9), K))
    assert output.token_ids == (5, 7)
    assert (output.finish_reason, output.stop_token_id) == (FinishReason.STOP, 7)
    assert not scheduler.has_work


def test_ignore_eos_leaves_stop_ids_in_force() -> None:
    scheduler = make()
    scheduler.add(ask("a", 3, stop_token_ids=(7,), ignore_eos=True))
    (output,) = apply(scheduler, plan_of(scheduler), a=((EOS,), 1))
    assert output.finish_reason is None
    (output,) = apply(scheduler, plan_of(scheduler), a=((7,), 1))
    assert output.finish_reason is FinishReason.STOP


def test_a_stop_token_at_the_length_limit_is_a_stop() -> None:
    scheduler = make()
    scheduler.add(ask("a", 3, wanted=1))
    (output,) = apply(scheduler, plan_of(scheduler), a=((EOS,), 1))
    assert (output.finish_reason, output.stop_token_id) == (FinishReason.STOP, EOS)


def test_max_tokens_is_exact() -> None:
    scheduler = make()
    scheduler.add(ask("a", 3, wanted=3))
    apply(scheduler, plan_of(scheduler), a=((1,), K))
    plan = plan_of(scheduler)
    assert shares(scheduler, plan) == {"a": (0, 2, 0)}, "two tokens are wanted and no draft after them"
    (output,) = apply(scheduler, plan, a=((2, 3), 1))
    assert (output.token_ids, output.finish_reason) == ((2, 3), FinishReason.LENGTH)


def test_aborting_frees_slot_and_pages_whether_it_runs_or_waits() -> None:
    scheduler = make(seqs=1)
    scheduler.add(ask("a", 3))
    scheduler.add(ask("b", 3))
    plan_of(scheduler)
    for name in ("b", "a", "unknown"):
        scheduler.abort(name)
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.kv.pool.usage == 0.0
    assert scheduler.schedule() is None


def test_a_request_that_can_never_run_is_answered_with_the_reason() -> None:
    scheduler = make()
    scheduler.add(ask("a", 0))
    scheduler.add(ask("b", 41))
    scheduler.add(ask("c", 40))
    scheduler.add(ask("c", 4))
    reasons = [(output.request_id, output.error) for output in scheduler.take_rejected()]
    assert reasons == [
        ("a", "the prompt is empty: send at least one token"),
        (
            "b",
            "the prompt has 41 tokens and 20 more are wanted, but the context holds 60: shorten the prompt or lower max_tokens",
        ),
        ("c", "the request id 'c' is in use"),
    ]
    assert scheduler.take_rejected() == []
    assert scheduler.has_work


def test_a_mode_that_the_checkpoint_lacks_is_refused() -> None:
    kv = KVCacheManager(PagePool(10), 4, 64)
    scheduler = Scheduler(SchedulerConfig(), kv, policies(DecodeConfig(DecodingMode.AR), None, 1024), (), 60)
    scheduler.add(ask("a", 3))
    assert scheduler.take_rejected()[0].error == "this checkpoint cannot decode in mode 'tidar'"


def test_linear_drafts_and_verifies_in_turn() -> None:
    scheduler = make(branches=K)
    scheduler.add(ask("a", 1, mode=DecodingMode.LINEAR))
    seen = []
    for held in (K, 1, K, 1):
        plan = plan_of(scheduler)
        seen.append(plan.requests()[0].draft_plan)
        apply(scheduler, plan, a=((1,), held))
    assert seen == [DraftPlan(1, 1, K), DraftPlan(K, 0, K)] * 2
