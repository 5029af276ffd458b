"""What the attention of one step needs to know, built once and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """A ragged batch of N requests with R rows in all, the rows of a request adjacent, clean rows before mask rows.

    ``row_starts``: N + 1 host integers, request ``i`` owns rows ``row_starts[i]..row_starts[i+1]-1``. ``device_row_starts``
    [N + 1]: the same numbers in device memory.
    ``prefix_lengths`` [N]: tokens in the cache that every row of the request sees; device state.
    ``max_prefix``: a host-side upper bound of each of them, as many integers as requests.
    ``block_table`` [N, P]: page of every ``page_size`` positions; entries beyond the prefix are arbitrary but valid page ids.
    ``limit``, ``branch`` [R]: the mask among the rows of a step, see ``kernels.mask_layout``. The index that ``limit`` counts
    is the row's number within its request; a limit is at most the number of its clean rows, and below zero it is like zero.
    """

    row_starts: tuple[int, ...]
    device_row_starts: Tensor
    prefix_lengths: Tensor
    max_prefix: tuple[int, ...]
    block_table: Tensor
    limit: Tensor
    branch: Tensor
