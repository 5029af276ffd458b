"""The targets of one H200, and what a run reached of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.gpu.record import Cell, Record

Records = dict[str, Record]


@dataclass(frozen=True, slots=True)
class Target:
    """``measure`` finds the figure among the records, None where it was not measured. ``is_upper``: less is better."""

    what: str
    wanted: float
    measure: Callable[[Records], float | None]
    section: str
    is_upper: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a target stands; ``reached`` is None where nothing was measured, ``margin`` how far the figure is beyond it."""

    what: str
    wanted: float
    found: float | None
    reached: bool | None
    margin: float | None
    section: str

    @property
    def verdict(self) -> str:
        """In words."""
        if self.reached is None or self.margin is None:
            return f"not measured (section {self.section})"
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


TARGETS = (
    *(
        Target(
            f"AR step, batch 1, context 1k, {m}: part of the copy bandwidth", 0.85, _step("of_bandwidth", m, 1, "ar"), "step"
        )
        for m in ("8b", "1.5b")
    ),
    Target("72-row step over an AR step, 8b, 1k", 1.10, _step("over_ar", "8b", 1, "tidar 8x8"), "step", is_upper=True),
    Target("128-row step over an AR step, 8b, 1k", 1.20, _step("over_ar", "8b", 1, "tidar 16x7"), "step", is_upper=True),
    Target("attention, 72 rows or more, 8k, batch 8: TFLOP/s, the least", 300.0, _attention, "attention"),
    Target("batch 1, synthetic_acceptance=0.902, 8b: auto over AR", 5.9, _auto_over_ar("8b", 1), "throughput"),
    Target("batch 1, synthetic_acceptance=0.885, 1.5b: auto over AR", 5.0, _auto_over_ar("1.5b", 1), "throughput"),
    *(
        Target(f"auto over AR, synthetic_acceptance=0.902, 8b, batch {batch}", wanted, _auto_over_ar("8b", batch), "throughput")
        for batch, wanted in ((8, 3.5), (32, 1.8), (128, 1.05), (256, 1.0))
    ),
    Target(
        "AR, 256 requests of 1024/1024, 8b: part of the roofline",
        0.75,
        lambda records: first(records, "throughput", "of_roofline", model="8b", plan="ar, long"),
        "throughput",
    ),
)
"""Those that were agreed."""

RATES = (
    Target("AR, batch 1, 8b: tokens per second", 240.0, _rate("8b", "ar"), "throughput"),
    Target("AR, batch 1, 1.5b: tokens per second", 870.0, _rate("1.5b", "ar"), "throughput"),
    Target("auto, batch 1, synthetic_acceptance=0.902, 8b: tokens per second", 1400.0, _rate("8b", "auto"), "throughput"),
    Target("auto, batch 1, synthetic_acceptance=0.885, 1.5b: tokens per second", 5000.0, _rate("1.5b", "auto"), "throughput"),
)
"""What they come to on one H200."""


def judge(records: Records, targets: Iterable[Target] = (*TARGETS, *RATES)) -> list[Outcome]:
    """Every target beside its figure. A dry run has none."""
    records = {name: found for name, found in records.items() if not found.machine.get("is_dry_run")}
    outcomes = []
    for target in targets:
        found = target.measure(records)
        margin = (
            None if found is None else (target.wanted - found if target.is_upper else found - target.wanted) / target.wanted
        )
        reached = None if margin is None else margin >= 0
        outcomes.append(Outcome(target.what, target.wanted, found, reached, margin, target.section))
    return outcomes
