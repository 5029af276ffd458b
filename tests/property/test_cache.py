"""The cache's five verbs, in any order, against a plain model: dictionaries of what each page must contain and who holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from engine.kv_cache_manager import KVCacheManager
from engine.page_pool import NULL_PAGE, PagePool

Text = tuple[str, tuple[int, ...]]
NUM_SLOTS, MAX_LENGTH = 64, 256


@dataclass(eq=False)
class Sequence:
    """A request as the model sees it: its salt, its tokens, and how many of them it has computed."""

    salt: str
    token_ids: list[int]
    slot: int
    num_computed: int
    pages: list[int] = field(default_factory=list)


class Cache(RuleBasedStateMachine):
    """``contents`` maps every page ever filled to the text whose K/V it holds: the whole prefix up to its last token."""

    sequences = Bundle("sequences")

    @initialize(num_pages=st.integers(2, 12), page_size=st.integers(1, 4), share=st.sampled_from((True, True, True, False)))
    def start(self, num_pages: int, page_size: int, share: bool) -> None:
        self.pool, self.page_size, self.share = PagePool(num_pages), page_size, share
        self.kv = KVCacheManager(self.pool, page_size, NUM_SLOTS, share)
        self.token_ids = np.zeros((NUM_SLOTS, MAX_LENGTH), dtype=np.int32)
        self.live: list[Sequence] = []
        self.contents: dict[int, Text] = {}

    def text(self, sequence: Sequence, end: int) -> Text:
        return sequence.salt, tuple(sequence.token_ids[:end])

    @rule(target=sequences, token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from("ab"))
    def match_prefix(self, token_ids: list[int], salt: str) -> Sequence:
        findable = {text: page for page, text in self.contents.items() if self.pool._hashes[page] is not None}
        slot = min(set(range(NUM_SLOTS)) - {sequence.slot for sequence in self.live})
        num_computed = self.kv.match_prefix(slot, np.array(token_ids, dtype=np.int32), salt)
        longest = 0
        while longest + self.page_size < len(token_ids) and (salt, tuple(token_ids[: longest + self.page_size])) in findable:
            longest += self.page_size
        assert num_computed == (longest if self.share else 0), "not the longest prefix that the cache holds"
        sequence = Sequence(salt, list(token_ids), slot, num_computed, list(self.kv.page_ids(slot)))
        for index, page in enumerate(sequence.pages):
            assert self.contents[page] == self.text(sequence, (index + 1) * self.page_size), "a shared page holds another text"
        self.live.append(sequence)
        return sequence

    @precondition(lambda self: self.live)
    @rule(extras=st.lists(st.integers(0, 9), min_size=1, max_size=3), data=st.data())
    def allocate(self, extras: list[int], data: st.DataObject) -> None:
        """For several at once: all of it or nothing."""
        chosen = data.draw(st.permutations(self.live))[: len(extras)]
        wanted = [sequence.num_computed + extra for sequence, extra in zip(chosen, extras, strict=False)]
        missing = [max(0, -(-want // self.page_size) - len(s.pages)) for s, want in zip(chosen, wanted, strict=True)]
        held = {page for other in self.live for page in other.pages}
        free = self.pool.num_free
        updates = self.kv.allocate(np.array([s.slot for s in chosen]), np.array(wanted))
        if sum(missing) > free:
            assert updates is None
            return
        assert updates is not None
        assert not held & set(updates[:, 2].tolist()), "a page that someone holds was given away"
        expected = [(s.slot, len(s.pages) + i) for s, count in zip(chosen, missing, strict=True) for i in range(count)]
        assert [(slot, number) for slot, number, _ in updates.tolist()] == expected
        for slot, _, page in updates.tolist():
            next(s for s in chosen if s.slot == slot).pages.append(page)
            self.contents.pop(page, None)

    @rule(sequence=sequences, count=st.integers(0, 6), new=st.lists(st.integers(0, 1), min_size=6, max_size=6))
    def commit(self, sequence: Sequence, count: int, new: list[int]) -> None:
        count = min(count, len(sequence.pages) * self.page_size - sequence.num_computed)
        sequence.token_ids += new[: max(0, sequence.num_computed + count + 1 - len(sequence.token_ids))]
        count = min(count, len(sequence.token_ids) - sequence.num_computed)
        sequence.num_computed += count
        for index in range(sequence.num_computed // self.page_size):
            text = self.text(sequence, (index + 1) * self.page_size)
            assert self.contents.setdefault(sequence.pages[index], text) == text
        self.token_ids[sequence.slot, : len(sequence.token_ids)] = sequence.token_ids
        self.kv.commit(np.array([sequence.slot]), np.array([count]), self.token_ids)

    @rule(sequence=sequences, extra=st.integers(0, 6))
    def truncate(self, sequence: Sequence, extra: int) -> None:
        keep = sequence.num_computed + extra
        self.kv.truncate(np.array([sequence.slot]), np.array([keep]))
        del sequence.pages[-(-keep // self.page_size) :]

    @rule(sequence=consumes(sequences))
    def free(self, sequence: Sequence) -> None:
        self.kv.free(sequence.slot)
        self.live.remove(sequence)

    @precondition(lambda self: self.live)
    @invariant()
    def sequences_agree(self) -> None:
        for sequence in self.live:
            assert self.kv.page_ids(sequence.slot) == sequence.pages
            assert self.kv.num_computed_S[sequence.slot] == sequence.num_computed

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.check_integrity()
        held = {page for sequence in self.live for page in sequence.pages}
        assert NULL_PAGE not in held
        assert self.pool.num_free == self.pool.num_pages - 1 - len(held)

    @invariant()
    def shared_pages_hold_one_text(self) -> None:
        if not hasattr(self, "kv"):
            return
        holders: dict[int, set[Text]] = {}
        for sequence in self.live:
            for index, page in enumerate(sequence.pages):
                holders.setdefault(page, set()).add(self.text(sequence, (index + 1) * self.page_size))
        for page, held in holders.items():
            assert len(held) == 1, f"page {page} is shared between different texts"

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for sequence in self.live:
            self.kv.free(sequence.slot)
        self.kv.check_integrity()
        assert self.pool.num_free == self.pool.num_pages - 1


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=200, stateful_step_count=30)
