"""Page ids of the KV cache: who holds them, and which of the free ones still hold a prefix worth sharing."""

from __future__ import annotations

from collections import OrderedDict

NULL_PAGE = 0
"""Rows that must leave no trace write here. It belongs to nobody, and what it holds is masked wherever it is gathered."""


class PagePool:
    """Reference counts and prefix hashes of ``num_pages`` pages, page 0 being the null page.

    A page is *held* (count above 0) or *free*. A free page keeps its hash until it is taken again, least recently freed first,
    so that a later request with the same prefix can share it.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool needs the null page and at least one other, got {num_pages}")
        self.num_pages = num_pages
        self._counts = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))

    @property
    def num_free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of pages that are held, in [0, 1]."""
        return 1.0 - len(self._free) / (self.num_pages - 1)

    def take(self, count: int) -> list[int] | None:
        """Hold ``count`` free pages and forget what they kept; None, and no change, if there are not enough."""
        if count > len(self._free):
            return None
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        hashes, counts = self._hashes, self._counts
        for page in pages:
            counts[page] = 1
            if hashes[page] is not None:
                self._forget(page)
        return pages

    def share(self, page: int) -> None:
        """Hold a page once more."""
        if self._counts[page] == 0:
            del self._free[page]
        self._counts[page] += 1

    def release(self, pages: list[int]) -> None:
        """Give up one hold on each page, the last one first: the end of a prefix is the least likely to be shared."""
        for page in reversed(pages):
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free[page] = None

    def find(self, prefix_hash: bytes) -> int | None:
        """The page that keeps this prefix, held or free."""
        return self._by_hash.get(prefix_hash)

    def publish(self, page: int, prefix_hash: bytes) -> None:
        """Make a full page of exact, causally computed K/V shareable. The first page with a hash is the one that is found."""
        if prefix_hash not in self._by_hash:
            self._by_hash[prefix_hash] = page
            self._hashes[page] = prefix_hash

    def _forget(self, page: int) -> None:
        prefix_hash = self._hashes[page]
        assert prefix_hash is not None, "the page keeps nothing"
        del self._by_hash[prefix_hash]
        self._hashes[page] = None

    def check_integrity(self, held: list[list[int]]) -> None:
        """Raise AssertionError unless the counts are exactly the holds in ``held`` and free and held pages add up."""
        counts = [0] * self.num_pages
        for pages in held:
            assert len(set(pages)) == len(pages), f"a request holds a page twice: {pages}"
            for page in pages:
                counts[page] += 1
        assert counts == self._counts, "reference counts differ from the pages that requests hold"
        assert counts[NULL_PAGE] == 0, "a request holds the null page"
        free = [page for page in range(1, self.num_pages) if counts[page] == 0]
        assert sorted(self._free) == free, "the free pages are not those that nobody holds"
        for prefix_hash, page in self._by_hash.items():
            assert self._hashes[page] == prefix_hash, f"page {page} is published under a hash that it lost"
