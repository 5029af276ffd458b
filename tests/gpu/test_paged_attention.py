"""The compiled attention kernel against the reference in float64, in the data types and sizes of real models."""

from __future__ import annotations

import pytest
import torch

from kernels.paged_attention import reference
from tests.kernels.cases import GRID, TOLERANCE, Request, Shape, attend, build, check, plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16]
QWEN3_8B = Shape(group=4, kv_heads=8, head_dim=128, page=64)
QWEN25_15B = Shape(group=6, kv_heads=2, head_dim=128, page=64)

LARGE = {
    "one decode row, long context": ((Request(prefix=8191, drafts=1),), QWEN3_8B),
    "all branches, batch 1": ((plan(1000, 8, *range(8)),), QWEN3_8B),
    "all branches of 16": ((plan(1024, 16, *range(16)),), QWEN25_15B),
    "decode batch": (tuple(Request(prefix=37 * i, drafts=1) for i in range(32)), QWEN25_15B),
    "pruned batch": (tuple(plan(101 * i, 8, 0, 5, slack=64) for i in range(8)), QWEN3_8B),
    "prefill beside decode": ((Request(prefix=512, prefill=600, drafts=1, branches=(0,), block=8), plan(3000, 8, 7)), QWEN3_8B),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("name", GRID)
def test_the_cases_of_the_interpreter(name, dtype, device):
    from kernels.paged_attention import triton

    case = build(*GRID[name], dtype).to(dtype, device)
    check(attend(triton, case.poisoned(NAN)), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"split_size": 0}, {"split_size": 64}, {"split_size": 512}], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large(name, options, dtype, device):
    from kernels.paged_attention import triton

    case = build(*LARGE[name], dtype).to(dtype, device)
    check(attend(triton, case.poisoned(NAN), **options), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_not_above_that_of_plain_torch(dtype, device):
    """The reference in the same data type also rounds; the kernel, which sums in float32, must not be coarser."""
    from kernels.paged_attention import triton

    case = build(*LARGE["all branches, batch 1"], dtype).to(dtype, device)
    exact = attend(reference, case.to(torch.float64))
    errors = [(attend(module, case).double() - exact).pow(2).mean().sqrt() for module in (triton, reference)]
    assert errors[0] < 1.5 * errors[1] + 0.01 * TOLERANCE[dtype]


def test_nothing_waits_for_the_device(device):
    from kernels.paged_attention import triton

    case = build(*LARGE["pruned batch"], torch.bfloat16).to(torch.bfloat16, device)
    attend(triton, case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attend(triton, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(out, case)


def test_a_captured_launch_follows_the_prefix_lengths(device):
    """Prepared outside, captured once, replayed as the requests grow and shrink below their upper bounds."""
    from kernels.paged_attention import triton

    shape = QWEN25_15B
    case = build(tuple(plan(900, 4, 1, 3) for _ in range(2)), shape, torch.bfloat16).to(torch.bfloat16, device)
    prepared = triton.prepare(case.metadata, shape.page, shape.group, torch.bfloat16, split_size=256)

    def run() -> torch.Tensor:
        return triton.paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, prepared, case.scale)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lengths in ([0, 900], [1, 64], [300, 513]):
        case.metadata.prefix_lengths.copy_(torch.tensor(lengths))
        graph.replay()
        check(out, case)


def test_page_offsets_beyond_32_bits(device):
    """A cache of more than 2^31 numbers: offsets of its last pages do not fit 32 bits."""
    from kernels.paged_attention import triton

    shape = Shape(group=4, kv_heads=8, head_dim=128, page=64)
    case = build((Request(prefix=100, drafts=1),), shape, torch.bfloat16).to(torch.bfloat16, device)
    num_pages = 2**31 // (8 * 64 * 128) + 10
    needed = 2 * 2 * num_pages * 8 * 64 * 128
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip("too little GPU memory is free")
    expected = attend(triton, case)
    table = case.metadata.block_table
    caches = [torch.empty(num_pages, 8, 64, 128, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for cache, source in zip(caches, (case.k_cache, case.v_cache), strict=True):
        cache[-len(source) :] = source
    table += num_pages - len(case.k_cache)
    prepared = triton.prepare(case.metadata, shape.page, shape.group, torch.bfloat16)
    assert torch.equal(triton.paged_attention(case.q, case.k, case.v, *caches, prepared, case.scale), expected)
