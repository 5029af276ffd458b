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
from kernels.paged_attention.settings import AttentionSettings, TileSettings
from tests.kernels.cases import DECODE, GRID, MIXED, TENSORS, TOLERANCE, Request, Shape, attend, build, check, naive, plan

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


SPLIT = {"num_kv_heads": 1, "num_programs": 8, "min_split": 32}
"""Pieces of a context as short as those of these cases."""

HALF = ("mixed", "one decode row", "head size 80", "head size 96", "head size 128", "page 48", "many tiles")
"""In float16. The interpreter keeps bfloat16 as integers and multiplies these, so it takes a GPU to see bfloat16."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in GRID] + [(name, torch.float16) for name in HALF],
)
def test_triton(name, dtype, device):
    from kernels.paged_attention import triton

    case = build(*GRID[name], dtype).to(dtype, device)
    check(attend(triton, case.poisoned(NAN)), case)


@pytest.mark.parametrize("seed", range(4))
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
    options = SPLIT if pick(0, 1) else {}
    check(attend(triton, case.to(torch.float32, device).poisoned(NAN), **options), case.to(torch.float32, device))


@pytest.mark.parametrize(
    ("name", "dtype"), [("mixed", torch.float32), ("many tiles", torch.float16), ("loose bounds", torch.float32)]
)
def test_triton_with_the_context_in_pieces(name, dtype, device):
    from kernels.paged_attention import triton

    batch, shape = GRID[name]
    case = build((*batch, Request(prefix=230, drafts=1)), shape, dtype).to(dtype, device)
    lists = triton.prepare(case.metadata, shape.page, shape.group, dtype, **SPLIT).lists
    assert sum(int(work.counts[1]) for work in lists), "some tile is in pieces"
    check(attend(triton, case.poisoned(NAN), **SPLIT), case)


@pytest.mark.parametrize("page", [64, 128, 48])
@pytest.mark.parametrize("tile", [TileSettings(16, 128), TileSettings(64, 128, 8, 2, 1)], ids=str)
def test_triton_with_large_key_blocks(tile, page, device):
    """Of two pages, of one, and of parts of several; contexts that end in any of them."""
    from kernels.paged_attention import triton

    batch = (plan(333, 4, 1), Request(128, prefill=40), Request(65, drafts=3), Request(64), Request(1, drafts=2))
    case = build(batch, Shape(kv_heads=1, page=page), torch.float16).to(torch.float16, device)
    for min_split in (64, 2**30):
        settings = AttentionSettings((tile,), min_split=min_split, num_programs=8)
        check(attend(triton, case.poisoned(NAN), num_kv_heads=1, settings=settings), case)


def test_triton_over_128k_tokens(device):
    """In as many pieces as an H100 makes of it with eight key/value heads, which is more than are merged at a time.

    In float32: a key is one of so many that 16 bits would not show the loss of a whole page.
    """
    from kernels.paged_attention import triton

    shape = Shape(group=4, kv_heads=1, head_dim=16, page=64)
    case = build((Request(70, drafts=1), plan(131_067, 2, 1)), shape, torch.float32).to(torch.float32, device)
    options = {"num_kv_heads": 1, "settings": AttentionSettings((TileSettings(16),), num_programs=48)}
    (work,) = triton.prepare(case.metadata, shape.page, shape.group, torch.float32, **options).lists
    assert int(work.merges[0, 4]) > triton._MERGED
    check(attend(triton, case.poisoned(NAN), **options), case)
    shorter = replace(case.metadata, prefix_lengths=case.metadata.prefix_lengths - torch.tensor([0, 1], device=device))
    with pytest.raises(AssertionError, match="not close"):
        check(attend(reference, replace(case.poisoned(0.0), metadata=shorter)), case)


def test_triton_follows_the_device_alone(device):
    """A captured step is replayed with other prefix lengths and other rows: what the host knew at capture must not matter."""
    from kernels.paged_attention import triton

    shape = Shape(kv_heads=1)
    first = build((plan(60, 4, 1), Request(0, drafts=1), Request(30, prefill=11)), shape, torch.float32).to(
        torch.float32, device
    )
    second = build((Request(9, drafts=1), plan(130, 4, 2, 0), Request(0, drafts=7)), shape, torch.float32).to(
        torch.float32, device
    )
    assert len(first.q) == len(second.q)
    hints = replace(second.metadata, row_starts=first.metadata.row_starts, max_prefix=first.metadata.max_prefix)
    check(attend(triton, replace(second, metadata=hints).poisoned(NAN), **SPLIT), second)


def test_triton_rows_and_requests_of_nobody_are_harmless(device):
    """A bucket is larger than its step: requests without rows, whose lengths mean nothing, and rows behind the last request."""
    from kernels.paged_attention import triton

    case = build((plan(40, 3, 1), DECODE), Shape(), torch.float32).to(torch.float32, device)
    used, spare = len(case.q), 5
    m = case.metadata

    def more(tensor: torch.Tensor, value: float, number: int = spare) -> torch.Tensor:
        return torch.cat((tensor, tensor.new_full((number, *tensor.shape[1:]), value)))

    metadata = replace(
        m,
        row_starts=(*m.row_starts, used, used),
        device_row_starts=more(m.device_row_starts, used, 2),
        prefix_lengths=more(m.prefix_lengths, 12345, 2),
        block_table=more(m.block_table, 2**30, 2),
        limit=more(m.limit, 9),
        branch=more(m.branch, 1),
    )
    larger = replace(case, metadata=metadata, **{name: more(getattr(case, name), NAN) for name in ("q", "k", "v")})
    for options in ({}, SPLIT, {"batch_invariant": True}):
        out = attend(triton, larger.poisoned(NAN), **options)
        check(out[:used], case)
        assert torch.equal(out[used:], torch.zeros_like(out[used:]))


def test_triton_tiles_visit_only_keys_that_they_can_see(device):
    """48 prefill rows and 16 drafts behind 3 tokens, then three branches of 32 rows, in tiles of 32 rows."""
    from kernels.paged_attention import triton

    batch = (Request(prefix=3, prefill=48, drafts=16, branches=(3, 1, 15), block=32), DECODE)
    shape = Shape(group=1, kv_heads=1, head_dim=16)
    case = build(batch, shape, torch.float32).to(torch.float32, device)
    small, large = triton.prepare(case.metadata, shape.page, shape.group, torch.float32).lists
    assert (small.tile.block_m, large.tile.block_m) == (16, 32)
    # Request, first packed index, begin and end of the clean keys, begin and end of the mask keys.
    fields = [0, 3, 4, 5, 6, 7]
    assert small.items[: small.counts[0], fields[:4]].tolist() == [[1, 0, 0, 38]]
    assert large.items[: large.counts[0], fields].tolist() == [
        [0, 128, 0, 67, 128, 160],
        [0, 96, 0, 53, 96, 128],
        [0, 64, 0, 55, 64, 96],
        [0, 32, 0, 67, 2**31 - 1, 0],
        [0, 0, 0, 35, 2**31 - 1, 0],
    ]
    check(attend(triton, case), case)


def test_triton_takes_any_strides_and_integer_types(device):
    """Caches of all layers may be slices of one tensor, and index tensors may have 32 bits."""
    from kernels.paged_attention import triton

    case = build(MIXED, Shape(), torch.float32).to(torch.float32, device)
    both = torch.stack((case.k_cache, case.v_cache), dim=2)
    narrow = {name: getattr(case.metadata, name).int() for name in TENSORS}
    other = replace(case, k_cache=both[:, :, 0], v_cache=both[:, :, 1], metadata=replace(case.metadata, **narrow))
    assert torch.equal(attend(triton, other), attend(triton, case))
    # The bits are also the same from run to run, whoever computes which piece.
    assert torch.equal(attend(triton, other, **SPLIT), attend(triton, case, **SPLIT))


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
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu", "--few"]
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
