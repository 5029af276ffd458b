"""Moves pages between requests and the pool: match_prefix, allocate, commit, truncate, free.

A sequence's pages cover its positions in order. Below ``num_computed`` every slot holds exact causal K/V; at and above it
slots hold drafts that were not accepted, or nothing.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.page_pool import PagePool


@dataclass(slots=True, eq=False)
class SequenceCache:
    """The pages of one request. Only the KVCacheManager writes it."""

    page_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0
    last_hash: bytes = b""


class KVCacheManager:
    """The only one that moves pages; only ``commit`` moves ``num_computed`` up and only ``truncate`` moves it down."""

    def __init__(self, pool: PagePool, page_size: int, share_prefixes: bool = True) -> None:
        self.pool, self.page_size, self.share_prefixes = pool, page_size, share_prefixes

    def pages_for(self, num_tokens: int) -> int:
        """Pages that cover ``num_tokens`` positions."""
        return -(-num_tokens // self.page_size)

    def match_prefix(self, token_ids: Sequence[int], salt: str) -> SequenceCache:
        """Start a sequence with the longest shared prefix of whole pages.

        The last token is never taken from the cache: it has to be computed to draw the next one. Tenants with different salts
        never share.
        """
        cache = SequenceCache(last_hash=hashlib.blake2b(salt.encode(), digest_size=16).digest())
        if not self.share_prefixes:
            return cache
        for start in range(0, len(token_ids) - self.page_size, self.page_size):
            prefix_hash = self._hash(cache.last_hash, token_ids[start : start + self.page_size])
            page = self.pool.find(prefix_hash)
            if page is None:
                break
            self.pool.share(page)
            cache.page_ids.append(page)
            cache.last_hash = prefix_hash
        cache.num_published = len(cache.page_ids)
        cache.num_computed = cache.num_published * self.page_size
        return cache

    def allocate(self, cache: SequenceCache, num_tokens: int) -> tuple[int, ...] | None:
        """Make the pages cover ``num_tokens`` positions; return the new pages, or None and no change if the pool is dry."""
        missing = self.pages_for(num_tokens) - len(cache.page_ids)
        if missing <= 0:
            return ()
        pages = self.pool.take(missing)
        if pages is None:
            return None
        cache.page_ids.extend(pages)
        return tuple(pages)

    def commit(self, cache: SequenceCache, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Declare ``num_tokens`` more positions computed; pages that are now full become shareable.

        ``token_ids`` are all tokens of the request.
        """
        cache.num_computed += num_tokens
        assert cache.num_computed <= len(cache.page_ids) * self.page_size, "commit beyond the allocated pages"
        while self.share_prefixes and (cache.num_published + 1) * self.page_size <= cache.num_computed:
            start = cache.num_published * self.page_size
            cache.last_hash = self._hash(cache.last_hash, token_ids[start : start + self.page_size])
            self.pool.publish(cache.page_ids[cache.num_published], cache.last_hash)
            cache.num_published += 1

    def truncate(self, cache: SequenceCache, num_tokens: int) -> None:
        """Give back the pages beyond ``num_tokens`` positions.

        Pages go back while a launched step may still write to them: the next step that gets them is launched later on the
        same stream, so its writes come after.
        """
        keep = self.pages_for(num_tokens)
        if keep < len(cache.page_ids):
            self.pool.release(cache.page_ids[keep:])
            del cache.page_ids[keep:]
        cache.num_computed = min(cache.num_computed, num_tokens)
        assert cache.num_published * self.page_size <= cache.num_computed, "a shared page was cut"

    def free(self, cache: SequenceCache) -> None:
        """Give back all pages. Published ones stay findable until the pool needs them."""
        self.pool.release(cache.page_ids)
        cache.page_ids, cache.num_computed, cache.num_published = [], 0, 0

    def check_integrity(self, caches: Iterable[SequenceCache]) -> None:
        """Raise AssertionError unless the pool and these sequences (all that hold pages) agree."""
        sequences = list(caches)
        self.pool.check_integrity([c.page_ids for c in sequences])
        for cache in sequences:
            assert cache.num_computed <= len(cache.page_ids) * self.page_size, "computed tokens without a page"

    @staticmethod
    def _hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
        return hashlib.blake2b(previous + array.array("q", token_ids).tobytes(), digest_size=16).digest()
