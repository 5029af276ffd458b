"""Gumbel argmax over the vocabulary in one pass: the same contract as ``kernels.sampling.reference``.

A program processes one chunk of one row's raw logits (``kernels.logits_rows.triton``), adds noise that it makes itself, and
keeps the best token; a second kernel goes over a row's chunks in their order. Neither processed logits nor noise are ever in
memory. The chunks' log-sum-exp is taken on the way where a draft's probability is wanted.

The chunks depend on the vocabulary alone, so a row has the same token in every batch. Ties go to the lowest token id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import LOGITS, BlockSettings
from kernels.logits_rows.triton import LAUNCH_SMALL, bind_rows, chunks_of, is_wanted, launch_of, processed_tile
from kernels.philox.triton import gumbel_tile
from kernels.process_logits.metadata import RowSampling
from kernels.process_logits.triton import find_cut, truncated_tile


@triton.jit
def _draw_kernel(
    partial,
    partial_token,
    rows,
    cut,
    seed,
    position,
    noise_scale,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PROBABILITY: tl.constexpr,
):
    """Best token of every chunk. ``partial`` [Q, chunks, 4]: its score, its logit, the chunk's peak and sum of exponentials.

    ``seed`` is None where no row has noise, ``noise_scale`` where drafts have the rows' own temperature.
    """
    q = tl.program_id(0)
    chunk = tl.program_id(1)
    if is_wanted(rows, q):
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        x = truncated_tile(processed_tile(rows, q, token), cut, q, chunk, CHUNKS, CHUNKS_PADDED)
        score = x
        if seed is not None:  # noqa: SIM102 - known when the kernel is compiled, unlike the temperature
            if tl.load(rows.temperature + q) != 0:
                noise = gumbel_tile(tl.load(seed + q), tl.load(position + q), chunk * BLOCK, BLOCK)
                if noise_scale is not None:
                    noise *= tl.load(noise_scale + q)
                score = x + noise
        best = tl.max(score, 0)
        taken = tl.min(tl.where(score == best, token, 2147483647), 0)
        cell = q * CHUNKS + chunk
        tl.store(partial_token + cell, taken)
        tl.store(partial + cell * 4, best)
        if HAS_PROBABILITY:
            peak = tl.max(x, 0)
            tl.store(partial + cell * 4 + 1, tl.sum(tl.where(token == taken, x, 0.0), 0))
            tl.store(partial + cell * 4 + 2, peak)
            tl.store(partial + cell * 4 + 3, tl.sum(tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak)), 0))


@triton.jit
def _merge_kernel(
    token, probability, partial, partial_token, rows, CHUNKS, CHUNKS_PADDED: tl.constexpr, HAS_PROBABILITY: tl.constexpr
):
    """Best token of every row, and its probability; token 0 of a row that is not wanted."""
    q = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS_PADDED)
    wanted = is_wanted(rows, q)
    is_chunk = (chunk < CHUNKS) & wanted
    cell = q * CHUNKS + chunk
    score = tl.load(partial + cell * 4, mask=is_chunk, other=float("-inf"))
    tokens = tl.load(partial_token + cell, mask=is_chunk, other=2147483647)
    taken = tl.min(tl.where(score == tl.max(score, 0), tokens, 2147483647), 0)
    # A row of no number at all has no best token: any id of the vocabulary keeps its harm to its own request.
    tl.store(token + q, tl.where(wanted & (taken < 2147483647), taken, 0).to(tl.int64))
    if HAS_PROBABILITY:
        logit = tl.load(partial + cell * 4 + 1, mask=is_chunk, other=0.0)
        peak = tl.load(partial + cell * 4 + 2, mask=is_chunk, other=float("-inf"))
        total = tl.load(partial + cell * 4 + 3, mask=is_chunk, other=0.0)
        highest = tl.where(wanted, tl.max(peak, 0), 0.0)
        whole = tl.sum(tl.where(total > 0.0, tl.exp(peak - highest) * total, 0.0), 0)
        chosen = tl.sum(tl.where(is_chunk & (tokens == taken), logit, 0.0), 0)
        tl.store(probability + q, tl.exp(chosen - highest) / tl.where(wanted, whole, 1.0))


def sample_tokens(
    logits_RV: Tensor,
    place_Q: Tensor | None,
    sampling: RowSampling,
    position_Q: Tensor,
    mask_token_id: int | None,
    settings: BlockSettings = LOGITS,
) -> Tensor:
    """The token that each of Q rows takes, [Q]. Any row stride; tokens are adjacent."""
    return _draw(logits_RV, place_Q, sampling, position_Q, mask_token_id, None, settings, has_probability=False)[0]


def sample_drafts(
    logits_RV: Tensor,
    place_Q: Tensor | None,
    sampling: RowSampling,
    position_Q: Tensor,
    mask_token_id: int | None,
    draft_temperature: float | None,
    settings: BlockSettings = LOGITS,
) -> tuple[Tensor, Tensor]:
    """Tokens at the draft temperature, and their probabilities: [Q] and [Q] float32."""
    return _draw(logits_RV, place_Q, sampling, position_Q, mask_token_id, draft_temperature, settings, has_probability=True)


def _draw(
    logits_RV: Tensor,
    place_Q: Tensor | None,
    sampling: RowSampling,
    position_Q: Tensor,
    mask_token_id: int | None,
    draft_temperature: float | None,
    settings: BlockSettings,
    *,
    has_probability: bool,
) -> tuple[Tensor, Tensor]:
    rows = bind_rows(logits_RV, place_Q, sampling, mask_token_id)
    cut = find_cut(rows, sampling, settings)
    is_noisy = sampling.needs.noise and draft_temperature != 0
    scale = (draft_temperature / sampling.temperature).float() if is_noisy and draft_temperature is not None else None
    num_rows, chunks = len(position_Q), chunks_of(rows.vocab_size, settings)
    grid = (num_rows, chunks["CHUNKS"])
    device = logits_RV.device
    partial = torch.empty((*grid, 4), dtype=torch.float32, device=device)
    partial_token = torch.empty(grid, dtype=torch.int32, device=device)
    token_Q = torch.empty(num_rows, dtype=torch.long, device=device)
    probability_Q = torch.empty(num_rows, dtype=torch.float32, device=device)
    options = {**chunks, "HAS_PROBABILITY": has_probability}
    seed = sampling.seed if is_noisy else None
    launch = launch_of(rows.vocab_size, settings)
    _draw_kernel[grid](partial, partial_token, rows, cut, seed, position_Q, scale, **options, **launch)
    _merge_kernel[(num_rows,)](token_Q, probability_Q, partial, partial_token, rows, **options, **LAUNCH_SMALL)
    return token_Q, probability_Q
