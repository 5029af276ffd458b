"""What a section is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Cell, Record
from benchmarks.report import table

Cells = Iterator[Cell]


@dataclass(frozen=True, slots=True)
class Section:
    """One question, asked in parts of a few minutes at most.

    ``run(bench, part)`` yields cells, the most important first; it is stopped after ``seconds``. ``parts`` are names of models
    where ``per_model``, with ``kinds`` behind them: ``8b.triton``. ``show`` makes a text of all parts that have run.
    """

    name: str
    answers: str
    run: Callable[[Bench, str], Cells]
    show: Callable[[list[Record]], str]
    seconds: float
    per_model: bool = False
    kinds: tuple[str, ...] = ()

    def parts(self, models: list[str]) -> list[str]:
        """Names of the parts, empty for a section that has only one."""
        found = models if self.per_model else [""]
        return [f"{part}.{kind}".strip(".") for kind in (self.kinds or ("",)) for part in found]


def attempt(cell: Cell, measure: Callable[[], Cell]) -> Cell:
    """A cell with what ``measure`` finds, or with the error that it met: one size that fails does not take the others along."""
    try:
        return cell | measure()
    except Exception as error:
        return cell | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


Column = tuple[str, str, str]
"""Header, key of a cell, and how its value is formatted."""


def tabulate(records: list[Record], columns: tuple[Column, ...]) -> str:
    """A table of all cells; a value that a cell lacks is a dash, and its error stands behind it."""
    cells = [(record.part, cell) for record in records for cell in record.cells if any(key in cell for _, key, _ in columns)]
    with_part, with_error = any(part for part, _ in cells), any("error" in cell for _, cell in cells)
    header = (*(["part"] if with_part else []), *(name for name, _, _ in columns), *(["error"] if with_error else []))
    rows = []
    for part, cell in cells:
        values = [formatted(cell.get(key), form) for _, key, form in columns]
        error = [str(cell.get("error", ""))[:60]] if with_error else []
        rows.append([*([part] if with_part else []), *values, *error])
    return table(header, rows) if rows else "nothing was measured"


def engine_lines(records: list[Record]) -> list[str]:
    """What the engines of these records were made of, and what their graphs took at last, for below a table."""
    lines = []
    for record in records:
        graphs = next((cell for cell in reversed(record.cells) if "graph_bytes" in cell), None)
        took = "" if graphs is None else f"; {graphs['graphs']} graphs took {graphs['graph_bytes'] / 2**30:.2f} GiB"
        for engine in (cell["engine"] for cell in record.cells if "engine" in cell):
            triton = [name for name, where in engine["operations"].items() if re.search(r"\.(triton|tuned)\b", where)]
            lines.append(
                f"{record.part}: kernels {engine['kernels']}, from Triton: {', '.join(triton) or 'none'}; linear layers: "
                f"{engine['settings'].get('linear layers', 'not measured')}{took}"
            )
    return lines


def formatted(value: object, form: str = "") -> str:
    """A value for a table; a dash where there is none."""
    return "-" if value is None else format(value, form) if form else str(value)
