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


class _Rows:
    """Accumulates rows while a layout is built."""

    def __init__(self) -> None:
        self.request: list[int] = []
        self.clean: list[bool] = []
        self.index: list[int] = []
        self.rank: list[int] = []
        self.in_block: list[int] = []

    def add(self, request: int, clean: bool, index: int, rank: int = 0, in_block: int = 0) -> int:
        self.request.append(request)
        self.clean.append(clean)
        self.index.append(index)
        self.rank.append(rank)
        self.in_block.append(in_block)
        return len(self.request) - 1


@functools.lru_cache(maxsize=4096)
def build_layout(shapes: tuple[Shape, ...], device: torch.device) -> StepLayout:
    """The layout of a step whose requests have these shapes."""
    rows, starts = _Rows(), [0]
    prefill: list[int] = []
    verify: list[tuple[int, int, int]] = []
    masks: list[tuple[int, int, int, int]] = []
    for request, (num_prefill, num_drafts, num_branches, block_length) in enumerate(shapes):
        prefill += [rows.add(request, True, i) for i in range(num_prefill)]
        verify += [(rows.add(request, True, num_prefill + i), request, i) for i in range(num_drafts)]
        for rank in range(num_branches):
            for j in range(block_length):
                row = rows.add(request, False, num_prefill + num_drafts + rank * block_length + j, rank, j)
                if j > 0:
                    masks.append((row, request, rank, j - 1))
        starts.append(len(rows.request))

    max_branches = max(s[2] for s in shapes)
    max_block = max((s[3] for s in shapes if s[2]), default=1)
    masks_nbk = torch.zeros((len(shapes), max_branches, max_block - 1), dtype=torch.long)
    for place, (_, request, rank, j) in enumerate(masks):
        masks_nbk[request, rank, j] = len(verify) + place

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return StepLayout(
        row_starts=tuple(starts),
        num_rows=starts[-1],
        max_drafts=max(s[1] for s in shapes),
        max_branches=max_branches,
        max_block=max_block,
        request_R=integers(rows.request),
        clean_R=torch.tensor(rows.clean, device=device),
        index_R=integers(rows.index),
        rank_R=integers(rows.rank),
        in_block_R=integers(rows.in_block),
        prefill_rows=integers(prefill),
        verify_rows_D=integers([row for row, _, _ in verify]),
        verify_request_D=integers([request for _, request, _ in verify]),
        verify_index_D=integers([i for _, _, i in verify]),
        masks_NBK=masks_nbk.to(device),
        logit_rows=integers([row for row, _, _ in verify] + [row for row, _, _, _ in masks]),
        num_prefill_N=integers([s[0] for s in shapes]),
        num_drafts_N=integers([s[1] for s in shapes]),
        num_branches_N=integers([s[2] for s in shapes]),
        block_length_N=integers([s[3] for s in shapes]),
    )
