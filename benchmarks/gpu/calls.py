"""A first look in three time-boxed runs (``--call``): which parts, in which order, and how many seconds each of them wants.

What the targets need comes in the first two. Within a part its cells are ordered alike, so that a cut loses the least. Time
that one part leaves, an absent peer for example, goes to those behind it.
"""

from __future__ import annotations

CALL_MINUTES = 9.0

CALLS: tuple[dict[str, float], ...] = (
    {
        "checks": 130.0,
        "machine": 25.0,
        "gemm.8b": 75.0,
        "step.8b.triton": 75.0,
        "throughput.8b.plans": 235.0,
    },
    {
        "attention.8b": 60.0,
        "gemm.1.5b": 65.0,
        "step.1.5b.triton": 45.0,
        "throughput.1.5b.plans": 140.0,
        "throughput.8b.long": 100.0,
        "peers.8b.ours": 30.0,
        "peers.8b.gpt_fast": 70.0,
        "profile.8b": 30.0,
    },
    {
        "streams.8b": 105.0,
        "yardsticks.8b.flash_attention": 20.0,
        "yardsticks.8b.flashinfer_masked": 75.0,
        "peers.8b.transformers_generate": 55.0,
        "peers.8b.mini_sglang": 50.0,
        "streams.1.5b": 65.0,
        "peers.1.5b.ours": 20.0,
        "peers.1.5b.gpt_fast": 40.0,
        "peers.1.5b.transformers_generate": 35.0,
        "yardsticks.8b.flashinfer_merged": 40.0,
        "attention.1.5b": 20.0,
        "yardsticks.1.5b.flashinfer_masked": 15.0,
    },
)
