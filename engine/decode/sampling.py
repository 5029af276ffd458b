"""The sampling parameters of rows of logits, gathered from the slots. What is done with them is in ``kernels``:
``process_logits`` and ``sampling``.

Every row is processed as if the tokens before it in the step had been emitted. Shape suffixes: R rows with logits, Q rows that
take a token, V vocabulary, K tokens that a row may take for emitted, W entries of the longest list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.input_batch import InputBatch, SamplingNeeds
from kernels.gather import reference
from kernels.process_logits.metadata import GrammarRows, Penalties, RowSampling

Gather = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Ahead:
    """What each of Q rows takes for emitted beyond the slot's own tokens: the first ``num_Q`` of its slot's ``tokens_SK``.

    None where the tokens are not known yet: then penalties do not count them.
    """

    num_Q: Tensor
    tokens_SK: Tensor | None


class DrawDrafts(Protocol):
    """Draws drafts from the rows ``place`` of logits [R, V]: their tokens and probabilities, [Q] each.

    ``guess`` 0 is the first of a block.
    """

    def __call__(
        self,
        needs: SamplingNeeds,
        logits_RV: Tensor,
        place_Q: Tensor,
        slot_Q: Tensor,
        guess_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def row_sampling(
    batch: InputBatch,
    slot_Q: Tensor,
    needs: SamplingNeeds,
    ahead: Ahead,
    grammar: GrammarRows | None = None,
    gather: Gather = reference.gather,
) -> RowSampling:
    """The parameters of the rows' slots, with what each row takes for emitted."""
    columns = (batch.seed_S, batch.temperature_S, batch.top_k_S, batch.top_p_S, batch.min_p_S)
    seed, temperature, top_k, top_p, min_p = gather(columns, slot_Q) if needs.noise else (column[:0] for column in columns)
    return RowSampling(
        needs,
        seed,
        temperature,
        top_k,
        top_p,
        min_p,
        grammar,
        _banned(batch, slot_Q, ahead) if needs.min_tokens else None,
        (batch.biases.ids_SW[slot_Q], batch.biases.values_SW[slot_Q]) if needs.bias else None,
        _penalties(batch, slot_Q, ahead, gather) if needs.penalties else None,
    )


def _banned(batch: InputBatch, slot_Q: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
    is_early = batch.wanted_S[slot_Q] - ahead.num_Q > batch.stop_at_S[slot_Q]
    # Not a product: zero times infinity is not a number.
    values_QW = batch.stops.values_SW[slot_Q].masked_fill(~is_early[:, None], 0.0)
    return batch.stops.ids_SW[slot_Q], values_QW


def _penalties(batch: InputBatch, slot_Q: Tensor, ahead: Ahead, gather: Gather) -> Penalties:
    counts, tokens_SK = batch.counts, ahead.tokens_SK
    assert counts is not None, "a request with penalties made the counts"
    tokens_QK = slot_Q.new_empty((len(slot_Q), 0)) if tokens_SK is None else tokens_SK[slot_Q]
    return Penalties(
        counts.in_prompt_SV[slot_Q],
        counts.ahead(slot_Q, tokens_QK, ahead.num_Q),
        *gather((batch.repetition_S, batch.frequency_S, batch.presence_S), slot_Q),
    )
