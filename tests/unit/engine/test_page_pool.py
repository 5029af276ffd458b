from __future__ import annotations

import pytest

from engine.page_pool import NULL_PAGE, PagePool


def test_the_null_page_is_never_given_out() -> None:
    pool = PagePool(5)
    pages = pool.take(4)
    assert pages is not None
    assert sorted(pages) == [1, 2, 3, 4]
    assert NULL_PAGE not in pages
    pool.check_integrity([pages])


def test_taking_more_than_is_free_changes_nothing() -> None:
    pool = PagePool(4)
    held = pool.take(2)
    assert pool.take(2) is None
    assert pool.num_free == 1
    pool.check_integrity([held or []])


def test_usage_counts_held_pages() -> None:
    pool = PagePool(5)
    assert pool.usage == 0.0
    pages = pool.take(3)
    assert pool.usage == 0.75
    pool.release(pages or [])
    assert pool.usage == 0.0


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pool = PagePool(3)
    (page,) = pool.take(1) or []
    pool.share(page)
    pool.release([page])
    assert pool.num_free == 1
    pool.check_integrity([[page]])
    pool.release([page])
    assert pool.num_free == 2


def test_a_free_page_is_found_until_it_is_taken_again() -> None:
    pool = PagePool(3)
    pages = pool.take(2) or []
    pool.publish(pages[0], b"text")
    pool.release(pages)
    assert pool.find(b"text") == pages[0]
    pool.take(2)
    assert pool.find(b"text") is None


def test_sharing_a_free_page_takes_it_off_the_free_ones() -> None:
    pool = PagePool(3)
    pages = pool.take(2) or []
    pool.publish(pages[0], b"text")
    pool.release(pages)
    pool.share(pages[0])
    assert pool.num_free == 1
    assert pool.take(1) == [pages[1]]
    assert pool.find(b"text") == pages[0]
    pool.check_integrity([[pages[0]], [pages[1]]])


def test_the_least_recently_freed_page_is_taken_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    pool = PagePool(5)
    pages = pool.take(4) or []
    first, second = pages[:2], pages[2:]
    pool.release(second)
    pool.release(first)
    assert pool.take(4) == [second[1], second[0], first[1], first[0]]


def test_the_first_page_published_under_a_hash_stays_the_one_that_is_found() -> None:
    pool = PagePool(4)
    first, second = pool.take(2) or []
    pool.publish(first, b"text")
    pool.publish(second, b"text")
    assert pool.find(b"text") == first
    pool.release([second])
    pool.take(2)
    assert pool.find(b"text") == first, "forgetting the second page forgot the first one's text"


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one other, got 1"):
        PagePool(1)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], "reference counts differ"),
        ([[1], [1]], "reference counts differ"),
        ([[1, 1]], "holds a page twice"),
        ([[2]], "reference counts differ"),
    ],
)
def test_the_integrity_check_sees_lost_and_invented_holds(held: list[list[int]], message: str) -> None:
    pool = PagePool(4)
    assert pool.take(1) == [1]
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(held)


def test_the_integrity_check_sees_a_held_page_among_the_free_ones() -> None:
    pool = PagePool(4)
    pool.take(1)
    pool._free[1] = None
    with pytest.raises(AssertionError, match="free pages are not those"):
        pool.check_integrity([[1]])
