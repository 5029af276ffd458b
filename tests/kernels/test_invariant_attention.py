"""The batch-invariant attention, on the CPU and in Triton: right, and bit for bit the same in any step and any company."""

from __future__ import annotations

import pytest
import torch

from kernels.paged_attention import invariant, reference
from tests.kernels.cases import GRID, Case, Request, Shape, attend, build, check, plan
from tests.kernels.invariance import Attend, check_clean_rows, check_company

NAN = float("nan")
CPU = torch.device("cpu")
MODEL_SHAPES = [
    Shape(group=1, kv_heads=3, head_dim=16, page=16),
    Shape(group=2, kv_heads=2, head_dim=64, page=64),
    Shape(group=3, kv_heads=1, head_dim=80, page=7),
    Shape(group=5, kv_heads=2, head_dim=96, page=64),
    Shape(group=6, kv_heads=1, head_dim=128, page=64),
    Shape(group=8, kv_heads=1, head_dim=32, page=4),
]


@pytest.fixture(params=[1, 3])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", GRID)
def test_cpu(name, dtype):
    case = build(*GRID[name], dtype).poisoned(1e30)
    check(attend(invariant, case), case)


def test_cpu_requests_without_rows_and_rows_that_see_nothing():
    case = build((Request(20), plan(9, 2, 1), Request(0), Request(0, prefill=2)), Shape(), torch.float32)
    case.metadata.limit[-2:] = 0
    out = attend(invariant, case)
    assert torch.equal(out[-2:], torch.zeros_like(out[-2:]))
    alone = build((plan(9, 2, 1),), Shape(), torch.float32)
    for name in ("q", "k", "v"):
        getattr(alone, name).copy_(getattr(case, name)[:-2])
    mine, theirs = int(alone.metadata.block_table[0, 0]), int(case.metadata.block_table[1, 0])
    alone.k_cache[mine], alone.v_cache[mine] = case.k_cache[theirs], case.v_cache[theirs]
    check(out[:-2], alone)


def cpu(case: Case) -> torch.Tensor:
    return attend(invariant, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_cpu_clean_rows_do_not_depend_on_the_step(shape, dtype, num_threads):
    check_clean_rows([cpu], shape, dtype, CPU, 150, seed=num_threads)
    check_company(cpu, shape, dtype, CPU, seed=num_threads)


def triton_in(**options: int) -> Attend:
    """The Triton kernel with segments of 64 positions, on caches that are poisoned where no row may look."""
    from kernels.paged_attention import triton

    return lambda case: attend(triton, case.poisoned(NAN), batch_invariant=True, split_size=64, **options)


IN_PIECES = {"num_kv_heads": 1, "num_programs": 8, "min_split": 0}
"""A program takes a segment; by default a tile."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mixed", torch.float32),
        ("many tiles", torch.float16),
        ("loose bounds", torch.float32),
        ("head size 80", torch.float16),
        ("head size 96", torch.float32),
        ("head size 128", torch.float16),
    ],
)
def test_triton(name, dtype, device):
    case = build(*GRID[name], dtype).to(dtype, device)
    whole, pieces = (triton_in(**options)(case) for options in ({}, IN_PIECES))
    check(whole, case)
    assert torch.equal(whole, pieces)


def test_triton_whole_tiles_and_pieces_are_cut_as_their_names_say(device):
    from kernels.paged_attention import triton

    case = build((Request(200, drafts=3), Request(10, drafts=1)), Shape(), torch.float32).to(torch.float32, device)
    for options, merges in (({}, 0), (IN_PIECES, 1)):
        prepared = triton.prepare(case.metadata, 16, 2, torch.float32, batch_invariant=True, split_size=64, **options)
        assert prepared.lists[0].counts.tolist() == [5 if merges else 2, merges, 2]


@pytest.mark.parametrize(
    ("seed", "group", "head_dim", "dtype"),
    [
        (0, 1, 16, torch.float32),
        (1, 2, 80, torch.float16),
        (2, 3, 96, torch.float32),
        (3, 4, 64, torch.float32),
        (4, 1, 128, torch.float16),
    ],
)
def test_triton_clean_rows_do_not_depend_on_the_step(seed, group, head_dim, dtype, device):
    shape = Shape(group=group, kv_heads=1, head_dim=head_dim, page=64)
    check_clean_rows([triton_in(), triton_in(**IN_PIECES)], shape, dtype, device, 90, seed)


@pytest.mark.parametrize("seed", range(2))
def test_triton_rows_do_not_depend_on_the_company(seed, device):
    check_company(triton_in(), Shape(kv_heads=1, head_dim=16, page=64), torch.float32, device, seed)


def test_comparison_is_sharp_enough(device):
    """The kernel that cuts the context by the load, and the reference, do depend on the step."""
    from kernels.paged_attention import triton

    shape = Shape(kv_heads=1, head_dim=16, page=64)
    by_load = {"num_kv_heads": 1, "num_programs": 8, "min_split": 32}
    for attend_case in (lambda case: attend(triton, case, **by_load), lambda case: attend(reference, case)):
        with pytest.raises(AssertionError, match="position"):
            check_clean_rows([attend_case], shape, torch.float32, device, 90, 0)
