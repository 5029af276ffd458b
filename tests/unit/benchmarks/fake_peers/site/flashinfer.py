"""FlashInfer's entry points in plain torch, by their documented meaning, so that what is asked of them can be checked.

Pages are [page, kv head, slot, size] (``HND``); a mask is flat, one request after the other; log-sum-exps are of base 2.
"""

from __future__ import annotations

import itertools
import math

import torch


def _attend(q, keys, values, scale, mask):
    """q [R, H, D], keys and values [T, G, D], mask [R, T] or None: the output and its log-sum-exp [R, H]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    scores = torch.einsum("rhd,thd->rht", q, keys) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return torch.einsum("rht,thd->rhd", scores.softmax(-1), values), scores.logsumexp(-1) / math.log(2)


class _Wrapper:
    def __init__(self, workspace, layout, backend):
        assert workspace.dtype == torch.uint8
        self.layout, self.backend = layout, backend

    def _mask(self, i, rows, tokens):
        if self.custom_mask is not None:
            assert self.backend == "fa2", "only the older kernel takes a mask"
            sizes = [r * t for r, t in self.sizes]
            return self.custom_mask[sum(sizes[:i]) : sum(sizes[: i + 1])].view(rows, tokens)
        return torch.ones(rows, tokens, dtype=torch.bool).tril(tokens - rows) if self.causal else None

    def _run(self, q, parts, return_lse):
        self.sizes = [(end - start, len(keys)) for (start, end), (keys, _) in zip(self.rows, parts, strict=True)]
        done = [
            _attend(q[start:end], keys, values, self.scale, self._mask(i, end - start, len(keys)))
            for i, ((start, end), (keys, values)) in enumerate(zip(self.rows, parts, strict=True))
        ]
        out, lse = (torch.cat(tensors) for tensors in zip(*done, strict=True))
        return (out, lse) if return_lse else out

    def _keep(self, qo_indptr, custom_mask, causal, sm_scale):
        starts = qo_indptr.tolist()
        self.rows = list(itertools.pairwise(starts))
        self.custom_mask, self.causal, self.scale = custom_mask, causal, sm_scale


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        custom_mask=None,
        causal=False,
        sm_scale=None,
        q_data_type=None,
        kv_data_type=None,
    ):
        assert {t.dtype for t in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)} == {torch.int32}
        self._keep(qo_indptr, custom_mask, causal, sm_scale)
        starts = paged_kv_indptr.tolist()
        self.pages = [paged_kv_indices[a:b].long() for a, b in itertools.pairwise(starts)]
        self.tokens = [(len(p) - 1) * page_size + n for p, n in zip(self.pages, paged_kv_last_page_len.tolist(), strict=True)]

    def run(self, q, paged_kv_cache, *, return_lse=False):
        assert self.layout == "HND"
        parts = [
            tuple(cache[pages].transpose(1, 2).flatten(0, 1)[:tokens] for cache in paged_kv_cache)
            for pages, tokens in zip(self.pages, self.tokens, strict=True)
        ]
        return self._run(q, parts, return_lse)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, custom_mask=None, causal=False,
             sm_scale=None, q_data_type=None, kv_data_type=None):  # fmt: skip
        self._keep(qo_indptr, custom_mask, causal, sm_scale)
        starts = kv_indptr.tolist()
        self.keys = list(itertools.pairwise(starts))

    def run(self, q, k, v, *, return_lse=False):
        return self._run(q, [(k[a:b], v[a:b]) for a, b in self.keys], return_lse)


def merge_state(v_a, s_a, v_b, s_b):
    weight_a, weight_b = (torch.exp2(s - torch.maximum(s_a, s_b))[..., None] for s in (s_a, s_b))
    return (v_a * weight_a + v_b * weight_b) / (weight_a + weight_b), torch.logaddexp2(s_a, s_b)
