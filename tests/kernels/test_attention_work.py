"""The work list made on the device: every key of every tile once, within the buffers, shared out evenly."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from kernels.mask_layout import CLEAN
from kernels.paged_attention.metadata import AttentionMetadata
from kernels.paged_attention.settings import TileSettings

TILE, GROUP, HEADS = TileSettings(64), 4, 2
BLOCK_M, BLOCK_N = TILE.block_m, TILE.block_n
SEGMENT = 1024


def metadata_of(rows: list[int], prefixes: list[int], device: torch.device) -> AttentionMetadata:
    """Requests of clean rows only; the kernels under test read neither the cache nor the block table."""
    starts = torch.tensor([0, *rows]).cumsum(0)
    limit = torch.cat([torch.arange(n) + 1 for n in rows])
    return AttentionMetadata(
        row_starts=tuple(starts.tolist()),
        device_row_starts=starts.to(device),
        prefix_lengths=torch.tensor(prefixes, device=device),
        max_prefix=tuple(prefixes),
        block_table=torch.zeros(len(rows), 1, dtype=torch.long, device=device),
        limit=limit.to(device),
        branch=torch.full_like(limit, CLEAN).to(device),
    )


LONG = 131_072
BATCHES = {
    "one long decode": ([1], [LONG - 1]),
    "drafts, of all lengths": ([9] * 6, [LONG, 70_000, 3_000, 64, 1, 0]),
    "a straggler among many": ([1] * 24, [500] * 23 + [LONG]),
    "prefill beside decode": ([200, 1, 1, 0, 17], [8_192, 4_000, 300, 9, 0]),
    "nothing cached": ([1, 33], [0, 0]),
    "more than are looked at together": ([1, 2, 20] * 45, [300, 0, 900] * 44 + [300, 0, LONG]),
}


@pytest.mark.parametrize("split_size", [0, SEGMENT])
@pytest.mark.parametrize("name", BATCHES)
def test_every_key_of_every_tile_once(name, split_size, device):
    from kernels.paged_attention.triton_work import Height, make_work_list

    rows, prefixes = BATCHES[name]
    metadata = metadata_of(rows, prefixes, device)
    programs = 24
    work = make_work_list(metadata, Height(TILE), GROUP, HEADS, programs, 256, split_size)
    num_items, num_merges, num_tiles = work.counts.tolist()
    assert num_items <= len(work.items)
    assert num_merges <= len(work.merges)
    assert num_tiles == sum(-(-n * GROUP // BLOCK_M) for n in rows)

    pieces = defaultdict(list)
    for request, first_row, num_rows, first_packed, begin, end, _, mask_end, partial, *_ in work.items[:num_items].tolist():
        assert (first_row, num_rows) == (metadata.row_starts[request], rows[request])
        assert mask_end == 0
        pieces[request, first_packed].append((begin, end, partial))
    assert len(pieces) == num_tiles

    partials = [partial for tile in pieces.values() for *_, partial in tile if len(tile) > 1]
    assert sorted(partials) == list(range(len(partials)))
    assert len(partials) <= work.num_partials
    for (request, first_packed), tile in pieces.items():
        last_row = min(first_packed + BLOCK_M - 1, rows[request] * GROUP - 1) // GROUP
        edges = [0, *(end for _, end, _ in tile)]
        assert [begin for begin, *_ in tile] == edges[:-1] or split_size
        assert edges[-1] == prefixes[request] + last_row + 1
        if split_size and len(tile) > 1:
            seen = edges[-1]
            assert [tuple(piece[:2]) for piece in tile] == [
                (i * SEGMENT, min((i + 1) * SEGMENT, seen)) for i in range(len(tile))
            ]
        elif len(tile) == 1:
            assert tile[0][2] == -1
        else:
            assert all(end % BLOCK_N == 0 and end <= prefixes[request] for _, end, _ in tile[:-1])

    merged = {
        (first_row, first_packed): (partial, n)
        for first_row, _, first_packed, partial, n, *_ in work.merges[:num_merges].tolist()
    }
    assert merged == {
        (metadata.row_starts[request], first_packed): (tile[0][2], len(tile))
        for (request, first_packed), tile in pieces.items()
        if len(tile) > 1
    }


def test_pieces_fill_the_machine(device):
    """One tile becomes as many equal pieces as there is room for; where tiles fill the machine only a straggler is cut."""
    from kernels.paged_attention.triton_work import Height, make_work_list

    def lengths(name: str) -> list[int]:
        metadata = metadata_of(*BATCHES[name], device)
        work = make_work_list(metadata, Height(TILE), GROUP, HEADS, 24, 256, 0)
        items = work.items[: work.counts[0]]
        return (items[:, 5] - items[:, 4]).tolist()

    alone = lengths("one long decode")
    assert len(alone) == 11
    assert max(alone) - min(alone) <= 11 * BLOCK_N
    straggler = lengths("a straggler among many")
    assert straggler[:23] == [501] * 23
    assert 6 <= len(straggler[23:]) <= 7
