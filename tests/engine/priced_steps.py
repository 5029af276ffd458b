"""Steps that are timed by a price instead of a clock, so that a test knows what an engine learns of them at its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from engine import build
from engine.step import DraftPlan


@dataclass
class PricedSteps:
    """Seconds of any step, and of each row in it; ``num_timed`` steps were asked for."""

    step: float
    row: float
    num_timed: int = 0

    def __call__(self, num_requests: int, plan: DraftPlan, context: int) -> float:
        self.num_timed += 1
        return self.step + self.row * num_requests * plan.num_rows

    def replace_the_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of engines that are put together from now on."""

        def step_timer(*_: Any, **__: Any) -> PricedSteps:
            return self

        monkeypatch.setattr(build, "step_timer", step_timer)
