"""Which draft plan a request gets: a rule over columns, so that a step asks once for all requests of a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from engine.config import DecodeConfig
from engine.sampling_params import DecodingMode
from engine.step import IntArray, columns


class DraftPolicy(Protocol):
    """Chooses the bounds of requests' decode rows."""

    @property
    def mode(self) -> DecodingMode:
        """The mode it plans for, never ``AUTO``."""
        ...

    @property
    def verifies(self) -> bool:
        """Whether drafts are guesses, the first of which alone has been emitted: every decode step then emits a token.

        Otherwise all drafts that a request holds have been emitted, and several steps may pass without another token.
        """
        ...

    def plans(self, held_N: IntArray, wanted_N: IntArray, is_verifying: bool) -> IntArray:
        """The draft plans of requests that hold at most ``held`` drafts and want at most ``wanted`` more tokens, 1 or more.

        Returns the fields of ``DraftPlan``, [N, 4]. ``is_verifying``: one of this step's requests of this policy holds more
        than its certain draft.
        """
        ...


def draft_plans(num_drafts_N: IntArray, num_branches_N: IntArray | int, block_length: int, has_anchor: bool) -> IntArray:
    """Plans of one block length as columns, [N, 4]."""
    plans = columns(len(num_drafts_N), 4)
    plans[:, 0], plans[:, 1], plans[:, 2], plans[:, 3] = num_drafts_N, num_branches_N, block_length, has_anchor
    return plans


@dataclass(frozen=True, slots=True)
class Autoregressive:
    """Plain decoding: one draft, which is certain, and no branch."""

    mode: ClassVar[DecodingMode] = DecodingMode.AR
    verifies: ClassVar[bool] = True

    def plans(self, held_N: IntArray, wanted_N: IntArray, is_verifying: bool) -> IntArray:
        return draft_plans(np.ones_like(held_N), 0, 1, False)

    def __str__(self) -> str:
        return "ar"


@dataclass(frozen=True, slots=True)
class Drafting:
    """The TiDAR family. Drafts are verified beside at most ``num_branches`` branches of ``block_length`` masks.

    ``num_branches`` 0 is ``linear``: a step that verifies drafts runs no branch, so it always misses, and the step after it is
    a redraft. A request that holds only its certain draft runs branch 0, the only one there is, in every plan; but in
    ``linear`` not beside others that verify: so all are in the same phase, and one step has one plan.
    ``has_anchor``: the checkpoint's branches begin with a copy of their draft.
    """

    verifies: ClassVar[bool] = True
    block_length: int
    num_branches: int
    has_anchor: bool = False

    @property
    def mode(self) -> DecodingMode:
        return DecodingMode.TIDAR if self.num_branches else DecodingMode.LINEAR

    def plans(self, held_N: IntArray, wanted_N: IntArray, is_verifying: bool) -> IntArray:
        num_drafts_N = np.minimum(np.minimum(held_N, wanted_N), self.block_length)
        num_branches_N = num_useful_branches(num_drafts_N, wanted_N)
        num_branches_N = np.minimum(num_branches_N, allowed_branches(self.num_branches, held_N, is_verifying))
        return draft_plans(num_drafts_N, num_branches_N, self.block_length, self.has_anchor)

    def __str__(self) -> str:
        name = f"tidar with {self.num_branches} of {self.block_length} branches" if self.num_branches else "linear"
        return f"{name}, blocks of {self.block_length}"


@dataclass(frozen=True, slots=True)
class BlockDiffusion:
    """One block of masks in every step, behind the drafts of the block before, which are computed whatever they are."""

    mode: ClassVar[DecodingMode] = DecodingMode.DIFFUSION
    verifies: ClassVar[bool] = False
    block_length: int

    def plans(self, held_N: IntArray, wanted_N: IntArray, is_verifying: bool) -> IntArray:
        return draft_plans(held_N, 1, self.block_length, False)

    def __str__(self) -> str:
        return f"diffusion, blocks of {self.block_length} (lossy)"


def num_useful_branches(num_drafts_N: IntArray, wanted_N: IntArray) -> IntArray:
    """How many branches are worth running: the hit of branch ``i`` emits ``i + 1`` tokens and must leave at least two."""
    useful: IntArray = np.maximum(np.minimum(num_drafts_N, wanted_N - 2), 0)
    return useful


def allowed_branches(num_branches: int, held_N: IntArray, is_verifying: bool) -> IntArray | int:
    """Branches that a plan of the TiDAR family allows to requests that hold so many drafts."""
    if num_branches == 0:
        return 0 if is_verifying else 1
    return np.where(held_N > 1, num_branches, 1)


def default_mode(config: DecodeConfig, block_length: int | None) -> DecodingMode:
    """What ``auto`` means in a request: the configured mode, or the fastest that the checkpoint was trained for."""
    if config.mode is not DecodingMode.AUTO:
        return config.mode
    return DecodingMode.AR if block_length is None else DecodingMode.TIDAR


def policies(
    config: DecodeConfig, block_length: int | None, max_rows: int, has_anchor: bool = False
) -> dict[DecodingMode, DraftPolicy]:
    """The policy of every mode that the checkpoint supports; ``block_length`` None means that it was not trained to draft.

    A step of fewer than two blocks of rows may never have room for a whole one, without which diffusion makes no progress.
    """
    available: dict[DecodingMode, DraftPolicy] = {DecodingMode.AR: Autoregressive()}
    if block_length is not None:
        branches = block_length if config.num_branches is None else config.num_branches
        available[DecodingMode.LINEAR] = Drafting(block_length, 0, has_anchor)
        available[DecodingMode.TIDAR] = Drafting(block_length, branches, has_anchor)
        if max_rows >= 2 * block_length:
            available[DecodingMode.DIFFUSION] = BlockDiffusion(block_length)
    available[DecodingMode.AUTO] = available[default_mode(config, block_length)]
    return available
