"""What the rows of a step are made of, and what they are.

Shape suffixes: N requests of the step, R rows, D verifying rows (drafts), B branches at most, K block length at most, P pages
of the longest request, W masks of a block that draft, Q = N * W of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

ANCHOR = -1
"""The number in its block of an anchor's row, which stands before mask 0."""

REQUEST_FIELDS = 8
"""Integers of a request in ``StepLayout.requests_N8``: first row, rows, first prefill token, first verifying row, and of its
shape prefill tokens, drafts, block length and whether there is an anchor."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The rows of one combination of shapes: index tensors, and the same as a few integers of each request.

    ``row_starts``: where each request's rows begin, and their end; ``device_row_starts`` are the same numbers on the device.
    ``most_rows``: of one request. ``request_R``: the request (in plan order) of a row. ``clean_R``: whether it is a clean row;
    ``index_R``: its number within the request. ``rank_R``, ``in_block_R``: for a branch's row, the branch's rank and its own
    number in the block, ``ANCHOR`` before mask 0. ``has_anchor_N``: which requests have anchors. ``prefill_rows``,
    ``verify_rows_D`` and ``draft_rows`` (all rows of branches) are row numbers. ``verify_request_D``, ``verify_index_D``: the
    request and the draft number of a verifying row; ``verify_starts``: where each request's begin among them. ``masks_NBK``:
    where in the logits the masks of a branch stand; without ``first_masks``, mask 0 has none. ``guess_Q``: the numbers of the
    guesses that a branch makes of the next block, 0 for the token of mask 1. ``prompt_logits``: where those of the prompt
    begin. ``logit_rows``: rows that need logits: verifying ones, masks, prompt; None: all rows, in their order.
    """

    row_starts: tuple[int, ...]
    device_row_starts: Tensor
    requests_N8: Tensor
    num_rows: int
    most_rows: int
    max_drafts: int
    max_branches: int
    max_block: int
    request_R: Tensor
    clean_R: Tensor
    index_R: Tensor
    rank_R: Tensor
    in_block_R: Tensor
    has_anchor_N: Tensor
    prefill_rows: Tensor
    verify_rows_D: Tensor
    verify_request_D: Tensor
    verify_index_D: Tensor
    verify_starts: tuple[int, ...]
    draft_rows: Tensor
    masks_NBK: Tensor
    guess_Q: Tensor
    prompt_logits: int
    logit_rows: Tensor | None
    num_prefill_N: Tensor
    block_length_N: Tensor

    @property
    def num_guesses(self) -> int:
        """Tokens that a branch guesses of the next block: all but that of mask 0. W of the shapes."""
        return self.max_block - 1 if self.max_branches else 0


class StepRows(NamedTuple):
    """Rows for the model, and what the verdict has to know of them.

    ``token_ids_R``, ``positions_R``, ``slot_mapping_R`` (where K/V is kept: clean rows in their final page slot, all others in
    the null page), ``limit_R`` and ``branch_R`` (``kernels.mask_layout``) are the rows. ``prefix_lengths_N``,
    ``block_table_NP``: the requests' computed tokens and pages. ``num_drafts_N``: drafts that are really run. ``order_NB``: the
    branches that are run, by rank, -1 for none. ``verify_slot_D``, ``verify_position_D``: slots of the verifying rows, and
    positions of the tokens that they take.
    """

    token_ids_R: Tensor
    positions_R: Tensor
    slot_mapping_R: Tensor
    limit_R: Tensor
    branch_R: Tensor
    prefix_lengths_N: Tensor
    block_table_NP: Tensor
    num_drafts_N: Tensor
    order_NB: Tensor
    verify_slot_D: Tensor
    verify_position_D: Tensor
