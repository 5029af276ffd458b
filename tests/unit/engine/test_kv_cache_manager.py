from __future__ import annotations

import pytest

from engine.kv_cache_manager import KVCacheManager, SequenceCache
from engine.page_pool import PagePool

TOKENS = list(range(100, 120))


def manager(num_pages: int = 20, page_size: int = 4, share: bool = True) -> KVCacheManager:
    return KVCacheManager(PagePool(num_pages), page_size, share)


def computed(kv: KVCacheManager, token_ids: list[int], salt: str = "") -> SequenceCache:
    """A sequence whose tokens but the last are computed."""
    cache = kv.match_prefix(token_ids, salt)
    assert kv.allocate(cache, len(token_ids)) is not None
    kv.commit(cache, len(token_ids) - 1 - cache.num_computed, token_ids)
    return cache


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert manager().pages_for(tokens) == pages


def test_allocate_returns_the_new_pages_only() -> None:
    kv = manager()
    cache = kv.match_prefix(TOKENS, "")
    first = kv.allocate(cache, 5)
    assert first is not None
    assert len(first) == 2
    assert kv.allocate(cache, 8) == ()
    more = kv.allocate(cache, 9)
    assert more is not None
    assert cache.page_ids == [*first, *more]


def test_allocate_from_a_dry_pool_changes_nothing() -> None:
    kv = manager(num_pages=3)
    cache = kv.match_prefix(TOKENS, "")
    kv.allocate(cache, 4)
    before = list(cache.page_ids)
    assert kv.allocate(cache, 16) is None
    assert cache.page_ids == before
    kv.check_integrity([cache])


def test_a_second_request_shares_whole_pages_of_the_common_prefix() -> None:
    kv = manager()
    first = computed(kv, TOKENS[:14])
    second = kv.match_prefix([*TOKENS[:10], 1, 2, 3], "")
    assert second.page_ids == first.page_ids[:2]
    assert second.num_computed == 8
    kv.check_integrity([first, second])


@pytest.mark.parametrize(("length", "shared"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_the_last_token_is_always_left_to_compute(length: int, shared: int) -> None:
    kv = manager()
    computed(kv, TOKENS)
    assert kv.match_prefix(TOKENS[:length], "").num_computed == shared


def test_a_page_is_shareable_once_it_is_full_and_computed() -> None:
    kv = manager()
    cache = kv.match_prefix(TOKENS, "")
    kv.allocate(cache, 12)
    kv.commit(cache, 7, TOKENS)
    assert kv.match_prefix(TOKENS, "").num_computed == 4
    kv.commit(cache, 1, TOKENS)
    assert kv.match_prefix(TOKENS, "").num_computed == 8


def test_other_salts_and_other_tokens_share_nothing() -> None:
    kv = manager()
    computed(kv, TOKENS, "tenant a")
    assert kv.match_prefix(TOKENS, "tenant b").num_computed == 0
    assert kv.match_prefix(TOKENS, "").num_computed == 0
    assert kv.match_prefix([1, *TOKENS[1:]], "tenant a").num_computed == 0
    assert kv.match_prefix(TOKENS, "tenant a").num_computed == 16


def test_equal_pages_after_different_prefixes_are_not_shared() -> None:
    kv = manager()
    computed(kv, TOKENS[:4] + TOKENS[8:12] + [0])
    assert kv.match_prefix(TOKENS[4:8] + TOKENS[8:12] + [0], "").num_computed == 0


def test_sharing_can_be_switched_off() -> None:
    kv = manager(share=False)
    computed(kv, TOKENS)
    assert kv.match_prefix(TOKENS, "").num_computed == 0


def test_a_freed_prefix_is_found_until_its_pages_are_needed() -> None:
    kv = manager(num_pages=6)
    kv.free(computed(kv, TOKENS[:9]))
    again = kv.match_prefix(TOKENS[:9], "")
    assert again.num_computed == 8
    kv.free(again)
    other = computed(kv, [7] * 20)
    assert kv.match_prefix(TOKENS[:9], "").num_computed == 0
    kv.check_integrity([other])


def test_truncate_gives_back_pages_beyond_and_keeps_computed_tokens() -> None:
    kv = manager()
    cache = kv.match_prefix(TOKENS, "")
    kv.allocate(cache, 16)
    kv.commit(cache, 6, TOKENS)
    kv.truncate(cache, 6)
    assert (len(cache.page_ids), cache.num_computed) == (2, 6)
    assert kv.pool.num_free == 19 - 2


def test_truncate_moves_computed_tokens_down_but_never_into_a_shared_page() -> None:
    kv = manager()
    cache = kv.match_prefix(TOKENS, "")
    kv.allocate(cache, 8)
    kv.commit(cache, 7, TOKENS)
    kv.truncate(cache, 5)
    assert cache.num_computed == 5
    with pytest.raises(AssertionError, match="a shared page was cut"):
        kv.truncate(cache, 3)


def test_commit_beyond_the_pages_is_refused() -> None:
    kv = manager()
    cache = kv.match_prefix(TOKENS, "")
    kv.allocate(cache, 4)
    with pytest.raises(AssertionError, match="beyond the allocated pages"):
        kv.commit(cache, 5, TOKENS)


def test_free_returns_everything() -> None:
    kv = manager()
    first = computed(kv, TOKENS)
    second = computed(kv, TOKENS)
    kv.free(first)
    kv.check_integrity([second])
    kv.free(second)
    kv.check_integrity([])
    assert kv.pool.num_free == 19
