"""The tensors of the paged KV cache. The model runner alone writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig


class KVCache:
    """Keys and values of every layer, each [pages, kv heads, page size, head size], so that a tile is one table look-up."""

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
        self.page_size, self.dtype = page_size, dtype
        keys, values = (torch.zeros(shape, dtype=dtype, device=device).unbind(0) for _ in range(2))
        self.layers: list[tuple[Tensor, Tensor]] = list(zip(keys, values, strict=True))


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, K and V."""
    return config.kv_bytes_per_token_factor * page_size * dtype.itemsize
