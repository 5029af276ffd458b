"""The grammars of the running requests, by slot: masks for the rows that verify, and drafts that a grammar allows.

A mask depends on the tokens before it, so it has to be known on the host which drafts a request holds. That is so once they
are made: they are walked through the grammar at the end of the step that made them, and the masks of the next step's verifying
rows are written on the way. So a step with a constrained request is the one step in which the host waits for what it has just
launched: once, and once more for each time that drafts have to be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.decode.inputs import StepInputs
from engine.decode.sampling import DrawDrafts
from engine.download import Download
from engine.grammar import GrammarError, Matcher, empty_mask
from engine.input_batch import InputBatch
from engine.step import Admission, StepPlan
from engine.upload import upload
from kernels.process_logits.metadata import GrammarRows
from kernels.step_rows.metadata import StepLayout


@dataclass(slots=True)
class _Constrained:
    """One request: where its grammar stands after the emitted tokens, and the masks [K, words] after each of its drafts."""

    matcher: Matcher
    masks: Tensor
    error: str | None = None


@dataclass(slots=True)
class DraftWalk:
    """A constrained request's fresh drafts, the certain one first, and how many of them its grammar has taken so far."""

    slot: int
    token_ids: list[int]


Resample = Callable[[Sequence[int], int, Tensor], list[int]]
"""Given the walks' numbers, a draft's number and a mask [walks, words], draws that draft again; returns the tokens."""


class GrammarTable:
    """Owns the matchers. A request whose grammar fails goes on unconstrained until its error has ended it."""

    def __init__(self, max_drafts: int, vocab_size: int, device: torch.device) -> None:
        self._max_drafts, self._vocab_size, self._device = max_drafts, vocab_size, device
        self._by_slot: dict[int, _Constrained] = {}

    def admit(self, admission: Admission) -> None:
        """A request takes the slot; one that was preempted has its grammar walked again."""
        self._by_slot.pop(admission.slot, None)
        if admission.matcher is not None:
            masks = empty_mask(self._max_drafts, self._vocab_size)
            self._by_slot[admission.slot] = _Constrained(admission.matcher, masks)
            self.advance(admission.slot, admission.output_token_ids)

    def constrained(self, plan: StepPlan) -> list[int]:
        """Which requests of a plan have a grammar and something to verify, as indices into it."""
        if not self._by_slot:
            return []
        bounds = zip(plan.slots.tolist(), plan.num_drafts.tolist(), strict=True)
        return [i for i, (slot, num_drafts) in enumerate(bounds) if slot in self._by_slot and num_drafts > 0]

    def errors(self, plan: StepPlan) -> dict[int, str]:
        """Why requests of a plan cannot go on, by their number in it."""
        if not self._by_slot:
            return {}
        states = ((i, self._by_slot.get(slot)) for i, slot in enumerate(plan.slots.tolist()))
        return {i: state.error for i, state in states if state is not None and state.error is not None}

    def verify_rows(self, plan: StepPlan, layout: StepLayout, constrained: Sequence[int]) -> GrammarRows | None:
        """The masks of the rows that verify these requests' drafts."""
        if not constrained:
            return None
        counts = plan.num_drafts[list(constrained)].tolist()
        rows = [layout.verify_starts[i] + j for i, count in zip(constrained, counts, strict=True) for j in range(count)]
        masks = [self._by_slot[int(plan.slots[i])].masks[:n] for i, n in zip(constrained, counts, strict=True)]
        return GrammarRows(upload(rows, self._device), upload(torch.cat(masks), self._device))

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        """The slot's request emitted these tokens: what may follow the last of them is written into its first mask."""
        state = self._by_slot[slot]
        if state.error is not None:
            return
        try:
            state.matcher.advance(token_ids)
            state.matcher.fill_mask(state.masks[0])
        except GrammarError as error:
            state.error = str(error)

    def follow(
        self,
        batch: InputBatch,
        plan: StepPlan,
        inputs: StepInputs,
        logits_QV: Tensor,
        constrained: Sequence[int],
        packed: Tensor,
        sampled_ND: Tensor,
        draw: DrawDrafts,
    ) -> None:
        """Take what the constrained requests emitted and now hold through their grammars. Reads from the device.

        ``packed`` is the verdict's: the first and the third column are the tokens emitted and the drafts held.
        """
        layout = inputs.layout
        chosen_C = upload(constrained, batch.device)
        slot_C = inputs.slot_N[chosen_C]
        width = layout.max_drafts
        (read,) = Download(torch.cat((packed[chosen_C, 0:3:2], sampled_ND[chosen_C], batch.drafts_SK[slot_C]), dim=1)).read()
        walks = []
        for i, row in zip(constrained, read.tolist(), strict=True):
            slot, num_emitted, num_held = int(plan.slots[i]), row[0], row[1]
            self.advance(slot, row[2 : 2 + num_emitted])
            walks.append(DraftWalk(slot, row[2 + width : 2 + width + num_held]))
        computed_C = batch.num_computed_S[slot_C]
        accepted_C = (computed_C - inputs.attention.prefix_lengths[chosen_C] - layout.num_prefill_N[chosen_C]) - 1

        def resample(numbers: Sequence[int], draft: int, masks: Tensor) -> list[int]:
            walk = upload(numbers, batch.device)
            request, slot = chosen_C[walk], slot_C[walk]
            rank = (inputs.order_NB[request] == accepted_C[walk, None]).int().argmax(dim=1)
            tokens, probs = draw(
                inputs.needs,
                logits_QV,
                layout.masks_NBK[request, rank, draft],
                slot,
                torch.full_like(slot, draft - 1),
                computed_C[walk] + draft,
                GrammarRows(torch.arange(len(walk), device=batch.device), upload(masks, batch.device)),
            )
            batch.drafts_SK[slot, draft], batch.draft_probs_SK[slot, draft] = tokens, probs
            (drawn,) = Download(tokens).read()
            return drawn.tolist()

        self.walk(walks, resample)

    def walk(self, walks: Sequence[DraftWalk], resample: Resample) -> None:
        """Take fresh drafts through their grammars, all requests in step, and draw again each one that is forbidden.

        The masks of the next step's verifying rows are written on the way.
        """
        for number in range(1, max((len(walk.token_ids) for walk in walks), default=0)):
            open_walks = [i for i, w in enumerate(walks) if number < len(w.token_ids) and self._is_sound(w.slot)]
            forbidden = [i for i in open_walks if not self._take(walks[i], number)]
            if forbidden:
                masks = torch.stack([self._by_slot[walks[i].slot].masks[number - 1] for i in forbidden])
                for i, token_id in zip(forbidden, resample(forbidden, number, masks), strict=True):
                    walks[i].token_ids[number] = token_id
                    if not self._take(walks[i], number):
                        # Nothing that can be sampled is allowed (the mask token, say): verification decides alone.
                        del walks[i].token_ids[number:]
        for walk in walks:
            self._come_back(walk.slot)

    def _is_sound(self, slot: int) -> bool:
        return self._by_slot[slot].error is None

    def _take(self, walk: DraftWalk, number: int) -> bool:
        state = self._by_slot[walk.slot]
        if not state.matcher.try_draft(walk.token_ids[number]):
            return False
        try:
            state.matcher.fill_mask(state.masks[number])
        except GrammarError as error:
            state.error = str(error)
        return True

    def _come_back(self, slot: int) -> None:
        state = self._by_slot[slot]
        try:
            if state.error is None:
                state.matcher.drop_drafts()
        except GrammarError as error:
            state.error = str(error)
