"""The targets of one H200, and what a run reached of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.gpu.record import Cell, Record

Records = dict[str, Record]

CARD = "H200"
"""What the targets are for."""


@dataclass(frozen=True, slots=True)
class Target:
    """``measure`` finds the figure among the records, None where it was not measured. ``is_upper``: less is better.

    ``is_ratio``: the figure has no scale, so that it is judged on any card. ``parts`` are those that have the cells.
    """

    what: str
    wanted: float
    measure: Callable[[Records], float | None]
    parts: tuple[str, ...]
    is_upper: bool = False
    is_ratio: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a target stands on a card: ``margin`` is how far the figure is beyond it.

    ``reached`` is None where nothing was measured, and on a card that the target is not for.
    """

    what: str
    wanted: float
    found: float | None
    reached: bool | None
    margin: float | None
    parts: tuple[str, ...]
    card: str

    @property
    def verdict(self) -> str:
        """In words."""
        if self.margin is None:
            return f"not measured ({', '.join(self.parts)})"
        if self.reached is None:
            return f"not judged: targets are for an {CARD}, this is {self.card}"
        return f"reached, by {self.margin:.1%}" if self.reached else f"missed, by {-self.margin:.1%}"


def cells(records: Records, section: str, **wanted: object) -> Iterable[Cell]:
    """Cells of a section in which these keys have these values."""
    for record in records.values():
        if record.section == section:
            yield from (c for c in record.cells if all(c.get(key) == value for key, value in wanted.items()))


def first(records: Records, section: str, key: str, **wanted: object) -> float | None:
    """A figure of the first cell that has it."""
    return next((float(c[key]) for c in cells(records, section, **wanted) if c.get(key) is not None), None)


def _step(key: str, model: str, batch: int, plan: str) -> Callable[[Records], float | None]:
    where = {"model": model, "kernels": "triton", "batch": batch, "context": 1024, "plan": plan, "temperature": 0.0}
    return lambda records: first(records, "step", key, **where)


def _attention(records: Records) -> float | None:
    found = [
        c["tflops"]
        for c in cells(records, "attention", model="8b", kernels="triton", batch=8, context=8192)
        if c.get("rows_each", 0) >= 72 and "tflops" in c
    ]
    return min(found, default=None)


def _auto_over_ar(model: str, batch: int) -> Callable[[Records], float | None]:
    def measure(records: Records) -> float | None:
        where = {"model": model, "batch": batch, "depth": 1}
        auto = first(records, "throughput", "tokens_per_second", plan="auto", **where)
        ar = first(records, "throughput", "tokens_per_second", plan="ar", **where)
        return auto / ar if auto is not None and ar else None

    return measure


def _rate(model: str, plan: str) -> Callable[[Records], float | None]:
    return lambda records: first(records, "throughput", "tokens_per_second", model=model, plan=plan, batch=1, depth=1)


def _steps(model: str) -> tuple[str, ...]:
    return (f"step.{model}.triton",)


def _loops(model: str) -> tuple[str, ...]:
    return (f"throughput.{model}.plans",)


TARGETS = (
    *(
        Target(
            f"AR step, batch 1, context 1k, {m}: part of the copy bandwidth", 0.85, _step("of_bandwidth", m, 1, "ar"), _steps(m)
        )
        for m in ("8b", "1.5b")
    ),
    Target("72-row step over an AR step, 8b, 1k", 1.10, _step("over_ar", "8b", 1, "tidar 8x8"), _steps("8b"), is_upper=True),
    Target("128-row step over an AR step, 8b, 1k", 1.20, _step("over_ar", "8b", 1, "tidar 16x7"), _steps("8b"), is_upper=True),
    Target("attention, 72 rows or more, 8k, batch 8: TFLOP/s, the least", 300.0, _attention, ("attention.8b",), is_ratio=False),
    Target("batch 1, synthetic_acceptance=0.902, 8b: auto over AR", 5.9, _auto_over_ar("8b", 1), _loops("8b")),
    Target("batch 1, synthetic_acceptance=0.885, 1.5b: auto over AR", 5.0, _auto_over_ar("1.5b", 1), _loops("1.5b")),
    *(
        Target(f"auto over AR, synthetic_acceptance=0.902, 8b, batch {batch}", wanted, _auto_over_ar("8b", batch), _loops("8b"))
        for batch, wanted in ((8, 3.5), (32, 1.8), (128, 1.05), (256, 1.0))
    ),
    Target(
        "AR, 256 requests of 1024/1024, 8b: part of the roofline",
        0.75,
        lambda records: first(records, "throughput", "of_roofline", model="8b", plan="ar, long"),
        ("throughput.8b.long",),
    ),
)
"""Those that were agreed."""

RATES = tuple(
    Target(f"{name}: tokens per second", wanted, _rate(model, plan), _loops(model), is_ratio=False)
    for name, wanted, model, plan in (
        ("AR, batch 1, 8b", 240.0, "8b", "ar"),
        ("AR, batch 1, 1.5b", 870.0, "1.5b", "ar"),
        ("auto, batch 1, synthetic_acceptance=0.902, 8b", 1400.0, "8b", "auto"),
        ("auto, batch 1, synthetic_acceptance=0.885, 1.5b", 5000.0, "1.5b", "auto"),
    )
)
"""What they come to on one H200."""


def judge(records: Records, targets: Iterable[Target] = (*TARGETS, *RATES)) -> list[Outcome]:
    """Every target beside its figure, and the card that it was measured on. A dry run has none."""
    records = {name: found for name, found in records.items() if not found.machine.get("is_dry_run")}
    outcomes = []
    for target in targets:
        found = target.measure(records)
        cards = dict.fromkeys(str(records[part].machine.get("device", "unknown")) for part in target.parts if part in records)
        margin = (
            None if found is None else (target.wanted - found if target.is_upper else found - target.wanted) / target.wanted
        )
        is_judged = margin is not None and (target.is_ratio or all(re.search(rf"\b{CARD}\b", card) for card in cards))
        reached = margin >= 0 if margin is not None and is_judged else None
        outcomes.append(Outcome(target.what, target.wanted, found, reached, margin, target.parts, ", ".join(cards)))
    return outcomes
