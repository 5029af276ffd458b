"""Writes the keys and values of a step's rows to their page slots."""

from __future__ import annotations

from torch import Tensor


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write rows [R, G, D] into caches [pages, G, page_size, D] at ``slots`` [R] = ``page * page_size + offset``.

    Rows that must leave no trace (masks and padding) carry a slot of the null page 0.
    """
    page_size = k_cache.shape[2]
    index = (slots // page_size, slots % page_size)
    k_cache.transpose(1, 2).index_put_(index, k)
    v_cache.transpose(1, 2).index_put_(index, v)
