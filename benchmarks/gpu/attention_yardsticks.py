"""The same attention by FlashInfer and FlashAttention-3, where they can be imported.

FlashInfer (flashinfer.ai) takes a mask in two ways: one kernel over cache and step, where the step's keys lie in pages, too;
or the prefix without a mask, the step with one, and a merge by log-sum-exp. FlashAttention-3 (Shah et al., arXiv 2407.08608)
has no such mask: causal attention over as many keys shows what a kernel without one reaches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention_case import AttentionCase
from benchmarks.gpu.engines import PAGE

WORKSPACE_BYTES = 256 << 20

Runs = dict[str, Callable[[int], Tensor]]
"""Ways to attend by name; each takes the number of a layer. A name that ends in ``no mask`` computes something else."""


def masked(case: AttentionCase) -> Runs:
    """FlashInfer's kernel with a mask of one bit a pair. Raises ImportError without FlashInfer, as the next two do."""
    return {"flashinfer, custom mask": _masked(importlib.import_module("flashinfer"), case)}


def merged(case: AttentionCase) -> Runs:
    """The prefix without a mask, the step with one, merged."""
    return {"flashinfer, prefix + step + merge": _merged(importlib.import_module("flashinfer"), case)}


def causal(case: AttentionCase) -> Runs:
    """What FlashInfer reaches without such a mask."""
    return {"flashinfer, causal, no mask": _causal(importlib.import_module("flashinfer"), case)}


def _paged(flashinfer: Any, case: AttentionCase, tokens: int, backend: str, **mask: Any) -> Any:
    """A planned wrapper over the first ``tokens`` tokens in each request's pages."""
    device, n, c = case.q.device, case.num_requests, case.config
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "HND", backend=backend)
    each = -(-tokens // PAGE)
    wrapper.plan(
        _starts(n, case.num_rows, device),
        _starts(n, each, device),
        case.metadata.block_table[:, :each].flatten().int(),
        torch.full((n,), tokens - (each - 1) * PAGE, dtype=torch.int32, device=device),
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        PAGE,
        sm_scale=case.scale,
        q_data_type=case.q.dtype,
        kv_data_type=case.q.dtype,
        **mask,
    )
    return wrapper


def _masked(flashinfer: Any, case: AttentionCase) -> Callable[[int], Tensor]:
    for keys, values in case.caches:
        _store(case, keys, case.k)
        _store(case, values, case.v)
    prefix = case.seen.new_ones((case.num_requests, case.num_rows, case.context))
    mask = torch.cat((prefix, case.seen), dim=2).flatten()
    wrapper = _paged(flashinfer, case, case.context + case.num_rows, "fa2", custom_mask=mask)
    return lambda layer: wrapper.run(case.q, case.caches[layer])


def _merged(flashinfer: Any, case: AttentionCase) -> Callable[[int], Tensor]:
    device, c = case.q.device, case.config
    prefix = _paged(flashinfer, case, case.context, "auto", causal=False)
    step = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD", backend="fa2")
    starts = _starts(case.num_requests, case.num_rows, device)
    heads = (c.num_heads, c.num_kv_heads, c.head_dim)
    types = {"q_data_type": case.q.dtype, "kv_data_type": case.q.dtype}
    step.plan(starts, starts, *heads, custom_mask=case.seen.flatten(), sm_scale=case.scale, **types)

    def run(layer: int) -> Tensor:
        out, weight = prefix.run(case.q, case.caches[layer], return_lse=True)
        merged, _ = flashinfer.merge_state(out, weight, *step.run(case.q, case.k, case.v, return_lse=True))
        return merged

    return run


def _causal(flashinfer: Any, case: AttentionCase) -> Callable[[int], Tensor]:
    wrapper = _paged(flashinfer, case, case.context + case.num_rows, "auto", causal=True)
    return lambda layer: wrapper.run(case.q, case.caches[layer])


def flash_attention_runs(case: AttentionCase) -> Runs:
    """Raises ImportError without FlashAttention-3."""
    attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    q = case.q.view(case.num_requests, case.num_rows, *case.q.shape[1:])
    # Its pages are [page, slot, head, size].
    caches = [tuple(t.transpose(1, 2).contiguous() for t in pair) for pair in case.caches]
    tokens = case.context + case.num_rows
    lengths = torch.full((case.num_requests,), tokens, dtype=torch.int32, device=q.device)
    table = case.metadata.block_table[:, : case.pages_each()].int().contiguous()

    def run(layer: int) -> Tensor:
        keys, values = caches[layer]
        options = {"cache_seqlens": lengths, "page_table": table, "softmax_scale": case.scale, "causal": True}
        return attend(q, keys, values, **options)

    return {"flash-attention 3, causal, no mask": run}


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _starts(count: int, each: int, device: torch.device) -> Tensor:
    return torch.arange(0, (count + 1) * each, each, dtype=torch.int32, device=device)


def _store(case: AttentionCase, cache: Tensor, rows: Tensor) -> None:
    """Put the step's own keys or values behind the prefix."""
    position = case.context + torch.arange(case.num_rows, device=rows.device)
    pages = case.metadata.block_table[: case.num_requests, position // PAGE]
    slots = (position % PAGE).expand(case.num_requests, -1)
    cache.transpose(1, 2)[pages, slots] = rows.view(*pages.shape, *rows.shape[1:])
