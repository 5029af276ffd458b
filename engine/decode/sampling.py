"""The sampling parameters of rows of logits, gathered from the slots. What is done with them is in ``kernels``:
``process_logits`` and ``sampling``.

Every row is processed as if the tokens before it in the step had been emitted. Shape suffixes: R rows with logits, Q rows that
take a token, V vocabulary, K tokens that a row may take for emitted, W entries of the longest list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.input_batch import InputBatch, SamplingNeeds
from kernels.process_logits.metadata import GrammarRows, Penalties, RowSampling


@dataclass(frozen=True, slots=True)
class Ahead:
    """What each of Q rows takes for emitted beyond the slot's own tokens: ``num_Q`` tokens, the first of ``tokens_QK``.

    ``tokens_QK`` has no columns where the tokens are not known yet: then penalties do not count them.
    """

    num_Q: Tensor
    tokens_QK: Tensor


class DrawDrafts(Protocol):
    """Draws drafts from the rows ``place`` of logits [R, V]: their tokens and probabilities, [Q] each.

    ``number`` 1 is the first guess of a block.
    """

    def __call__(
        self,
        needs: SamplingNeeds,
        logits_RV: Tensor,
        place_Q: Tensor,
        slot_Q: Tensor,
        number_Q: Tensor,
        position_Q: Tensor,
        grammar: GrammarRows | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def row_sampling(
    batch: InputBatch, slot_Q: Tensor, needs: SamplingNeeds, ahead: Ahead, grammar: GrammarRows | None = None
) -> RowSampling:
    """The parameters of the rows' slots, with what each row takes for emitted."""
    noisy_Q = slot_Q if needs.noise else slot_Q[:0]
    return RowSampling(
        needs,
        batch.seed_S[noisy_Q],
        batch.temperature_S[noisy_Q],
        batch.top_k_S[noisy_Q],
        batch.top_p_S[noisy_Q],
        batch.min_p_S[noisy_Q],
        grammar,
        _banned(batch, slot_Q, ahead) if needs.min_tokens else None,
        (batch.biases.ids_SW[slot_Q], batch.biases.values_SW[slot_Q]) if needs.bias else None,
        _penalties(batch, slot_Q, ahead) if needs.penalties else None,
    )


def _banned(batch: InputBatch, slot_Q: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
    is_early = batch.wanted_S[slot_Q] - ahead.num_Q > batch.stop_at_S[slot_Q]
    # Not a product: zero times infinity is not a number.
    values_QW = batch.stops.values_SW[slot_Q].masked_fill(~is_early[:, None], 0.0)
    return batch.stops.ids_SW[slot_Q], values_QW


def _penalties(batch: InputBatch, slot_Q: Tensor, ahead: Ahead) -> Penalties:
    counts = batch.counts
    assert counts is not None, "a request with penalties made the counts"
    return Penalties(
        counts.in_prompt_SV[slot_Q],
        counts.ahead(slot_Q, ahead.tokens_QK, ahead.num_Q),
        batch.repetition_S[slot_Q],
        batch.frequency_S[slot_Q],
        batch.presence_S[slot_Q],
    )
