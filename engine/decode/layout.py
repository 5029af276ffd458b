"""The rows of a step as index tensors that depend on the plan's bounds alone, so that they are built once and reused.

Rows of a request: prefill tokens, drafts, then the masks of its branches, one block after the other. Where a bound is not
reached (fewer drafts held, fewer branches worth running) the rows are padding.

Shape suffixes: N requests of the step, R rows, D verifying rows (drafts), B branches at most, K block length at most.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
"""Of one request: prefill tokens, drafts, branches, block length."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Index tensors of one combination of shapes.

    ``request_R``: the request (in plan order) of a row. ``clean_R``: whether it is a clean row; ``index_R``: its number within
    the request. ``rank_R``, ``in_block_R``: for a mask row, its branch's rank and its own number in the block.
    ``prefill_rows``, ``verify_rows_D``, ``mask_rows`` are row numbers. ``verify_request_D``, ``verify_index_D``: the request
    and the draft number of a verifying row. ``masks_NBK``: where in the logits the masks ``1..k-1`` of a branch stand.
    ``logit_rows``: rows that need logits, verifying ones first.
    """

    row_starts: tuple[int, ...]
    num_rows: int
    max_drafts: int
    max_branches: int
    max_block: int
    request_R: Tensor
    clean_R: Tensor
    index_R: Tensor
    rank_R: Tensor
    in_block_R: Tensor
    prefill_rows: Tensor
    verify_rows_D: Tensor
    verify_request_D: Tensor
    verify_index_D: Tensor
    masks_NBK: Tensor
    logit_rows: Tensor
    num_prefill_N: Tensor
    num_drafts_N: Tensor
    num_branches_N: Tensor
    block_length_N: Tensor


@functools.lru_cache(maxsize=256)
def build_layout(shapes: tuple[Shape, ...], device: torch.device) -> StepLayout:
    """The layout of a step whose requests have these shapes."""
    num_prefill_N, num_drafts_N, num_branches_N, block_length_N = torch.tensor(shapes).unbind(1)
    num_clean_N = num_prefill_N + num_drafts_N
    num_rows_N = num_clean_N + num_branches_N * block_length_N
    ends_N = num_rows_N.cumsum(0)

    request_R = torch.arange(len(shapes)).repeat_interleave(num_rows_N)
    index_R = torch.arange(len(request_R)) - (ends_N - num_rows_N)[request_R]
    num_prefill_R, num_clean_R, block_length_R = num_prefill_N[request_R], num_clean_N[request_R], block_length_N[request_R]
    clean_R = index_R < num_clean_R
    mask_R = (index_R - num_clean_R).clamp(min=0)
    rank_R, in_block_R = mask_R // block_length_R, mask_R % block_length_R

    verify_rows_D = (clean_R & (index_R >= num_prefill_R)).nonzero().squeeze(1)
    # The first mask of a block stands at the position of a token that the step itself emits, so it never drafts.
    drafting_rows = in_block_R.nonzero().squeeze(1)
    places = len(verify_rows_D) + torch.arange(len(drafting_rows))
    max_branches = max(branches for _, _, branches, _ in shapes)
    max_block = max((length for _, _, branches, length in shapes if branches), default=1)
    masks_NBK = torch.zeros((len(shapes), max_branches, max_block - 1), dtype=torch.long)
    masks_NBK[request_R[drafting_rows], rank_R[drafting_rows], in_block_R[drafting_rows] - 1] = places
    return StepLayout(
        row_starts=(0, *ends_N.tolist()),
        num_rows=len(request_R),
        max_drafts=max(drafts for _, drafts, _, _ in shapes),
        max_branches=max_branches,
        max_block=max_block,
        request_R=request_R.to(device),
        clean_R=clean_R.to(device),
        index_R=index_R.to(device),
        rank_R=rank_R.to(device),
        in_block_R=in_block_R.to(device),
        prefill_rows=(index_R < num_prefill_R).nonzero().squeeze(1).to(device),
        verify_rows_D=verify_rows_D.to(device),
        verify_request_D=request_R[verify_rows_D].to(device),
        verify_index_D=(index_R - num_prefill_R)[verify_rows_D].to(device),
        masks_NBK=masks_NBK.to(device),
        logit_rows=torch.cat((verify_rows_D, drafting_rows)).to(device),
        num_prefill_N=num_prefill_N.to(device),
        num_drafts_N=num_drafts_N.to(device),
        num_branches_N=num_branches_N.to(device),
        block_length_N=block_length_N.to(device),
    )
