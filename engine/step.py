"""The plain data that passes between the four lines of the loop: schedule, execute, judge, apply.

Words: ``n`` drafts, ``b`` branches, a block of ``k`` masks, ``L`` computed tokens (1-to-1 with the design of the step in
``docs/architecture.md``). A plan holds upper bounds only. What a step really does with them (how many drafts a request holds,
which branches it runs) is device state, so that a step can be launched before the host has read the one before it.

Plans and results are columns over the N requests of a step, so that the host's work for hundreds of them is a few array
operations. ``ScheduledRequest`` and ``RequestResult`` are their rows, for whoever builds or reads them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.grammar import Matcher
from engine.messages import TokenLogprobs
from engine.sampling_params import DecodingMode, SamplingParams

IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, order=True)
class DraftPlan:
    """Upper bounds of one request's decode rows: drafts, and branches of ``block_length`` masks.

    ``has_anchor``: a branch begins with one more row, a copy of the draft that it bets on, which sees the branch's masks.
    """

    num_drafts: int
    num_branches: int
    block_length: int
    has_anchor: bool = False

    @property
    def branch_rows(self) -> int:
        """Rows of one branch."""
        return self.block_length + self.has_anchor

    @property
    def num_rows(self) -> int:
        """Rows that the plan takes in a step."""
        return self.num_drafts + self.num_branches * self.branch_rows


NO_DRAFTS = DraftPlan(0, 0, 1)
"""The plan of a prefill chunk that does not reach the end of its prompt."""


class RequestShape(NamedTuple):
    """The bounds of one request's share, all that the rows of a step depend on.

    The first ``num_prompt_targets`` prefill rows need logits. ``has_anchor``: branches begin with a copy of their draft.
    """

    num_prefill: int
    num_drafts: int
    num_branches: int
    block_length: int
    has_anchor: bool = False
    num_prompt_targets: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """A request takes a slot: everything the device has to know about it.

    ``output_token_ids`` are what it has emitted before it was preempted. ``stop_token_ids`` are what ``min_tokens`` holds back.
    ``matcher`` is the one live object that a plan carries: the compiled grammar, at its start.
    """

    slot: int
    num_computed: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    mode: DecodingMode
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    matcher: Matcher | None = None
    request_id: str = ""

    @property
    def last_token_id(self) -> int:
        """The certain draft: the last token that is known."""
        return (self.output_token_ids or self.prompt_token_ids)[-1]

    @property
    def wanted(self) -> int:
        """Tokens that may still be emitted."""
        return self.sampling.max_tokens - len(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step.

    ``prefill_token_ids`` are computed causally at the positions after its computed tokens; drafts follow. ``max_computed`` is
    an upper bound of its computed tokens when the step starts, exact at loop depth 0 and while the prompt is computed.
    ``prompt_targets``, where prompt log-probabilities are asked for, are the tokens that follow the first prefill tokens.
    """

    slot: int
    prefill_token_ids: tuple[int, ...]
    draft_plan: DraftPlan
    max_computed: int
    prompt_targets: tuple[int, ...] = ()

    @property
    def shape(self) -> RequestShape:
        """The bounds alone."""
        plan, targets = self.draft_plan, len(self.prompt_targets)
        bounds = (plan.num_drafts, plan.num_branches, plan.block_length, plan.has_anchor)
        return RequestShape(len(self.prefill_token_ids), *bounds, targets)

    @property
    def num_rows(self) -> int:
        """Rows of this request in the step."""
        return len(self.prefill_token_ids) + self.draft_plan.num_rows


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What the scheduler hands over for one engine step. Admissions and page updates take effect before the forward.

    Columns over the N requests: ``slots`` [N], ``shapes`` [N, 6] (the fields of ``RequestShape``), ``max_computed`` [N].
    ``prefill_token_ids`` and ``prompt_targets`` are those of all requests, one after the other. ``page_updates`` [U, 3] are
    entries of block tables: slot, number of the page in the request, page id.
    """

    step_id: int
    slots: IntArray
    shapes: IntArray
    max_computed: IntArray
    prefill_token_ids: IntArray
    prompt_targets: IntArray
    admissions: tuple[Admission, ...]
    page_updates: IntArray

    @staticmethod
    def of(
        step_id: int,
        requests: Sequence[ScheduledRequest],
        admissions: Iterable[Admission] = (),
        page_updates: Iterable[tuple[int, int, int]] = (),
    ) -> StepPlan:
        """A plan from its rows."""
        return StepPlan(
            step_id,
            _integers(r.slot for r in requests),
            _integers(number for r in requests for number in r.shape).reshape(-1, len(RequestShape._fields)),
            _integers(r.max_computed for r in requests),
            _integers(token for r in requests for token in r.prefill_token_ids),
            _integers(token for r in requests for token in r.prompt_targets),
            tuple(admissions),
            _integers(number for update in page_updates for number in update).reshape(-1, 3),
        )

    @property
    def num_prefill(self) -> IntArray:
        """Prefill rows of each request, [N]."""
        return self.shapes[:, 0]

    @property
    def num_drafts(self) -> IntArray:
        """Bounds of the drafts, [N]."""
        return self.shapes[:, 1]

    @property
    def num_branches(self) -> IntArray:
        """Bounds of the branches, [N]."""
        return self.shapes[:, 2]

    @property
    def num_mask_rows(self) -> IntArray:
        """Bounds of the branches' rows, anchors included, [N]."""
        return self.shapes[:, 2] * (self.shapes[:, 3] + self.shapes[:, 4])

    @property
    def num_prompt_targets(self) -> IntArray:
        """How many of ``prompt_targets`` are each request's, [N]."""
        return self.shapes[:, 5]

    @property
    def num_rows(self) -> int:
        """Rows of the whole step."""
        return int(self.shapes[:, :2].sum() + self.num_mask_rows.sum())

    def requests(self) -> list[ScheduledRequest]:
        """The rows of the plan."""
        rows, prefill, targets = [], 0, 0
        for slot, shape, computed in zip(self.slots.tolist(), self.shapes.tolist(), self.max_computed.tolist(), strict=True):
            num_prefill, drafts, branches, block, anchor, num_targets = shape
            tokens = tuple(self.prefill_token_ids[prefill : prefill + num_prefill].tolist())
            following = tuple(self.prompt_targets[targets : targets + num_targets].tolist())
            rows.append(ScheduledRequest(slot, tokens, DraftPlan(drafts, branches, block, bool(anchor)), computed, following))
            prefill, targets = prefill + num_prefill, targets + num_targets
        return rows


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What the judge found for one scheduled request.

    ``token_ids`` are the ``a`` tokens that the step emits (none for a prefill chunk). ``num_drafts`` is how many drafts were
    really verified. ``num_held`` drafts are ready for the next step: 1 after a miss. ``num_committed`` drafts have their K/V
    in the cache: ``a`` of them in the exact modes. ``error`` ends the request alone.
    """

    token_ids: tuple[int, ...]
    num_drafts: int
    num_held: int
    num_committed: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """The judged step, read back by the host, in the order of its plan.

    Columns: ``counts`` [N, 4] are the tokens emitted, the drafts verified, held and committed (see ``RequestResult``);
    ``token_ids`` [N, K] has the emitted tokens in front. What few requests have is kept by their number in the plan.
    """

    step_id: int
    counts: IntArray
    token_ids: IntArray
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def of(step_id: int, requests: Sequence[RequestResult]) -> StepResult:
        """A result from its rows."""
        width = max((len(r.token_ids) for r in requests), default=0)
        tokens = [token for r in requests for token in (*r.token_ids, *[0] * (width - len(r.token_ids)))]
        counts = [n for r in requests for n in (len(r.token_ids), r.num_drafts, r.num_held, r.num_committed)]
        return StepResult(
            step_id,
            _integers(counts).reshape(-1, 4),
            _integers(tokens).reshape(len(requests), width),
            {i: r.logprobs for i, r in enumerate(requests) if r.logprobs},
            {i: r.prompt_logprobs for i, r in enumerate(requests) if r.prompt_logprobs},
            {i: r.error for i, r in enumerate(requests) if r.error is not None},
        )

    def requests(self) -> list[RequestResult]:
        """The rows of the result."""
        return [
            RequestResult(
                tuple(tokens[:emitted]),
                verified,
                held,
                committed,
                self.logprobs.get(i, ()),
                self.prompt_logprobs.get(i, ()),
                self.errors.get(i),
            )
            for i, ((emitted, verified, held, committed), tokens) in enumerate(
                zip(self.counts.tolist(), self.token_ids.tolist(), strict=True)
            )
        ]


def columns(num_rows: int, width: int) -> IntArray:
    """Zeros, [num_rows, width], one column after the other in memory, since they are read and written column by column."""
    return np.zeros((width, num_rows), dtype=np.int64).T


def spread(starts_N: IntArray, counts_N: IntArray) -> IntArray:
    """``starts[i], starts[i] + 1, ...``, ``counts[i]`` numbers for each ``i``, one after the other."""
    ends_N = counts_N.cumsum()
    numbers: IntArray = (starts_N - ends_N + counts_N).repeat(counts_N)
    numbers += np.arange(len(numbers))
    return numbers


def _integers(numbers: Iterable[int]) -> IntArray:
    return np.fromiter(numbers, dtype=np.int64)
