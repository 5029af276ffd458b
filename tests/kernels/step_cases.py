"""Random decode steps: shapes, bounds and device state, with all that may stand beside each other in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.decode.layout import build_layout
from engine.step import RequestShape
from kernels.backend import Kernels
from kernels.decode_state import DecodeState
from kernels.step_rows import reference as step_rows_reference
from kernels.step_rows.metadata import StepLayout, StepRows
from kernels.survival.reference import NUM_BINS
from kernels.verify import reference as verify_reference
from kernels.verify.metadata import StepRequests

PAGE_SIZE, MAX_PAGES, MASK = 8, 9, 7


@dataclass(frozen=True)
class StepCase:
    """What the requests of a step may have; ``max_drafts`` is the engine's."""

    num_requests: int = 12
    seed: int = 0
    max_drafts: int = 6
    prefill: bool = False
    drafts: bool = True
    branches: bool = True
    anchors: bool = False
    diffusion: bool = False
    first_masks: bool = False

    MODES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"drafts": False, "branches": False},
        {"branches": False},
        {"drafts": False},
        {},
        {"anchors": True},
        {"prefill": True, "anchors": True, "first_masks": True},
        {"prefill": True, "diffusion": True, "first_masks": True},
    )
    """``ar``, the two phases of ``linear``, ``tidar``, with anchors, and two mixtures."""


@dataclass(frozen=True)
class RandomStep:
    """The arguments of the operations on a step."""

    state: DecodeState
    layout: StepLayout
    bounds_3N: Tensor
    prefill: Tensor

    def requests(self, rows: StepRows) -> StepRequests:
        return StepRequests(self.bounds_3N[0], rows.prefix_lengths_N, rows.num_drafts_N, rows.order_NB)

    def copy_of_state(self) -> DecodeState:
        return DecodeState(*(t.clone() for t in self.state))


def random_step(case: StepCase, device: torch.device) -> RandomStep:
    """Some requests are the null slot, hold more or fewer drafts than their bounds, or are near their end."""
    rng, k = np.random.default_rng(case.seed), case.max_drafts
    num_slots = case.num_requests + 1
    shapes, bounds = [], []
    for slot in rng.permutation(case.num_requests).tolist():
        block = int(rng.integers(2, k + 1)) if k > 1 else 1
        num_prefill = int(rng.choice((0, 1, 5, 200 if slot == 0 else 3))) if case.prefill else 0
        num_drafts = int(rng.integers(0 if case.prefill else 1, k + 1)) if case.drafts else 1
        num_branches = int(rng.integers(0, num_drafts + 1)) if case.branches and k > 1 else 0
        anchor = case.anchors and bool(rng.integers(2))
        shapes.append(RequestShape(num_prefill, num_drafts, num_branches, block, anchor, 0))
        slot = case.num_requests if rng.integers(5) == 0 else slot
        bounds.append((slot, int(rng.integers(0, num_drafts + 1)), int(rng.integers(0, num_branches + 1))))
    layout = build_layout(np.array(shapes, dtype=np.int64), case.first_masks, device)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(low, high, shape))

    probs = torch.from_numpy(rng.choice((0.0, 0.3, 0.5, 0.75, 0.97, 0.9999, 1.0, np.nan), (num_slots, k)))
    # Without outcomes the chances are the probabilities, few of which are different: then branches are equally likely.
    tried = integers(0, 9000, 2, NUM_BINS) / 2 * (case.seed % 2)
    state = DecodeState(
        block_table_SP=integers(0, 500, num_slots, MAX_PAGES + 40),
        num_computed_S=integers(0, PAGE_SIZE * MAX_PAGES, num_slots),
        num_held_S=integers(0, k + 1, num_slots),
        wanted_S=integers(0, k + 4, num_slots) * integers(0, 4, num_slots).clamp(max=1),
        drafts_SK=integers(0, 2, num_slots, k),
        draft_probs_SK=torch.where(integers(0, 4, num_slots, k) > 0, probs, integers(0, 1000, num_slots, k) / 999).float(),
        is_diffusion_S=integers(0, 2, num_slots) == (1 if case.diffusion else 2),
        is_decided_SK=(integers(0, 2, num_slots, k) == 1) & case.diffusion,
        block_SK=integers(10, 99, num_slots, k),
        seed_S=integers(-(2**63), 2**63 - 1, num_slots),
        tried=tried.float(),
        accepted=(tried * 0.7).float(),
    )
    for column in (state.num_computed_S, state.wanted_S, state.is_diffusion_S):
        column[-1] = 0
    prefill = integers(10, 99, len(layout.prefill_rows))
    moved = DecodeState(*(t.to(device) for t in state))
    return RandomStep(moved, layout, torch.tensor(bounds, device=device).T.contiguous(), prefill.to(device))


def check_lay_out(kernels: Kernels, case: StepCase, device: torch.device) -> None:
    """All rows are those of the reference, and the state stays as it was."""
    step = random_step(case, device)
    before = step.copy_of_state()
    arguments = (step.state, step.layout, step.bounds_3N, step.prefill, PAGE_SIZE, MASK)
    expected, given = step_rows_reference.lay_out(*arguments), kernels.lay_out(*arguments)
    for name in StepRows._fields:
        assert torch.equal(getattr(given, name), getattr(expected, name)), name
    for name in DecodeState._fields:
        torch.testing.assert_close(getattr(step.state, name), getattr(before, name), rtol=0, atol=0, equal_nan=True)


def check_verify(kernels: Kernels, case: StepCase, chance: float | None, observes: bool, device: torch.device) -> None:
    """The result and all of the state are those of the reference. Tokens are few, so that many drafts match."""
    step = random_step(case, device)
    rows = step_rows_reference.lay_out(step.state, step.layout, step.bounds_3N, step.prefill, PAGE_SIZE, MASK)
    tokens_D = torch.randint(0, 2, rows.verify_slot_D.shape, generator=torch.Generator().manual_seed(case.seed)).to(device)
    results = []
    for verify in (kernels.verify, verify_reference.verify):
        state = step.copy_of_state()
        results.append((verify(state, step.layout, step.requests(rows), tokens_D, chance, observes), state))
    (given, given_state), (expected, expected_state) = results
    for name in expected._fields:
        assert torch.equal(getattr(given, name), getattr(expected, name)), name
    for name in DecodeState._fields:
        torch.testing.assert_close(
            getattr(given_state, name), getattr(expected_state, name), rtol=0, atol=0, equal_nan=True, msg=name
        )
