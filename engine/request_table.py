"""The running requests as columns, so that the host's work for hundreds of them is a few array operations.

Row ``s`` belongs to the request in slot ``s``. Shape suffixes: S slots, C tokens of the longest request, N requests of a step.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np

from engine.input_batch import SamplingNeeds
from engine.messages import SpeculationStats
from engine.request import Request
from engine.step import IntArray, TokenArray, columns, spread


class RequestTable:
    """Slots, the order of the running requests, and what is known of each. The scheduler alone writes it.

    As far as the host has read:

    * ``token_ids_SC``: the prompt and everything emitted, ``num_tokens_S`` of them; at most ``max_length_S`` there will be;
    * ``num_held_S``: drafts that the device holds; ``verifies_S``: 1 where only the first of them has been emitted
      (see ``DraftPolicy.verifies``); ``level_S``: that of its sampling (``SamplingNeeds.level``);
    * ``speculation_S4``: the fields of ``SpeculationStats``; ``policy_S``: the policy's number in the planner.

    Of steps that are launched and not read yet:

    * ``prefill_in_flight_S``, ``drafts_in_flight_S``: bounds of their rows; ``decodes_in_flight_S``: steps with drafts;
    * ``max_held_S``: drafts held at most once they are done.

    ``epoch_S`` counts who has had a slot: a launched step remembers it, and its row is dropped when it no longer agrees.
    Memory of ``token_ids_SC`` is touched, and so taken, only where tokens are written.
    """

    def __init__(self, num_slots: int, max_length: int) -> None:
        def column() -> IntArray:
            return np.zeros(num_slots, dtype=np.int64)

        self.token_ids_SC: TokenArray = np.zeros((num_slots, max_length), dtype=np.int32)
        self._flat_token_ids = self.token_ids_SC.reshape(-1)
        self.num_tokens_S, self.num_prompt_S, self.max_length_S = column(), column(), column()
        self.num_held_S, self.max_held_S = column(), column()
        self.verifies_S, self.policy_S, self.level_S, self.epoch_S = column(), column(), column(), column()
        self.prefill_in_flight_S, self.drafts_in_flight_S, self.decodes_in_flight_S = column(), column(), column()
        self.speculation_S4 = columns(num_slots, 4)
        self.requests: list[Request | None] = [None] * num_slots
        self.request_ids: list[str] = [""] * num_slots
        self.running: list[Request] = []
        self.slots: IntArray = np.zeros(0, dtype=np.int64)
        self.free_slots = list(reversed(range(num_slots)))

    def admit(self, request: Request, verifies: bool) -> None:
        """Give a request the next free slot and take its tokens over."""
        slot = self.free_slots.pop()
        count = len(request.token_ids)
        self.token_ids_SC[slot, :count] = request.token_ids
        self.num_tokens_S[slot], self.num_prompt_S[slot] = count, request.num_prompt_tokens
        self.max_length_S[slot] = request.max_length
        self.num_held_S[slot] = self.max_held_S[slot] = 1
        self.verifies_S[slot], self.policy_S[slot] = verifies, request.policy
        self.level_S[slot] = SamplingNeeds.of([request.message.sampling]).level
        self.speculation_S4[slot] = astuple(request.speculation)
        self.requests[slot], self.request_ids[slot], request.slot = request, request.request_id, slot
        self.running.append(request)
        self._list_slots()

    def leave(self, request: Request) -> None:
        """Free a request's slot; it takes its tokens and counts along. Its rows of launched steps no longer count."""
        slot = request.slot
        request.token_ids, request.speculation = self.tokens_of(slot).copy(), self.speculation_of(slot)
        for column in (self.prefill_in_flight_S, self.drafts_in_flight_S, self.decodes_in_flight_S):
            column[slot] = 0
        self.epoch_S[slot] += 1
        self.requests[slot], self.request_ids[slot], request.slot = None, "", -1
        self.running.remove(request)
        self.free_slots.append(slot)
        self._list_slots()

    def _list_slots(self) -> None:
        # A new array: plans keep the old one.
        self.slots = np.fromiter((r.slot for r in self.running), dtype=np.int64, count=len(self.running))

    def tokens_of(self, slot: int) -> TokenArray:
        """The prompt and everything emitted, a view."""
        tokens: TokenArray = self.token_ids_SC[slot, : self.num_tokens_S[slot]]
        return tokens

    def count(self, slots_N: IntArray, added_N4: IntArray) -> None:
        """Add to the requests' speculation."""
        for total_S, added_N in zip(self.speculation_S4.T, added_N4.T, strict=True):
            total_S[slots_N] += added_N

    def speculation_of(self, slot: int) -> SpeculationStats:
        """What drafting has done for a request so far."""
        return SpeculationStats(*self.speculation_S4[slot].tolist())

    def rows_in_flight(self, slots_N: IntArray) -> IntArray:
        """Clean rows of launched steps: at most so many positions more are being computed."""
        rows: IntArray = self.prefill_in_flight_S[slots_N] + self.drafts_in_flight_S[slots_N]
        return rows

    def launch(self, slots_N: IntArray, shapes_N6: IntArray) -> None:
        """A step with these shares is launched."""
        branches_N = shapes_N6[:, 2]
        decodes_N = (shapes_N6[:, 1] + branches_N) > 0
        self.prefill_in_flight_S[slots_N] += shapes_N6[:, 0]
        self.drafts_in_flight_S[slots_N] += shapes_N6[:, 1]
        self.decodes_in_flight_S[slots_N] += decodes_N
        held_N = np.where(branches_N > 0, shapes_N6[:, 3], 1)
        self.max_held_S[slots_N] = np.where(decodes_N, held_N, self.max_held_S[slots_N])

    def settle(self, slots_N: IntArray, shapes_N6: IntArray, num_held_N: IntArray) -> None:
        """A launched step was read: its requests hold ``num_held`` drafts after it."""
        decodes_N = self.decodes_in_flight_S[slots_N] - ((shapes_N6[:, 1] + shapes_N6[:, 2]) > 0)
        self.prefill_in_flight_S[slots_N] -= shapes_N6[:, 0]
        self.drafts_in_flight_S[slots_N] -= shapes_N6[:, 1]
        self.decodes_in_flight_S[slots_N] = decodes_N
        self.num_held_S[slots_N] = num_held_N
        self.max_held_S[slots_N] = np.where(decodes_N > 0, self.max_held_S[slots_N], num_held_N)

    def append(self, slots_N: IntArray, counts_N: IntArray, token_ids: IntArray) -> None:
        """Add emitted tokens: ``counts`` of each request, one request after the other in ``token_ids``."""
        num_tokens_N = self.num_tokens_S[slots_N]
        starts_N = slots_N * self.token_ids_SC.shape[1] + num_tokens_N
        self._flat_token_ids[spread(starts_N, counts_N)] = token_ids
        self.num_tokens_S[slots_N] = num_tokens_N + counts_N

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, order and columns agree."""
        slots = [r.slot for r in self.running]
        assert self.slots.tolist() == slots, "the running requests have other slots"
        assert sorted(slots + self.free_slots) == list(range(len(self.requests))), "a slot is lost or shared"
        for slot, request in enumerate(self.requests):
            assert (request is not None) == (slot in slots), "a free slot has a request"
            if request is None:
                assert not self.rows_in_flight(np.array([slot]))[0], "a free slot has rows in flight"
                continue
            assert (request.slot, request.request_id) == (slot, self.request_ids[slot]), "a request is in another's slot"
            prompt = self.token_ids_SC[slot, : request.num_prompt_tokens].tolist()
            assert prompt == list(request.message.prompt_token_ids), "a prompt was overwritten"
            assert request.num_prompt_tokens <= self.num_tokens_S[slot] < self.max_length_S[slot] == request.max_length
