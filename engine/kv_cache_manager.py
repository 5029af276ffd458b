"""Moves pages between requests and the pool: match_prefix, allocate, commit, truncate, free.

A sequence's pages cover its positions in order. Below ``num_computed`` every slot holds exact causal K/V; at and above it
slots hold drafts that were not accepted, or nothing. Sequences are numbered by the slots of their requests, S of them, and
the verbs of a decode step take columns over N of them.
"""

from __future__ import annotations

import hashlib

import numpy as np

from engine.page_pool import PagePool
from engine.step import IntArray, TokenArray, spread

NO_UPDATES: IntArray = np.zeros((0, 3), dtype=np.int64)
"""Nothing to change in block tables."""


class KVCacheManager:
    """The only one that moves pages; only ``commit`` moves ``num_computed`` up and only ``truncate`` moves it down.

    Columns, for others to read: ``num_computed_S``, ``num_pages_S``. ``_next_full_S``: computed tokens from which on one more
    page is full; those before it are shareable.
    """

    def __init__(self, pool: PagePool, page_size: int, num_sequences: int, share_prefixes: bool = True) -> None:
        self.pool, self.page_size, self.share_prefixes = pool, page_size, share_prefixes
        self.num_computed_S: IntArray = np.zeros(num_sequences, dtype=np.int64)
        self.num_pages_S: IntArray = np.zeros(num_sequences, dtype=np.int64)
        self._next_full_S: IntArray = np.zeros(num_sequences, dtype=np.int64)
        self._page_ids: list[list[int]] = [[] for _ in range(num_sequences)]
        # Of the full pages of each sequence: a page's hash includes that of the page before it.
        self._last_hash = [b""] * num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens that all pages have room for."""
        return (self.pool.num_pages - 1) * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that cover ``num_tokens`` positions."""
        return -(-num_tokens // self.page_size)

    def page_ids(self, slot: int) -> list[int]:
        """The pages of a sequence, in order; for reading."""
        return self._page_ids[slot]

    def match_prefix(self, slot: int, token_ids: TokenArray, salt: str) -> int:
        """Start a sequence with the longest shared prefix of whole pages; return how many tokens that covers.

        The last token is never taken from the cache: it has to be computed to draw the next one. Tenants with different salts
        never share.
        """
        page_ids = self._page_ids[slot]
        assert not page_ids, "the slot has a sequence"
        last_hash = _hash(b"", salt.encode())
        for start in range(0, len(token_ids) - self.page_size if self.share_prefixes else 0, self.page_size):
            prefix_hash = _hash(last_hash, token_ids[start : start + self.page_size].tobytes())
            page = self.pool.find(prefix_hash)
            if page is None:
                break
            self.pool.share(page)
            page_ids.append(page)
            last_hash = prefix_hash
        self._last_hash[slot] = last_hash
        count = len(page_ids)
        self.num_pages_S[slot], self.num_computed_S[slot] = count, count * self.page_size
        self._next_full_S[slot] = (count + 1) * self.page_size
        return count * self.page_size

    def allocate(self, slots_N: IntArray, num_tokens_N: IntArray) -> IntArray | None:
        """Make the pages cover ``num_tokens`` positions of each sequence.

        Returns what is new in the block tables, [U, 3]: slot, number of the page, page id. None, and no change, if the pool
        does not have them all.
        """
        missing_N = -(-num_tokens_N // self.page_size) - self.num_pages_S[slots_N]
        rows = np.flatnonzero(missing_N > 0)
        if not len(rows):
            return NO_UPDATES
        slots, counts = slots_N[rows], missing_N[rows]
        page_ids = self.pool.take(int(counts.sum()))
        if page_ids is None:
            return None
        first = self.num_pages_S[slots]
        self.num_pages_S[slots] = first + counts
        updates: IntArray = np.empty((len(page_ids), 3), dtype=np.int64)
        updates[:, 0], updates[:, 1], updates[:, 2] = slots.repeat(counts), spread(first, counts), page_ids
        for slot, page in zip(updates[:, 0].tolist(), page_ids, strict=True):
            self._page_ids[slot].append(page)
        return updates

    def commit(self, slots_N: IntArray, num_tokens_N: IntArray, token_ids_SC: TokenArray) -> None:
        """Declare ``num_tokens`` more positions of each sequence computed; pages that are now full become shareable.

        Row ``s`` of ``token_ids`` holds the tokens of sequence ``s``.
        """
        computed_N = self.num_computed_S[slots_N] + num_tokens_N
        assert (computed_N <= self.num_pages_S[slots_N] * self.page_size).all(), "commit beyond the allocated pages"
        self.num_computed_S[slots_N] = computed_N
        if self.share_prefixes:
            full_N = slots_N[computed_N >= self._next_full_S[slots_N]]
            while len(full_N):
                self._publish(full_N, token_ids_SC)
                full_N = full_N[self.num_computed_S[full_N] >= self._next_full_S[full_N]]

    def _publish(self, slots_N: IntArray, token_ids_SC: TokenArray) -> None:
        """Make the next page of each sequence shareable."""
        ends_N = self._next_full_S[slots_N]
        self._next_full_S[slots_N] = ends_N + self.page_size
        last_hash, page_ids, page_size = self._last_hash, self._page_ids, self.page_size
        for slot, end in zip(slots_N.tolist(), ends_N.tolist(), strict=True):
            last_hash[slot] = prefix_hash = _hash(last_hash[slot], token_ids_SC[slot, end - page_size : end].tobytes())
            self.pool.publish(page_ids[slot][end // page_size - 1], prefix_hash)

    def truncate(self, slots_N: IntArray, num_tokens_N: IntArray) -> None:
        """Give back the pages beyond ``num_tokens`` positions of each sequence.

        Pages go back while a launched step may still write to them: the next step that gets them is launched later on the
        same stream, so its writes come after.
        """
        keep_N = -(-num_tokens_N // self.page_size)
        computed_N = self.num_computed_S[slots_N] = np.minimum(self.num_computed_S[slots_N], num_tokens_N)
        assert (computed_N >= self._next_full_S[slots_N] - self.page_size).all(), "a shared page was cut"
        rows = np.flatnonzero(keep_N < self.num_pages_S[slots_N])
        for slot, keep in zip(slots_N[rows].tolist(), keep_N[rows].tolist(), strict=True):
            self.pool.release(self._page_ids[slot][keep:])
            del self._page_ids[slot][keep:]
            self.num_pages_S[slot] = keep

    def free(self, slot: int) -> None:
        """Give back all pages. Published ones stay findable until the pool needs them."""
        self.pool.release(self._page_ids[slot])
        self._page_ids[slot] = []
        self.num_pages_S[slot] = self.num_computed_S[slot] = 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pool, the sequences and the columns agree."""
        self.pool.check_integrity(self._page_ids)
        for slot, page_ids in enumerate(self._page_ids):
            assert self.num_pages_S[slot] == len(page_ids), "the column of page counts is wrong"
            assert self.num_computed_S[slot] <= len(page_ids) * self.page_size, "computed tokens without a page"
            published = int(self._next_full_S[slot]) - self.page_size
            if page_ids:
                assert published <= self.num_computed_S[slot], "a page is shareable before it is full"
                is_behind = published + self.page_size <= self.num_computed_S[slot]
                assert not (self.share_prefixes and is_behind), "a full page is not shareable"


def _hash(previous: bytes, tokens: bytes) -> bytes:
    # Prefixes of strangers must not collide, and processors have instructions for this hash.
    return hashlib.sha256(previous + tokens).digest()
