"""Attention of one step as the engine lays it out: metadata, projections and caches of several layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import PAGE, Limits, StepRig
from benchmarks.gpu.random_model import random_model
from benchmarks.gpu.shapes import Work
from engine.config import ModelConfig
from engine.step import DraftPlan
from kernels.backend import REFERENCE
from kernels.mask_layout import CLEAN, visible
from kernels.paged_attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """N requests of R rows each behind equally long prefixes; ``caches`` are K and V of several layers, with random numbers.

    Shapes: q [N * R, H, D]; k, v [N * R, G, D]; caches [pages, G, page_size, D]. ``seen`` [N, R, R] is the mask in the step.
    """

    config: ModelConfig
    num_requests: int
    num_rows: int
    context: int
    metadata: AttentionMetadata
    q: Tensor
    k: Tensor
    v: Tensor
    caches: list[tuple[Tensor, Tensor]]
    seen: Tensor

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.config.head_dim**-0.5)

    @property
    def group_size(self) -> int:
        """Query heads that share a key/value head."""
        return self.config.num_heads // self.config.num_kv_heads

    @property
    def work(self) -> Work:
        """Every cached token is read once; a pair of a row and a key it sees costs four operations a head and element."""
        c, rows, size = self.config, self.num_requests * self.num_rows, self.q.element_size()
        pairs = rows * self.context + int(self.seen.sum())
        cached = self.num_requests * self.context * 2 * c.num_kv_heads
        projected = rows * 2 * (c.num_heads + c.num_kv_heads)
        return Work(size * c.head_dim * (cached + projected), 4.0 * pairs * c.num_heads * c.head_dim)

    def pages_each(self) -> int:
        """Pages of one request, the rows of the step included."""
        return -(-(self.context + self.num_rows) // PAGE)


def attention_rig(bench: Bench, config: ModelConfig, max_batch: int, max_context: int, max_rows: int) -> StepRig:
    """An engine that lays out decode steps of up to so many requests, tokens of context, and rows of a request."""
    longest = max_context + 512
    pages = 1 + max_batch * (longest // PAGE + 1)
    network = random_model(config, bench.dtype, bench.device, REFERENCE)
    return StepRig(bench, network, Limits(max_batch, longest, pages, max_rows=max_batch * max_rows))


def attention_case(bench: Bench, rig: StepRig, num_requests: int, plan: DraftPlan, context: int) -> AttentionCase:
    """The attention of a decode step, laid out by the engine itself."""
    config = rig.core.runner.model.config
    rig.admit(num_requests, context)
    rig.hold(num_requests, plan, context)
    metadata = rig.core.decoder.lay_out(rig.step(num_requests, plan, context)).attention
    return _with_tensors(bench, config, num_requests, plan.num_rows, context, metadata)


def prefill_case(bench: Bench, config: ModelConfig, num_requests: int, num_rows: int, context: int) -> AttentionCase:
    """The attention of prompts of which ``context`` tokens are cached: every row is clean and sees those before it."""
    each, device = -(-(context + num_rows) // PAGE), bench.device
    starts = torch.arange(num_requests + 1, device=device) * num_rows
    limit = torch.arange(1, num_rows + 1, device=device).repeat(num_requests)
    metadata = AttentionMetadata(
        row_starts=tuple(starts.tolist()),
        device_row_starts=starts,
        prefix_lengths=torch.full((num_requests,), context, device=device),
        max_prefix=(context,) * num_requests,
        block_table=1 + torch.arange(num_requests * each, device=device).view(num_requests, each),
        limit=limit,
        branch=torch.full_like(limit, CLEAN),
    )
    return _with_tensors(bench, config, num_requests, num_rows, context, metadata)


def _with_tensors(
    bench: Bench, config: ModelConfig, num_requests: int, num_rows: int, context: int, metadata: AttentionMetadata
) -> AttentionCase:
    rows, pages = num_requests * num_rows, int(metadata.block_table.max()) + 1
    layer = 2 * num_requests * context * config.num_kv_heads * config.head_dim * bench.dtype.itemsize

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=bench.dtype, device=bench.device)

    shape = (pages, config.num_kv_heads, PAGE, config.head_dim)
    q, k, v = (random(rows, n, config.head_dim) for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
    caches = [(random(*shape), random(*shape)) for _ in range(bench.copies(layer))]
    by_request = (num_requests, num_rows)
    seen = visible(metadata.limit.view(by_request), metadata.branch.view(by_request))
    return AttentionCase(config, num_requests, num_rows, context, metadata, q, k, v, caches, seen)
