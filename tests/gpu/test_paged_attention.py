"""The compiled attention kernel against the reference in float64, in the data types and sizes of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.paged_attention import reference
from kernels.paged_attention.settings import AttentionSettings, TileSettings
from tests.gpu.waiting import no_waiting
from tests.kernels.cases import GRID, TOLERANCE, Case, Request, Shape, attend, build, check, plan
from tests.kernels.invariance import check_clean_rows, check_company

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
    "one long request among short ones": ((*[Request(prefix=90, drafts=1)] * 40, plan(20_000, 8, 0)), QWEN3_8B),
    "128k": ((Request(prefix=131_071, drafts=1), plan(131_000, 8, 0)), QWEN25_15B),
    "prefill beside decode": ((Request(prefix=512, prefill=600, drafts=1, branches=(0,), block=8), plan(3000, 8, 7)), QWEN3_8B),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("name", GRID)
def test_the_cases_of_the_interpreter(name, dtype, device):
    from kernels.paged_attention import triton

    case = build(*GRID[name], dtype).to(dtype, device)
    check(attend(triton, case.poisoned(NAN)), case)


IN_PIECES = {"min_split": 64, "num_programs": 4096}
"""As short as they come; in the batch-invariant setting, a program for every segment."""

WHOLE = {"min_split": 2**30}
"""A program for every tile."""

WIDE = {"settings": AttentionSettings((TileSettings(16, 128), TileSettings(128, 128, num_warps=8, num_stages=2)))}
"""Key blocks of 128, which are two pages of 64."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, IN_PIECES, WHOLE, WIDE, {"batch_invariant": True}], ids=["default", "pieces", "whole", "wide", "invariant"]
)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.smoke_where(dtype=torch.bfloat16, options={}, name=["all branches, batch 1", "prefill beside decode"])
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


@pytest.mark.smoke
def test_nothing_waits_for_the_device(device):
    from kernels.paged_attention import triton

    case = build(*LARGE["pruned batch"], torch.bfloat16).to(torch.bfloat16, device)
    attend(triton, case)  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        out = attend(triton, case)
    check(out, case)


def in_step(case: Case, requests: tuple[Request, ...]) -> Case:
    """Another step in the tensors of a case, with its cache and block table; on the host, too, what the reference asks for."""
    other = build(requests, case.shape, case.q.dtype)
    case.held.fill_(True)
    for name in ("device_row_starts", "prefix_lengths"):
        getattr(case.metadata, name).copy_(getattr(other.metadata, name))
    rows = len(other.q)
    for name in ("limit", "branch"):
        getattr(case.metadata, name)[:rows] = getattr(other.metadata, name)
    metadata = replace(
        case.metadata,
        row_starts=other.metadata.row_starts,
        max_prefix=other.metadata.max_prefix,
        limit=case.metadata.limit[:rows],
        branch=case.metadata.branch[:rows],
    )
    return replace(case, q=case.q[:rows], k=case.k[:rows], v=case.v[:rows], metadata=metadata)


STEPS = (
    (plan(900, 4, 1, 3), plan(900, 4, 0, 1), plan(640, 4, 2, 3)),
    (plan(0, 4, 1, 3), plan(1, 4, 0, 1), plan(63, 4, 2, 3)),
    (Request(700, drafts=1), Request(300, prefill=23), plan(10, 4, 0, 2)),
    (Request(0, prefill=30), Request(12), plan(64, 2, 1)),
)
"""Of as many requests and at most as many rows as the first, which is captured."""


@pytest.mark.smoke_where(dtype=torch.bfloat16, options={})
@pytest.mark.parametrize("options", [{}, {"min_split": 64}, {"batch_invariant": True, "split_size": 256}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_step_follows_the_device(dtype, options, device):
    """The work list is part of the capture. Replays have other prefix lengths and spread the rows differently."""
    from kernels.paged_attention import triton

    case = build(STEPS[0], QWEN25_15B, dtype).to(dtype, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(triton, case, num_kv_heads=2, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(triton, case, num_kv_heads=2, **options)
    for requests in (*STEPS, STEPS[0]):
        step = in_step(case, requests)
        out.fill_(float("nan"))
        graph.replay()
        check(out[: len(step.q)], step)
        assert torch.equal(out[len(step.q) :], torch.zeros_like(out[len(step.q) :]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [QWEN3_8B, QWEN25_15B, Shape(group=5, kv_heads=4, head_dim=80, page=16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(dtype, shape, seed, device):
    """Bit for bit: a clean row alone, as a draft, in a prompt, in any company, whoever computes the segments."""
    from kernels.paged_attention import triton

    attends = [
        lambda case, options=options: attend(triton, case.poisoned(NAN), batch_invariant=True, split_size=256, **options)
        for options in ({}, IN_PIECES, WHOLE)
    ]
    check_clean_rows(attends, shape, dtype, device, 900, seed)
    check_company(attends[0], shape, dtype, device, seed)


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
