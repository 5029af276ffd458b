"""The policies of all modes side by side: which draft plans the requests of one step get."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.decode.auto import GoodputPolicy
from engine.decode.policy import DraftPolicy
from engine.sampling_params import DecodingMode
from engine.step import BoolArray, IntArray, columns


class DraftPlanner:
    """Asks each policy once for all its requests. Policies are numbered, so that a column can say whose each request is."""

    def __init__(self, by_mode: Mapping[DecodingMode, DraftPolicy]) -> None:
        self.policies: list[DraftPolicy] = []
        self._number_of_mode: dict[DecodingMode, int] = {}
        self._auto: GoodputPolicy | None = None
        self._number_of_auto = -1
        self._is_verifying: list[bool] = []
        for mode, policy in by_mode.items():
            self.use(mode, policy)

    def use(self, mode: DecodingMode, policy: DraftPolicy) -> None:
        """From now on, new requests of this mode follow this policy."""
        if not any(known is policy for known in self.policies):
            self.policies.append(policy)
            self._is_verifying.append(False)
        number = self._number_of_mode[mode] = next(i for i, known in enumerate(self.policies) if known is policy)
        if isinstance(policy, GoodputPolicy):
            self._auto, self._number_of_auto = policy, number

    def number_of(self, mode: DecodingMode) -> int | None:
        """The policy of a mode; None if the checkpoint cannot decode that way."""
        return self._number_of_mode.get(mode)

    def policy_of(self, mode: DecodingMode) -> DraftPolicy:
        """The policy of a mode that the checkpoint can decode in."""
        return self.policies[self._number_of_mode[mode]]

    @property
    def plan_in_force(self) -> tuple[str, tuple[tuple[str, float], ...]]:
        """The plan that ``auto`` follows now and what was expected of each; nothing where ``auto`` means a fixed plan."""
        return ("", ()) if self._auto is None else (str(self._auto.shape), self._auto.expected_by_name)

    def begin_step(self, num_tokens_N: IntArray, level_N: IntArray) -> None:
        """A step is being planned; ``num_tokens`` are those of the running requests, ``level`` those of their sampling."""
        self._is_verifying = [False] * len(self.policies)
        if self._auto is not None and len(num_tokens_N):
            self._auto.begin_step(len(num_tokens_N), float(num_tokens_N.sum()) / len(num_tokens_N), int(level_N.max()))

    def plans(self, policy_N: IntArray, held_N: IntArray, wanted_N: IntArray) -> IntArray:
        """Draft plans, [N, 4] (see ``DraftPolicy.plans``); those who want nothing more get an empty one.

        May be called more than once in a step, first for those that ran before: who is admitted afterwards holds no drafts.
        """
        is_wanting_N = wanted_N > 0
        if len(policy_N) and is_wanting_N.all() and (policy_N == policy_N[0]).all():
            return self._plans(int(policy_N[0]), held_N, wanted_N)
        plans = columns(len(policy_N), 4)
        plans[:, 2] = 1
        for number in range(len(self.policies)):
            rows = np.flatnonzero(is_wanting_N & (policy_N == number))
            if len(rows):
                plans[rows] = self._plans(number, held_N[rows], wanted_N[rows])
        return plans

    def _plans(self, number: int, held_N: IntArray, wanted_N: IntArray) -> IntArray:
        """The plans of one policy's requests."""
        self._is_verifying[number] |= int(held_N.max()) > 1
        return self.policies[number].plans(held_N, wanted_N, self._is_verifying[number])

    def observe(
        self, policy_N: IntArray, plans_N4: IntArray, num_drafts_N: IntArray, num_accepted_N: IntArray, is_hit_N: BoolArray
    ) -> None:
        """What became of a step, for the policy that learns: drafts verified and accepted, and whether a branch was hit."""
        if self._auto is None:
            return
        rows = np.flatnonzero(policy_N == self._number_of_auto)
        if len(rows) == len(policy_N):
            self._auto.observe(plans_N4, num_drafts_N, num_accepted_N, is_hit_N)
        elif len(rows):
            self._auto.observe(plans_N4[rows], num_drafts_N[rows], num_accepted_N[rows], is_hit_N[rows])
