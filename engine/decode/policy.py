"""Which draft plan a request gets. For now every policy is fixed; ``auto`` means the configured one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from engine.config import DecodeConfig
from engine.sampling_params import DecodingMode
from engine.step import DraftPlan


class DraftPolicy(Protocol):
    """Chooses the bounds of a request's decode rows."""

    @property
    def mode(self) -> DecodingMode:
        """The mode it plans for, never ``AUTO``."""
        ...

    @property
    def min_emitted(self) -> int:
        """The fewest tokens that a decode step gives: 0 where several forwards may pass without one."""
        ...

    def num_emitted(self, held: int) -> int:
        """How many of the drafts that a request holds it has emitted already."""
        ...

    def plan(self, held: int, wanted: int) -> DraftPlan:
        """The draft plan of a request that holds at most ``held`` drafts and wants at most ``wanted`` more tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Autoregressive:
    """Plain decoding: one draft, which is certain, and no branch."""

    mode: ClassVar[DecodingMode] = DecodingMode.AR
    min_emitted: ClassVar[int] = 1

    def num_emitted(self, held: int) -> int:
        return 1

    def plan(self, held: int, wanted: int) -> DraftPlan:
        return DraftPlan(1, 0, 1)

    def __str__(self) -> str:
        return "ar"


@dataclass(frozen=True, slots=True)
class Drafting:
    """The TiDAR family. Drafts are verified beside at most ``num_branches`` branches of ``block_length`` masks.

    ``num_branches`` 0 is ``linear``: a step that verifies drafts runs no branch, so it always misses, and the step after it is
    a redraft. A request that holds only its certain draft runs branch 0, the only one there is, in every plan.
    ``has_anchor``: the checkpoint's branches begin with a copy of their draft.
    """

    min_emitted: ClassVar[int] = 1
    block_length: int
    num_branches: int
    has_anchor: bool = False

    @property
    def mode(self) -> DecodingMode:
        return DecodingMode.TIDAR if self.num_branches else DecodingMode.LINEAR

    def num_emitted(self, held: int) -> int:
        return 1

    def plan(self, held: int, wanted: int) -> DraftPlan:
        num_drafts = min(held, wanted, self.block_length)
        allowed = self.num_branches if held > 1 else 1
        num_branches = min(allowed, num_useful_branches(num_drafts, wanted))
        return DraftPlan(num_drafts, num_branches, self.block_length, self.has_anchor)

    def __str__(self) -> str:
        name = f"tidar with {self.num_branches} of {self.block_length} branches" if self.num_branches else "linear"
        return f"{name}, blocks of {self.block_length}"


@dataclass(frozen=True, slots=True)
class BlockDiffusion:
    """One block of masks in every step, behind the drafts of the block before, which are computed whatever they are."""

    mode: ClassVar[DecodingMode] = DecodingMode.DIFFUSION
    min_emitted: ClassVar[int] = 0
    block_length: int

    def num_emitted(self, held: int) -> int:
        return held

    def plan(self, held: int, wanted: int) -> DraftPlan:
        return DraftPlan(held, 1, self.block_length)

    def __str__(self) -> str:
        return f"diffusion, blocks of {self.block_length} (lossy)"


def num_useful_branches(num_drafts: int, wanted: int) -> int:
    """How many branches are worth running: the hit of branch ``i`` emits ``i + 1`` tokens and must leave at least two."""
    return max(0, min(num_drafts, wanted - 2))


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
