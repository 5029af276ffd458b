"""The rows of a step as index tensors that depend on shapes alone, so that they are built once and reused.

Rows of a request: prefill tokens, drafts, then its branches, one block after the other. A shape may be larger than what the
plan bounds, which may be more than what the request can use (fewer drafts held, fewer branches worth running): what is not
used is padding.

Shape suffixes as in ``kernels.step_rows.metadata``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from engine.step import IntArray, RequestShape
from engine.upload import upload
from kernels.step_rows.metadata import StepLayout


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
    starts = (ends_N - num_rows_N, num_rows_N, num_prefill_N.cumsum(0) - num_prefill_N, num_drafts_N.cumsum(0) - num_drafts_N)
    requests_N8 = torch.stack((*starts, num_prefill_N, num_drafts_N, block_length_N, has_anchor_N), dim=1)
    return StepLayout(
        row_starts=(0, *ends_N.tolist()),
        device_row_starts=upload(torch.nn.functional.pad(ends_N, (1, 0)), device),
        requests_N8=upload(requests_N8, device),
        num_rows=len(request_R),
        most_rows=int(num_rows_N.max()),
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
        guess_Q=upload(torch.arange(max_block - 1 if max_branches else 0).repeat(len(shapes)), device),
        prompt_logits=len(verify_rows_D) + len(mask_rows),
        logit_rows=None if torch.equal(logit_rows, torch.arange(len(request_R))) else upload(logit_rows, device),
        num_prefill_N=upload(num_prefill_N, device),
        block_length_N=upload(block_length_N, device),
    )


def _numbers(is_chosen_R: Tensor) -> Tensor:
    return is_chosen_R.nonzero().squeeze(1)
