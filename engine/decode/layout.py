"""The rows of a step as index tensors that depend on shapes alone, so that they are built once and reused.

Rows of a request: prefill tokens, drafts, then its branches, one block after the other. A shape may be larger than what the
plan bounds, which may be more than what the request can use (fewer drafts held, fewer branches worth running): what is not
used is padding.

Shape suffixes: N requests of the step, R rows, D verifying rows (drafts), B branches at most, K block length at most, P
prefill rows whose logits are asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.step import IntArray, RequestShape
from engine.upload import upload

ANCHOR = -1
"""The number in its block of an anchor's row, which stands before mask 0."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Index tensors of one combination of shapes.

    ``row_starts``: where each request's rows begin, and their end; ``device_row_starts`` are the same numbers on the device.
    ``request_R``: the request (in plan order) of a row. ``clean_R``: whether it is a clean row; ``index_R``: its number within
    the request. ``rank_R``, ``in_block_R``: for a branch's row, the branch's rank and its own number in the block, ``ANCHOR``
    before mask 0. ``has_anchor_N``: which requests have anchors. ``prefill_rows``, ``verify_rows_D`` and ``draft_rows`` (all
    rows of branches) are row numbers. ``verify_request_D``, ``verify_index_D``: the request and the draft number of a verifying
    row; ``verify_starts``: where each request's begin among them. ``masks_NBK``: where in the logits the masks of a branch
    stand; without ``first_masks``, mask 0 has none. ``prompt_logits``: where those of the prompt begin. ``logit_rows``: rows
    that need logits: verifying ones, masks, prompt; None: all rows, in their order.
    """

    row_starts: tuple[int, ...]
    device_row_starts: Tensor
    num_rows: int
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
    prompt_logits: int
    logit_rows: Tensor | None
    num_prefill_N: Tensor
    block_length_N: Tensor


def build_layout(shapes: IntArray, first_masks: bool, device: torch.device) -> StepLayout:
    """The layout of a step whose requests have these shapes [N, 6], see ``RequestShape``. Built once, then found again.

    ``first_masks``: mask 0 needs logits too. It stands at the position of a token that verification emits, so otherwise it
    would be computed for nothing.
    """
    return _build_layout(shapes.tobytes(), first_masks, device)


@functools.lru_cache(maxsize=256)
def _build_layout(packed_shapes: bytes, first_masks: bool, device: torch.device) -> StepLayout:
    numbers = np.frombuffer(packed_shapes, dtype=np.int64).reshape(-1, len(RequestShape._fields))
    shapes = [RequestShape._make(row) for row in numbers.tolist()]
    columns = torch.tensor(shapes, dtype=torch.long).unbind(1)
    num_prefill_N, num_drafts_N, num_branches_N, block_length_N, has_anchor_N, num_prompt_targets_N = columns
    num_clean_N = num_prefill_N + num_drafts_N
    branch_rows_N = block_length_N + has_anchor_N
    num_rows_N = num_clean_N + num_branches_N * branch_rows_N
    ends_N = num_rows_N.cumsum(0)

    request_R = torch.arange(len(shapes)).repeat_interleave(num_rows_N)
    index_R = torch.arange(len(request_R)) - (ends_N - num_rows_N)[request_R]
    num_prefill_R, num_clean_R, branch_rows_R = num_prefill_N[request_R], num_clean_N[request_R], branch_rows_N[request_R]
    clean_R = index_R < num_clean_R
    in_branches_R = (index_R - num_clean_R).clamp(min=0)
    rank_R = in_branches_R // branch_rows_R
    in_block_R = (in_branches_R % branch_rows_R - has_anchor_N[request_R]).masked_fill(clean_R, 0)

    verify_rows_D = _numbers(clean_R & (index_R >= num_prefill_R))
    mask_rows = _numbers(~clean_R & (in_block_R >= (0 if first_masks else 1)))
    logit_rows = torch.cat((verify_rows_D, mask_rows, _numbers(index_R < num_prompt_targets_N[request_R])))
    max_branches = max(shape.num_branches for shape in shapes)
    max_block = max((shape.block_length for shape in shapes if shape.num_branches), default=1)
    masks_NBK = torch.zeros((len(shapes), max_branches, max_block), dtype=torch.long)
    places = len(verify_rows_D) + torch.arange(len(mask_rows))
    masks_NBK[request_R[mask_rows], rank_R[mask_rows], in_block_R[mask_rows]] = places
    return StepLayout(
        row_starts=(0, *ends_N.tolist()),
        device_row_starts=upload(torch.nn.functional.pad(ends_N, (1, 0)), device),
        num_rows=len(request_R),
        max_drafts=max(shape.num_drafts for shape in shapes),
        max_branches=max_branches,
        max_block=max_block,
        request_R=upload(request_R, device),
        clean_R=upload(clean_R, device),
        index_R=upload(index_R, device),
        rank_R=upload(rank_R, device),
        in_block_R=upload(in_block_R, device),
        has_anchor_N=upload(has_anchor_N, device),
        prefill_rows=upload(_numbers(index_R < num_prefill_R), device),
        verify_rows_D=upload(verify_rows_D, device),
        verify_request_D=upload(request_R[verify_rows_D], device),
        verify_index_D=upload((index_R - num_prefill_R)[verify_rows_D], device),
        verify_starts=(0, *num_drafts_N.cumsum(0).tolist()),
        draft_rows=upload(_numbers(~clean_R), device),
        masks_NBK=upload(masks_NBK, device),
        prompt_logits=len(verify_rows_D) + len(mask_rows),
        logit_rows=None if torch.equal(logit_rows, torch.arange(len(request_R))) else upload(logit_rows, device),
        num_prefill_N=upload(num_prefill_N, device),
        block_length_N=upload(block_length_N, device),
    )


def _numbers(is_chosen_R: Tensor) -> Tensor:
    return is_chosen_R.nonzero().squeeze(1)
