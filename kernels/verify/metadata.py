"""What the verdict on a step reads and gives.

Shape suffixes: N requests of the step, D drafts at most, B branches at most, W guesses that a branch makes, Q = N * W.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepRequests(NamedTuple):
    """The requests of a step as it was laid out: slots, computed tokens, drafts that are verified, branches that are run."""

    slot_N: Tensor
    prefix_lengths_N: Tensor
    num_drafts_N: Tensor
    order_NB: Tensor


class Verified(NamedTuple):
    """``packed`` [N, 4 + D]: tokens emitted, drafts verified, held and committed, then the token taken after each draft.

    The rest is of the guesses that the hit branch makes of each request's next drafts: where their logits stand, -1 without a
    hit, the slots, and the positions of the tokens.
    """

    packed: Tensor
    place_Q: Tensor
    slot_Q: Tensor
    position_Q: Tensor
