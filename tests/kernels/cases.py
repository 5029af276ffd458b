"""Attention cases for the CPU and the GPU tests: ragged batches built from draft plans, each row's visible keys listed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.mask_layout import CLEAN
from kernels.paged_attention import reference
from kernels.paged_attention.metadata import AttentionMetadata

TENSORS = ("device_row_starts", "prefix_lengths", "block_table", "limit", "branch")
"""The fields of the metadata that live on the device."""


@dataclass(frozen=True)
class Request:
    """One request of a step: ``prefix`` cached tokens, a prefill chunk, a draft plan, and padding.

    Branch -1 is a padding branch, which sees no draft. ``padding_drafts`` are clean rows after the drafts; ``padding_rows``
    stand at the end, each in a branch of its own, and see the prefix and themselves. ``slack``: by how much the host's upper
    bound of the prefix exceeds it.
    """

    prefix: int
    prefill: int = 0
    drafts: int = 0
    branches: tuple[int, ...] = ()
    block: int = 0
    padding_drafts: int = 0
    padding_rows: int = 0
    slack: int = 0

    @property
    def num_clean(self) -> int:
        return self.prefill + self.drafts + self.padding_drafts

    @property
    def num_rows(self) -> int:
        return self.num_clean + len(self.branches) * self.block + self.padding_rows

    def visible(self) -> list[list[int]]:
        """Each row's visible in-step rows, straight from the table of the step's rows in the design. All see the prefix."""
        rows = [list(range(i + 1)) for i in range(self.num_clean)]
        for number, branch in enumerate(self.branches):
            clean = list(range(self.prefill + branch + 1))
            first = self.num_clean + number * self.block
            rows += [clean + list(range(first, first + self.block)) for _ in range(self.block)]
        rows += [[len(rows) + i] for i in range(self.padding_rows)]
        return rows

    def compact(self) -> tuple[list[int], list[int]]:
        """``limit`` and ``branch`` of each row."""
        limit, branch = [i + 1 for i in range(self.num_clean)], [CLEAN] * self.num_clean
        for number, after in enumerate(self.branches):
            limit += [self.prefill + after + 1] * self.block
            branch += [number] * self.block
        # Behind a padding branch, that of an anchor is below zero.
        limit += [-1] * self.padding_rows
        branch += [len(self.branches) + i for i in range(self.padding_rows)]
        return limit, branch


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention: query heads per key/value head (``group``), key/value heads, head size, page size."""

    group: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    page: int = 16


@dataclass(frozen=True)
class Case:
    """Tensors of a step. ``held`` [pages, page] is True for cache slots that hold a token some request sees."""

    requests: tuple[Request, ...]
    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    held: Tensor
    metadata: AttentionMetadata

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Case:
        """The same case in another data type, or on another device."""
        device = device or self.q.device
        metadata = replace(
            self.metadata,
            **{name: getattr(self.metadata, name).to(device) for name in TENSORS},
        )
        floats = {name: getattr(self, name).to(device, dtype) for name in ("q", "k", "v", "k_cache", "v_cache")}
        return replace(self, **floats, held=self.held.to(device), metadata=metadata)

    def poisoned(self, value: float) -> Case:
        """The same case with ``value`` in every cache slot that no row may read, the null page 0 among them."""
        keep = self.held[:, None, :, None]
        return replace(self, k_cache=self.k_cache.masked_fill(~keep, value), v_cache=self.v_cache.masked_fill(~keep, value))


