"""The reference against the definition, and the Triton kernel (interpreted where there is no GPU) against the reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.paged_attention import reference
from tests.kernels.cases import DECODE, GRID, MIXED, TOLERANCE, Request, Shape, attend, build, check, naive, plan

NAN = float("nan")


@st.composite
def requests(draw):
    num_drafts = draw(st.integers(0, 4))
    branches = draw(st.permutations(range(num_drafts)).map(tuple)) if num_drafts else ()
    return Request(
        prefix=draw(st.integers(0, 20)),
        prefill=draw(st.integers(0 if num_drafts else 1, 6)),
        drafts=num_drafts,
        branches=branches[: draw(st.integers(0, num_drafts))],
        block=draw(st.integers(1, 4)),
        padding_drafts=draw(st.integers(0, 2)),
        padding_rows=draw(st.integers(0, 2)),
        slack=draw(st.sampled_from([0, 1, 9])),
    )


@pytest.mark.parametrize("name", GRID)
def test_reference_is_the_softmax_over_each_rows_listed_keys(name):
    batch, shape = GRID[name]
    # The definition is slow where many rows meet many keys; small heads keep it quick.
    case = build(batch, replace(shape, head_dim=8), torch.float64)
    torch.testing.assert_close(attend(reference, case), naive(case), atol=1e-12, rtol=1e-12)


@settings(max_examples=40)
@given(batch=st.lists(requests(), min_size=1, max_size=4).map(tuple), group=st.integers(1, 3), page=st.sampled_from([1, 4, 16]))
def test_reference_on_any_batch(batch, group, page):
    case = build(batch, Shape(group=group, kv_heads=2, head_dim=4, page=page), torch.float64)
    torch.testing.assert_close(attend(reference, case), naive(case), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_ignores_slots_that_hold_no_token(dtype):
    """Any finite number; NaN is outside the reference's contract, see its docstring."""
    case = build(MIXED, Shape(), dtype)
    assert torch.equal(attend(reference, case.poisoned(1e30)), attend(reference, case.poisoned(0.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", GRID)
def test_triton(name, dtype, device):
    from kernels.paged_attention import triton

    case = build(*GRID[name], dtype).to(dtype, device)
    check(attend(triton, case.poisoned(NAN)), case)


@pytest.mark.parametrize("seed", range(6))
def test_triton_on_random_batches(seed, device):
    from kernels.paged_attention import triton

    random = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    batch = []
    for _ in range(pick(1, 4)):
        k = pick(1, 5)
        branches = torch.randperm(k, generator=random)[: pick(0, k)].tolist()
        prefill = pick(0, 40) * pick(0, 1)
        batch.append(Request(pick(0, 90), prefill, k, tuple(branches), k, pick(0, 2), pick(0, 2), slack=pick(0, 40)))
    case = build(tuple(batch), Shape(group=pick(1, 7), page=2 ** pick(2, 6), head_dim=32), torch.float32, seed)
    check(attend(triton, case.to(torch.float32, device).poisoned(NAN)), case.to(torch.float32, device))


@pytest.mark.parametrize(("dtype", "split_size"), [(torch.float32, 32), (torch.float32, 96), (torch.float16, 64)])
@pytest.mark.parametrize("name", ["mixed", "many tiles", "loose bounds"])
def test_triton_with_the_context_split(name, dtype, split_size, device):
    from kernels.paged_attention import triton

    batch, shape = GRID[name]
    batch = (*batch, Request(prefix=230, drafts=1))
    case = build(batch, shape, dtype).to(dtype, device)
    assert any(
        x.num_partials for x in triton.prepare(case.metadata, shape.page, shape.group, dtype, split_size=split_size).launches
    )
    check(attend(triton, case.poisoned(NAN), split_size=split_size), case)


def test_triton_reads_prefix_lengths_when_it_runs(device):
    """They are device state: prepared work must serve whatever they hold by the time of the launch."""
    from kernels.paged_attention import triton

    shape = Shape()
    case = build((plan(70, 2, 0, slack=26), plan(40, 2, 1)), shape, torch.float32).to(torch.float32, device)
    prepared = triton.prepare(case.metadata, shape.page, shape.group, torch.float32, split_size=32)
    for lengths in ([0, 40], [33, 1], [64, 32]):
        case.metadata.prefix_lengths.copy_(torch.tensor(lengths))
        case.held.fill_(True)
        out = triton.paged_attention(case.q, case.k, case.v, case.k_cache, case.v_cache, prepared, case.scale)
        check(out, case)


def test_triton_tiles_visit_only_key_blocks_that_they_can_see(device):
    """Blocks are of 32 keys in float32: 48 prefill rows and 16 drafts are two clean blocks, each branch of 32 is one more."""
    from kernels.paged_attention import triton

    batch = (Request(prefix=3, prefill=48, drafts=16, branches=(3, 1, 15), block=32), DECODE)
    shape = Shape(group=1, kv_heads=1, head_dim=16)
    case = build(batch, shape, torch.float32).to(torch.float32, device)
    prepared = triton.prepare(case.metadata, shape.page, shape.group, torch.float32)
    small, large = prepared.launches
    assert (small.block_m, large.block_m, prepared.step_n) == (16, 32, 32)

    def visited(items: torch.Tensor) -> list[list[int]]:
        fields = items[:, 7:10].tolist()
        return [[i if i < clean else i + gap for i in range(total)] for clean, gap, total in fields]

    assert visited(small.items) == [[0]]
    assert visited(large.items) == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4]]
    check(attend(triton, case), case)


def test_triton_gives_the_same_bits_again(device):
    from kernels.paged_attention import triton

    case = build(MIXED, Shape(), torch.float32).to(torch.float32, device)
    assert torch.equal(attend(triton, case, split_size=32), attend(triton, case, split_size=32))


def test_triton_takes_any_strides_and_integer_types(device):
    """Caches of all layers may be slices of one tensor, and index tensors may have 32 bits."""
    from kernels.paged_attention import triton

    case = build(MIXED, Shape(), torch.float32).to(torch.float32, device)
    both = torch.stack((case.k_cache, case.v_cache), dim=2)
    narrow = {name: getattr(case.metadata, name).int() for name in ("prefix_lengths", "block_table", "limit", "branch")}
    other = replace(case, k_cache=both[:, :, 0], v_cache=both[:, :, 1], metadata=replace(case.metadata, **narrow))
    assert torch.equal(attend(triton, other), attend(triton, case))


def test_triton_refuses_what_it_cannot_do(device):
    from kernels.paged_attention import triton

    case = build((DECODE,), Shape(), torch.float32).to(torch.float32, device)
    with pytest.raises(ValueError, match="float64"):
        triton.prepare(case.metadata, 16, 2, torch.float64)
    with pytest.raises(ValueError, match="not a multiple"):
        triton.prepare(case.metadata, 16, 2, torch.float32, split_size=40)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_compiles_for_a_gpu(tmp_path):
    """The interpreter accepts much that the compiler does not; compiling takes no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_comparison_is_sharp_enough():
    """One key too many or too few must not pass for rounding."""
    case = build(MIXED, Shape(), torch.float64)
    limit = case.metadata.limit.clone()
    limit[case.metadata.limit > 1] -= 1
    wrong = attend(reference, replace(case, metadata=replace(case.metadata, limit=limit)))
    row_error = (wrong - attend(reference, case)).abs().amax((1, 2))[case.metadata.limit > 1]
    assert row_error.min() > TOLERANCE[torch.float16]
