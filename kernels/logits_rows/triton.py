"""Rows of logits that are processed where they are read: what kernels share that need processed logits.

Row ``q`` is split into chunks of ``BLOCK`` tokens, one program each. The arithmetic is that of
``kernels.process_logits.reference`` up to the temperature, step by step in float32. Launched without fused multiply-adds, all
kernels see the same bits. Where a row has bans or biases, lists of a few tokens, that half is done in plain torch before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import BlockSettings
from kernels.process_logits.metadata import RowSampling
from kernels.process_logits.reference import forbid_and_bias

LAUNCH_SMALL = {"num_warps": 1, "enable_fp_fusion": False}
"""Of kernels that read a few numbers a row."""


class Rows(NamedTuple):
    """What kernels read of Q rows: raw logits, and parameters [Q] or None. The numbers are of the vocabulary.

    ``place``: the row of the logits that each reads, -1 for a row that is not wanted; None: its own. ``grammar_row``: which of
    the masks binds it, -1 for none.
    """

    logits: Tensor
    stride: int
    place: Tensor | None
    vocab_size: int
    mask_token_id: int
    grammar_row: Tensor | None = None
    grammar_mask: Tensor | None = None
    mask_words: int = 0
    in_prompt: Tensor | None = None
    output: Tensor | None = None
    repetition: Tensor | None = None
    frequency: Tensor | None = None
    presence: Tensor | None = None
    temperature: Tensor | None = None


def launch_of(vocab_size: int, settings: BlockSettings) -> dict[str, Any]:
    """Options of kernels with a program for every chunk."""
    block = min(settings.block, max(16, int(triton.next_power_of_2(vocab_size))))
    return {"BLOCK": block, "num_warps": settings.num_warps, "enable_fp_fusion": False}


def chunks_of(vocab_size: int, settings: BlockSettings) -> dict[str, int]:
    """How many chunks a row has, also as a power of two, for kernels that read them all at once."""
    count = triton.cdiv(vocab_size, launch_of(vocab_size, settings)["BLOCK"])
    return {"CHUNKS": count, "CHUNKS_PADDED": triton.next_power_of_2(count)}


@triton.jit
def is_wanted(rows, q):
    """Whether row ``q`` has a place."""
    wanted = q >= 0
    if rows.place is not None:
        wanted = tl.load(rows.place + q) >= 0
    return wanted


@triton.jit
def processed_tile(rows, q, token):
    """Row ``q``'s logits at ``token`` up to temperature, float32; -inf beyond the vocabulary."""
    in_vocab = token < rows.vocab_size
    place = q
    if rows.place is not None:
        place = tl.maximum(tl.load(rows.place + q), 0)
    x = tl.load(rows.logits + place.to(tl.int64) * rows.stride + token, mask=in_vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(token == rows.mask_token_id, float("-inf"), x)
    if rows.grammar_row is not None:
        grammar_row = tl.load(rows.grammar_row + q)
        is_free = grammar_row < 0
        words = rows.grammar_mask + tl.maximum(grammar_row, 0).to(tl.int64) * rows.mask_words
        word = tl.load(words + token // 32, mask=in_vocab & (grammar_row >= 0), other=0)
        x = tl.where(is_free | (((word >> (token % 32)) & 1) != 0), x, float("-inf"))
    if rows.output is not None:
        cell = q.to(tl.int64) * rows.vocab_size + token
        count = tl.load(rows.output + cell, mask=in_vocab, other=0)
        is_said = (tl.load(rows.in_prompt + cell, mask=in_vocab, other=0) != 0) | (count > 0)
        repetition = tl.load(rows.repetition + q).to(tl.float32)
        x = tl.where(is_said, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition), x)
        x -= tl.load(rows.frequency + q).to(tl.float32) * count.to(tl.float32)
        x -= tl.load(rows.presence + q).to(tl.float32) * (count > 0).to(tl.float32)
    if rows.temperature is not None:
        temperature = tl.load(rows.temperature + q)
        divisor = tl.where(temperature == 0, 1.0, temperature).to(tl.float32)
        x = tl.div_rn(x, tl.zeros_like(x) + divisor)
    # The two zeros are equal, and so must be their places in the order.
    return tl.where(x == 0, 0.0, x)


def bind_rows(logits_RV: Tensor, place_Q: Tensor | None, sampling: RowSampling, mask_token_id: int | None) -> Rows:
    """What the kernels read. Raises ValueError for float64 logits."""
    if logits_RV.dtype == torch.float64:
        raise ValueError("logits are processed in float32: float64 is for the reference")
    grammar, penalties = sampling.grammar, sampling.penalties
    if sampling.banned is not None or sampling.bias is not None:
        logits_RV = forbid_and_bias(logits_RV if place_Q is None else logits_RV[place_Q], sampling, mask_token_id)
        place_Q = grammar = mask_token_id = None
    assert logits_RV.stride(1) == 1
    rows = Rows(logits_RV, logits_RV.stride(0), place_Q, logits_RV.shape[1], -1 if mask_token_id is None else mask_token_id)
    if grammar is not None:
        num_rows = len(logits_RV) if place_Q is None else len(place_Q)
        number_C = torch.arange(len(grammar.rows_C), device=logits_RV.device)
        grammar_row = torch.full((num_rows,), -1, device=logits_RV.device).index_copy_(0, grammar.rows_C, number_C)
        mask = grammar.mask_CM.contiguous()
        rows = rows._replace(grammar_row=grammar_row, grammar_mask=mask, mask_words=mask.shape[1])
    if penalties is not None:
        rows = rows._replace(
            in_prompt=penalties.in_prompt_QV.contiguous(),
            output=penalties.output_QV.contiguous(),
            repetition=penalties.repetition,
            frequency=penalties.frequency,
            presence=penalties.presence,
        )
    return rows._replace(temperature=sampling.temperature) if sampling.needs.noise else rows
