"""Runs the model on a laid-out step. It knows tensors and pages, but neither requests nor decode modes."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.decode.inputs import StepInputs
from engine.kv_cache import KVCache
from engine.models.transformer import CacheSlots, Transformer
from kernels.backend import Kernels


class PagedAttention:
    """The attention of one step, over cache and step."""

    def __init__(self, inputs: StepInputs, cache: KVCache, kernels: Kernels, group_size: int, scale: float) -> None:
        self.cache, self.kernels, self.scale = cache, kernels, scale
        self.prepared = kernels.prepare_attention(inputs.attention, cache.page_size, group_size, cache.dtype)

    def __call__(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
        keys, values = self.cache.layers[layer]
        return self.kernels.paged_attention(q_RHD, k_RGD, v_RGD, keys, values, self.prepared, self.scale)


class ModelRunner:
    """Owns the model and the KV cache tensors."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache, self.kernels = model, cache, model.kernels
        config = model.config
        self.group_size = config.num_heads // config.num_kv_heads
        self.scale = config.head_dim**-0.5

    @torch.inference_mode()
    def execute(self, inputs: StepInputs) -> Tensor | None:
        """One forward pass; logits [Q, V] of the rows that need them, None if no row does."""
        attention = PagedAttention(inputs, self.cache, self.kernels, self.group_size, self.scale)
        rows = inputs.layout.logit_rows
        slots = CacheSlots(self.cache.layers, inputs.slot_mapping_R, self.cache.page_size)
        hidden = self.model(inputs.token_ids_R, inputs.positions_R, attention, inputs.draft_rows, slots)
        if rows is None:
            return self.model.logits(hidden)
        return self.model.logits(hidden[rows]) if len(rows) else None
