from __future__ import annotations

import numpy as np
import pytest

from engine.kv_cache_manager import KVCacheManager
from engine.page_pool import PagePool

TOKENS = list(range(100, 120))


class Sequences:
    """A manager, its verbs for one sequence at a time: each has a slot of its own, and its tokens at once."""

    def __init__(self, num_pages: int = 20, page_size: int = 4, share: bool = True) -> None:
        self.pool = PagePool(num_pages)
        self.kv = KVCacheManager(self.pool, page_size, 16, share)
        self.token_ids = np.zeros((16, 40), dtype=np.int32)
        self.count = 0

    def match(self, token_ids: list[int], salt: str = "") -> int:
        slot, self.count = self.count, self.count + 1
        self.token_ids[slot, : len(token_ids)] = token_ids
        assert self.kv.match_prefix(slot, self.token_ids[slot, : len(token_ids)], salt) == self.computed(slot)
        return slot

    def matched(self, token_ids: list[int], salt: str = "") -> int:
        """How many tokens of a prompt are found."""
        return self.computed(self.match(token_ids, salt))

    def allocate(self, slot: int, num_tokens: int) -> list[int] | None:
        """The new pages."""
        first = len(self.pages(slot))
        updates = self.kv.allocate(np.array([slot]), np.array([num_tokens]))
        if updates is None:
            return None
        assert [(s, n) for s, n, _ in updates.tolist()] == [(slot, n) for n in range(first, len(self.pages(slot)))]
        return [page for *_, page in updates.tolist()]

    def commit(self, slot: int, num_tokens: int) -> None:
        self.kv.commit(np.array([slot]), np.array([num_tokens]), self.token_ids)

    def truncate(self, slot: int, num_tokens: int) -> None:
        self.kv.truncate(np.array([slot]), np.array([num_tokens]))

    def compute(self, token_ids: list[int], salt: str = "") -> int:
        """A sequence whose tokens but the last are computed."""
        slot = self.match(token_ids, salt)
        assert self.allocate(slot, len(token_ids)) is not None
        self.commit(slot, len(token_ids) - 1 - self.computed(slot))
        return slot

    def pages(self, slot: int) -> list[int]:
        return list(self.kv.page_ids(slot))

    def computed(self, slot: int) -> int:
        return int(self.kv.num_computed_S[slot])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert Sequences().kv.pages_for(tokens) == pages


def test_allocate_returns_the_new_pages_only() -> None:
    kvs = Sequences()
    slot = kvs.match(TOKENS)
    first = kvs.allocate(slot, 5)
    assert first is not None
    assert len(first) == 2
    assert kvs.allocate(slot, 8) == []
    more = kvs.allocate(slot, 9)
    assert more is not None
    assert kvs.pages(slot) == [*first, *more]


def test_one_call_allocates_for_many() -> None:
    kvs = Sequences()
    slots = [kvs.match(TOKENS) for _ in range(3)]
    kvs.allocate(slots[1], 4)
    updates = kvs.kv.allocate(np.array([2, 0, 1]), np.array([9, 0, 5]))
    assert updates is not None
    assert updates[:, :2].tolist() == [[2, 0], [2, 1], [2, 2], [1, 1]]
    assert updates[:, 2].tolist() == [*kvs.pages(2), kvs.pages(1)[1]]
    kvs.kv.check_integrity()


def test_allocate_from_a_dry_pool_changes_nothing() -> None:
    kvs = Sequences(num_pages=3)
    slot, other = kvs.match(TOKENS), kvs.match(TOKENS)
    kvs.allocate(slot, 4)
    before = kvs.pages(slot)
    assert kvs.allocate(slot, 16) is None
    assert kvs.kv.allocate(np.array([slot, other]), np.array([8, 4])) is None, "not even what there is enough for"
    assert (kvs.pages(slot), kvs.pages(other)) == (before, [])
    kvs.kv.check_integrity()


def test_a_second_request_shares_whole_pages_of_the_common_prefix() -> None:
    kvs = Sequences()
    first = kvs.compute(TOKENS[:14])
    second = kvs.match([*TOKENS[:10], 1, 2, 3])
    assert kvs.pages(second) == kvs.pages(first)[:2]
    assert kvs.computed(second) == 8
    kvs.kv.check_integrity()


@pytest.mark.parametrize(("length", "shared"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_the_last_token_is_always_left_to_compute(length: int, shared: int) -> None:
    kvs = Sequences()
    kvs.compute(TOKENS)
    assert kvs.matched(TOKENS[:length]) == shared


def test_a_page_is_shareable_once_it_is_full_and_computed() -> None:
    kvs = Sequences()
    slot = kvs.match(TOKENS)
    kvs.allocate(slot, 12)
    kvs.commit(slot, 7)
    assert kvs.matched(TOKENS) == 4
    kvs.commit(slot, 1)
    assert kvs.matched(TOKENS) == 8


def test_other_salts_and_other_tokens_share_nothing() -> None:
    kvs = Sequences()
    kvs.compute(TOKENS, "tenant a")
    assert kvs.matched(TOKENS, "tenant b") == 0
    assert kvs.matched(TOKENS) == 0
    assert kvs.matched([1, *TOKENS[1:]], "tenant a") == 0
    assert kvs.matched(TOKENS, "tenant a") == 16


def test_equal_pages_after_different_prefixes_are_not_shared() -> None:
    kvs = Sequences()
    kvs.compute(TOKENS[:4] + TOKENS[8:12] + [0])
    assert kvs.matched(TOKENS[4:8] + TOKENS[8:12] + [0]) == 0


def test_sharing_can_be_switched_off() -> None:
    kvs = Sequences(share=False)
    kvs.compute(TOKENS)
    assert kvs.matched(TOKENS) == 0


def test_a_freed_prefix_is_found_until_its_pages_are_needed() -> None:
    kvs = Sequences(num_pages=6)
    kvs.kv.free(kvs.compute(TOKENS[:9]))
    again = kvs.match(TOKENS[:9])
    assert kvs.computed(again) == 8
    kvs.kv.free(again)
    kvs.compute([7] * 20)
    assert kvs.matched(TOKENS[:9]) == 0
    kvs.kv.check_integrity()


def test_truncate_gives_back_pages_beyond_and_keeps_computed_tokens() -> None:
    kvs = Sequences()
    slot = kvs.match(TOKENS)
    kvs.allocate(slot, 16)
    kvs.commit(slot, 6)
    kvs.truncate(slot, 6)
    assert (len(kvs.pages(slot)), kvs.computed(slot)) == (2, 6)
    assert kvs.pool.num_free == 19 - 2


def test_truncate_moves_computed_tokens_down_but_never_into_a_shared_page() -> None:
    kvs = Sequences()
    slot = kvs.match(TOKENS)
    kvs.allocate(slot, 8)
    kvs.commit(slot, 7)
    kvs.truncate(slot, 5)
    assert kvs.computed(slot) == 5
    with pytest.raises(AssertionError, match="a shared page was cut"):
        kvs.truncate(slot, 3)


def test_commit_beyond_the_pages_is_refused() -> None:
    kvs = Sequences()
    slot = kvs.match(TOKENS)
    kvs.allocate(slot, 4)
    with pytest.raises(AssertionError, match="beyond the allocated pages"):
        kvs.commit(slot, 5)


def test_free_returns_everything() -> None:
    kvs = Sequences()
    first, second = kvs.compute(TOKENS), kvs.compute(TOKENS)
    kvs.kv.free(first)
    kvs.kv.check_integrity()
    kvs.kv.free(second)
    kvs.kv.check_integrity()
    assert kvs.pool.num_free == 19
