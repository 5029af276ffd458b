"""Pages for what a step computes, and who gives pages back when there are none.

Shape suffixes: N requests of a step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.kv_cache_manager import NO_UPDATES, KVCacheManager
from engine.request_table import RequestTable
from engine.shares import BRANCHES, DRAFTS, PREFILL, Shares
from engine.step import IntArray


class PageReservation:
    """Reserves the pages of shares. ``preempt_newest`` takes slot and pages of the newest running request away.

    A request keeps the pages of rejected drafts, since it needs them again a step or two later. When the pool is dry, first
    all such pages are taken back; then, oldest request first, drafts are cut to the pages at hand, and the newest request is
    preempted, which may be the very one that asks.
    """

    def __init__(self, kv: KVCacheManager, table: RequestTable, preempt_newest: Callable[[], None]) -> None:
        self._kv, self._table, self._preempt_newest = kv, table, preempt_newest

    def reserve(self, shares: Shares) -> tuple[Shares, list[IntArray]]:
        """Get the pages; returns the shares that could be served, and updates of block tables."""
        updates = self._kv.allocate(shares.slots_N, self._needed(shares))
        if updates is None:
            self._reclaim()
            updates = self._kv.allocate(shares.slots_N, self._needed(shares))
        if updates is not None:
            return shares, [updates]
        served = [(row, one) for row in range(len(shares)) if (one := self._reserve_one(shares, row)) is not None]
        rows = np.array([row for row, _ in served], dtype=np.int64)
        return shares.keep(rows), [NO_UPDATES, *(one for _, one in served)]

    def can_give(self, count: int) -> bool:
        """Whether so many pages can be had without preempting anybody."""
        if count > self._kv.pool.num_free:
            self._reclaim()
        return count <= self._kv.pool.num_free

    def _reserve_one(self, shares: Shares, row: int) -> IntArray | None:
        """Updates of the block table of one request; None if it lost its slot, to an older one or by asking."""
        slot = int(shares.slots_N[row])
        one = shares.keep(np.array([row]))
        while self._table.requests[slot] is not None:
            updates = self._kv.allocate(one.slots_N, self._needed(one))
            if updates is not None:
                return updates
            shape = shares.shapes_N6[row]
            room = int(self._kv.num_pages_S[slot] * self._kv.page_size - one.max_computed_N[0] - shape[PREFILL])
            if 1 <= room < shape[DRAFTS]:
                shape[DRAFTS], shape[BRANCHES] = room, min(room, shape[BRANCHES])
                return NO_UPDATES
            self._preempt_newest()
        return None

    def _needed(self, shares: Shares) -> IntArray:
        """Positions that must have pages: those of all clean rows, but none that the request can never fill."""
        end_N = shares.max_computed_N + shares.shapes_N6[:, PREFILL] + shares.shapes_N6[:, DRAFTS]
        needed: IntArray = np.minimum(end_N, self._table.max_length_S[shares.slots_N] - 1)
        return needed

    def _in_use(self) -> IntArray:
        """Positions of each running request that hold exact K/V or that a launched step may write to."""
        slots_N = self._table.slots
        end_N = self._kv.num_computed_S[slots_N] + self._table.rows_in_flight(slots_N)
        in_use: IntArray = np.minimum(end_N, self._table.max_length_S[slots_N] - 1)
        return in_use

    def _reclaim(self) -> None:
        """Take back the pages of rejected drafts."""
        self._kv.truncate(self._table.slots, self._in_use())

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages and rows of the running requests agree."""
        table, kv, slots_N = self._table, self._kv, self._table.slots
        assert all(not kv.page_ids(slot) for slot in table.free_slots), "a free slot holds pages"
        # In the exact modes the last token has no K/V yet; a diffusion block is decided behind tokens that all have it.
        with_kv_N = table.num_tokens_S[slots_N] - table.verifies_S[slots_N]
        assert (kv.num_computed_S[slots_N] <= with_kv_N).all(), "a token has K/V before it is known"
        assert (kv.num_pages_S[slots_N] * kv.page_size >= self._in_use()).all(), "a launched step lacks a page"