def build(requests: tuple[Request, ...], shape: Shape, dtype: torch.dtype, seed: int = 0) -> Case:
    """Make a case on the CPU. Pages are handed out in a random order; unused block-table entries name random pages.

    q, k and v are slices of one merged projection, as in the model, so their rows are not contiguous.
    """
    random = torch.Generator().manual_seed(seed)
    page, num_rows = shape.page, sum(r.num_rows for r in requests)
    needed = [-(-r.prefix // page) for r in requests]
    width = max(max(-(-(r.prefix + r.slack) // page) for r in requests), 1) + 1
    num_pages = sum(needed) + 3
    order = (torch.randperm(num_pages - 1, generator=random) + 1).tolist()
    table = torch.randint(num_pages, (len(requests), width), generator=random)
    held = torch.zeros(num_pages, page, dtype=torch.bool)
    for i, request in enumerate(requests):
        for j in range(needed[i]):
            table[i, j] = order.pop()
            held[table[i, j], : request.prefix - j * page] = True

    heads = shape.kv_heads * (shape.group + 2)
    qkv = torch.randn(num_rows, heads, shape.head_dim, generator=random).to(dtype)
    q, k, v = qkv.split([shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads], dim=1)
    cache = torch.randn(2, num_pages, shape.kv_heads, page, shape.head_dim, generator=random).to(dtype)
    starts, limit, branch = [0], [], []
    for request in requests:
        starts.append(starts[-1] + request.num_rows)
        request_limit, request_branch = request.compact()
        limit += request_limit
        branch += request_branch
    metadata = AttentionMetadata(
        row_starts=tuple(starts),
        device_row_starts=torch.tensor(starts),
        prefix_lengths=torch.tensor([r.prefix for r in requests]),
        max_prefix=tuple(r.prefix + r.slack for r in requests),
        block_table=table,
        limit=torch.tensor(limit),
        branch=torch.tensor(branch),
    )
    return Case(requests, shape, q, k, v, cache[0], cache[1], held, metadata)


def naive(case: Case) -> Tensor:
    """Softmax over each row's listed keys, one row and one head at a time, in float64 on the CPU."""
    case = case.to(torch.float64, torch.device("cpu"))
    out = torch.empty(case.q.shape, dtype=torch.float64)
    page, first = case.shape.page, 0
    for i, request in enumerate(case.requests):
        places = [(int(case.metadata.block_table[i, p // page]), p % page) for p in range(request.prefix)]
        for row, seen in enumerate(request.visible()):
            step = [first + s for s in seen]
            for head in range(case.q.shape[1]):
                g = head // case.shape.group
                keys = [case.k_cache[p, g, s] for p, s in places] + [case.k[s, g] for s in step]
                values = [case.v_cache[p, g, s] for p, s in places] + [case.v[s, g] for s in step]
                scores = torch.stack(keys) @ case.q[first + row, head] * case.scale
                out[first + row, head] = torch.softmax(scores, 0) @ torch.stack(values)
        first += request.num_rows
    return out


def plan(prefix: int, k: int, *branches: int, slack: int = 0) -> Request:
    """A decode plan with ``k`` drafts and the given branches of ``k`` masks."""
    return Request(prefix, drafts=k, branches=branches, block=k, slack=slack)


DECODE = Request(prefix=37, drafts=1)
REDRAFT_AFTER_PREFILL = Request(prefix=16, prefill=5, drafts=1, branches=(0,), block=4)
MIXED = (
    DECODE,
    Request(prefix=0, prefill=9),
    plan(21, 3, 0, 1, 2),
    REDRAFT_AFTER_PREFILL,
    Request(prefix=5, prefill=2, drafts=2, branches=(1, -1), block=4, padding_drafts=2, padding_rows=3, slack=30),
    Request(prefix=0, drafts=1, branches=(0,), block=3),
)
"""Every kind of request in one batch; the fifth has padding of both kinds and a loose upper bound."""

UNIFORM = (plan(20, 2, 1, 0), plan(33, 2, 0, 1))
"""Requests of one size, which the reference attends to without gathering rows; the branches are in no order."""

GRID = {
    "mixed": (MIXED, Shape()),
    "uniform": (UNIFORM, Shape(group=1, kv_heads=3)),
    "one decode row": ((DECODE,), Shape(group=4, kv_heads=1)),
    "no prefix": ((plan(0, 4, 3),), Shape(group=1)),
    "prefix ends with a page": ((plan(64, 4, 0), plan(128, 4, 1)), Shape(page=64)),
    "head size 80": (MIXED, Shape(group=3, kv_heads=1, head_dim=80)),
    "head size 96": (UNIFORM, Shape(group=5, kv_heads=1, head_dim=96)),
    "head size 128": (MIXED, Shape(group=8, kv_heads=1, head_dim=128, page=64)),
    "head size 24": (UNIFORM, Shape(head_dim=24)),
    "page 4": (MIXED, Shape(page=4)),
    "page 8": (UNIFORM, Shape(page=8)),
    "page 48": ((plan(100, 2, 0),), Shape(page=48)),
    "page 256": ((plan(300, 2, 0),), Shape(page=256)),
    "many tiles": ((plan(70, 8, *range(8)), Request(prefix=10, prefill=75)), Shape(group=4, kv_heads=1, page=64)),
    "loose bounds": ((plan(70, 3, 2, slack=300), plan(0, 3, 0, slack=70), plan(150, 3, 1)), Shape(page=64)),
}
"""Batches and shapes at which every implementation is compared."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute and relative: a few roundings of the data type on outputs of order 1. Weights are rounded to it before the product
with the values."""


def attend(implementation: ModuleType, case: Case, **options: Any) -> Tensor:
    """Run ``prepare`` and ``paged_attention`` of an implementation."""
    prepared = implementation.prepare(case.metadata, case.shape.page, case.shape.group, case.q.dtype, **options)
    return implementation.paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, prepared, case.scale)


def check(out: Tensor, case: Case) -> None:
    """Compare an output with the reference, computed in float64 from the same rounded inputs and a clean cache."""
    expected = attend(reference, case.to(torch.float64).poisoned(0.0))
    assert out.shape == expected.shape
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
