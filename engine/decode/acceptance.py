"""How often drafts are accepted and branches hit, learnt from what became of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.step import BoolArray, IntArray

PRIOR_ACCEPTANCE, FIRST_WEIGHT, PRIOR_WEIGHT = 0.7, 2.0, 32.0
"""What is expected of the first guess before anything was measured, and how many outcomes that is worth, which is next to
nothing; a later guess is expected to be like the one before it, which is worth ``PRIOR_WEIGHT`` outcomes."""

MAX_OUTCOMES = 8000.0
"""From here on old outcomes fade."""

ENOUGH_OUTCOMES = 32.0
"""First guesses that must have been tried before plans are compared; until then the configured plan is in force."""


class Acceptance:
    """How often draft ``i`` is accepted when all before it are, kept from outcomes that fade."""

    def __init__(self, block_length: int) -> None:
        self._tried = [0.0] * block_length
        self._accepted = [0.0] * block_length
        self._misses, self._blind_misses = 0.0, 0.0

    @staticmethod
    def known(rates: Sequence[float]) -> Acceptance:
        """After very many outcomes of guesses that are accepted at these rates, the first guess's first; for simulations."""
        acceptance = Acceptance(len(rates) + 1)
        for i, rate in enumerate(rates, start=1):
            acceptance._tried[i], acceptance._accepted[i] = 1e9, 1e9 * rate
        return acceptance

    @property
    def is_measured(self) -> bool:
        """Whether enough is known to compare plans."""
        return len(self._tried) > 1 and self._tried[1] >= ENOUGH_OUTCOMES

    def observe(self, num_drafts_N: IntArray, num_accepted_N: IntArray) -> None:
        """Requests verified ``num_drafts`` drafts, the certain one included, and accepted ``num_accepted``."""
        length = len(self._tried)
        tried_up_to = np.bincount(np.minimum(num_accepted_N, num_drafts_N - 1).clip(min=0), minlength=length)
        accepted = np.bincount(num_accepted_N, minlength=length + 1)
        tried_at, accepted_at = _or_more(tried_up_to), _or_more(accepted)
        for i in range(1, length):
            self._tried[i] += tried_at[i]
            self._accepted[i] += accepted_at[i + 1]
            if self._tried[i] > MAX_OUTCOMES:
                self._tried[i] /= 2
                self._accepted[i] /= 2

    def observe_hits(self, is_hit_N: BoolArray, num_drafts_N: IntArray, num_branches_N: IntArray) -> None:
        """Where one of ``num_branches`` branches behind ``num_drafts`` drafts was hit, fewer branches than drafts."""
        self._misses += float(len(is_hit_N) - np.count_nonzero(is_hit_N))
        width = len(self._tried) + 1
        kinds = np.bincount(num_drafts_N * width + num_branches_N)
        for kind in np.flatnonzero(kinds).tolist():
            num_drafts, num_branches = divmod(kind, width)
            blind_miss = 1.0 - blind_chance(self.counts(num_drafts), num_branches)
            self._blind_misses += float(kinds[kind]) * blind_miss
        if self._blind_misses > MAX_OUTCOMES:
            self._misses /= 2
            self._blind_misses /= 2

    def counts(self, num_drafts: int) -> list[float]:
        """Chances that exactly ``1 .. num_drafts`` drafts are accepted; a position that was never tried is like the last."""
        chances, survival, rate = [], 1.0, PRIOR_ACCEPTANCE
        for i in range(1, num_drafts):
            weight = PRIOR_WEIGHT if i > 1 else FIRST_WEIGHT
            rate = (self._accepted[i] + weight * rate) / (self._tried[i] + weight)
            chances.append(survival * (1 - rate))
            survival *= rate
        return [*chances, survival]

    def standard_error(self, num_drafts: int) -> float:
        """Of how many of ``num_drafts`` drafts are accepted on average, as a share of that number.

        Rates are independent binomial ones. With ``S_i`` the chance that at least ``i`` guesses are accepted, the mean is
        ``1 + S_1 + S_2 + ...``, and a rate ``r_i`` moves it by ``(S_i + S_i+1 + ...) / r_i`` (propagation of uncertainty).
        """
        at_least = np.cumsum(self.counts(num_drafts)[::-1])[::-1]
        rates, behind = at_least[1:] / at_least[:-1], np.cumsum(at_least[::-1])[::-1]
        # What a later guess is expected to be has its own error, so that it is worth nothing here.
        tried = np.array(self._tried[1:num_drafts]) + FIRST_WEIGHT
        variance = np.sum(behind[1:] ** 2 * (1 - rates) / (rates * tried))
        return float(np.sqrt(variance) / behind[0])

    def chance_of_hit(self, counts: Sequence[float], num_branches: int) -> float:
        """That one of ``num_branches`` branches is hit.

        Branches are ranked for each request by its own drafts, which misses less often than ranking by ``counts``; by which
        factor is measured, and taken for all numbers of branches alike.
        """
        blind_miss = 1.0 - blind_chance(counts, num_branches)
        better = (self._misses + PRIOR_WEIGHT) / (self._blind_misses + PRIOR_WEIGHT)
        return 1.0 - blind_miss * min(1.0, better)


def _or_more(counts: IntArray) -> list[int]:
    """How many are at least ``i``, for every ``i``, from how many are exactly ``i``."""
    at_least: list[int] = counts[::-1].cumsum()[::-1].tolist()
    return at_least


def blind_chance(counts: Sequence[float], num_branches: int) -> float:
    """The chance of a hit when the same branches, the likeliest by ``counts``, are run for everybody."""
    return min(1.0, sum(sorted(counts, reverse=True)[:num_branches]))
