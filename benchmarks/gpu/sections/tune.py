"""Launch settings of the Triton kernels: the present ones beside the alternatives, and what the source should say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import tuning
from benchmarks.gpu.attention_case import AttentionCase, attention_case, attention_rig, prefill_case
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import AR, PAGE, redraft, tidar
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.attention import REFERENCE_TOKENS
from benchmarks.gpu.sections.base import Cells, Section, attempt, tabulate
from benchmarks.gpu.sections.tune_rows import compare_row_kernels
from benchmarks.gpu.shapes import one_layer
from benchmarks.gpu.trial import Run, measure
from engine.step import DraftPlan
from kernels.backend import REFERENCE
from kernels.launch import LOGITS, RMS_NORM, ROPE_KV_WRITE, SWIGLU
from kernels.paged_attention.settings import ATTENTION, AttentionSettings, TileSettings

MODEL = "8b"
"""Its shapes decide: the source has one set of settings."""

WHERE = ((8192, 8), (1024, 1), (1024, 32), (8192, 1), (1024, 8), (8192, 32))
"""Context and batch; those of the targets first."""

PLANS = (tidar(8, 8), AR, tidar(16, 7), redraft(16))
"""72, 1, 128 and 17 rows."""

CHUNK = 512
"""Rows of a prefill chunk, which is measured at batch 1."""

SPLIT_WHERE, SPLIT_PLANS = ((1024, 1), (8192, 1), (1024, 8), (8192, 8)), (AR, tidar(8, 8))
"""Where a tile may be worth cutting."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A name in the source, and what it has now."""

    name: str
    now: Any


CONSTANTS = {
    "attention": Constant("kernels/paged_attention/settings.py: ATTENTION, tiles", ATTENTION.tiles),
    "min_split": Constant("kernels/paged_attention/settings.py: AttentionSettings.min_split", ATTENTION.min_split),
    "rms_norm": Constant("kernels/launch.py: RMS_NORM", RMS_NORM),
    "rope_kv_write": Constant("kernels/launch.py: ROPE_KV_WRITE", ROPE_KV_WRITE),
    "swiglu": Constant("kernels/launch.py: SWIGLU", SWIGLU),
    "logits": Constant("kernels/launch.py: LOGITS", LOGITS),
}


def run(bench: Bench, part: str) -> Cells:
    """A cell for every size and settings, the present ones first; the last one has what the source should say."""
    cells = []
    for cell in _compare_attention(bench) if part == "attention" else compare_row_kernels(bench, MODEL):
        cells.append(cell)
        yield cell
    yield {"constants": recommend(cells)}


def _compare_attention(bench: Bench) -> Cells:
    """Every tile at every size, then how short the pieces of a context may be."""
    for size, case, is_cut in _cases(bench):
        packed = case.num_rows * case.group_size
        now = tuning.by_height(packed, ATTENTION.tiles)
        tiles = [now, *(tile for tile in tuning.attention_tiles(packed, case.config.head_dim) if tile != now)]
        tiles = list(bench.pick(tiles, tiles[:3]))
        alternatives = [(asdict(tile), str(tile), replace(ATTENTION, tiles=(tile,))) for tile in tiles]
        yield from _compare_settings(bench, case, size | {"kernel": "attention", "packed": packed}, alternatives)
        if is_cut:
            splits = [ATTENTION.min_split, *(n for n in tuning.MIN_SPLITS if n != ATTENTION.min_split)]
            choices = [({"min_split": n}, f"min_split {n}", replace(ATTENTION, min_split=n)) for n in splits]
            yield from _compare_settings(bench, case, size | {"kernel": "min_split"}, choices)
        del case
        bench.release()


def _cases(bench: Bench) -> Iterator[tuple[Cell, AttentionCase, bool]]:
    """Sizes with their cases, and whether to cut their contexts; those that do not fit the memory are left out."""
    config, where = one_layer(bench.config(MODEL)), bench.pick(WHERE, ((128, 2), (64, 1)))
    plans = bench.pick(PLANS, (tidar(4, 2), AR, redraft(4)))
    most = max(plan.num_rows for plan in plans)
    rig = attention_rig(bench, config, max(b for _, b in where), max(c for c, _ in where), most)

    def decode(plan: DraftPlan, batch: int, context: int) -> Callable[[], AttentionCase]:
        return lambda: attention_case(bench, rig, batch, plan, context)

    for context, batch in where:
        makers = [(plan.num_rows, decode(plan, batch, context)) for plan in plans]
        if batch == 1:
            rows = bench.size(CHUNK, 20)
            makers.append((rows, lambda c=context, n=rows: prefill_case(bench, config, 1, n, c)))
        for rows, make in makers:
            size = {"size": f"{rows} rows, batch {batch}, context {context}"}
            is_cut = rows in [plan.num_rows for plan in SPLIT_PLANS] and (context, batch) in SPLIT_WHERE
            try:
                yield size, make(), is_cut or bench.is_dry
            except torch.OutOfMemoryError:
                bench.release()


def _compare_settings(
    bench: Bench, case: AttentionCase, cell: Cell, alternatives: Sequence[tuple[dict[str, int], str, AttentionSettings]]
) -> Cells:
    """The first are the present ones; where the reference needs too much memory, the others have to compute what they do."""
    has_reference = case.num_requests * case.context <= REFERENCE_TOKENS
    expects = _reference(case) if has_reference else _ours(bench, case, alternatives[0][2]).call
    made = attempt(cell | {"text": "what is expected"}, lambda: {"expected": expects(0)})
    if "error" in made:
        yield made
        return
    for number, (plain, text, settings) in enumerate(alternatives):
        about = {"settings": plain, "text": text, "is_now": number == 0, "of": len(alternatives)}
        yield attempt(cell | about, lambda s=settings: measure(bench, _ours(bench, case, s), [made["expected"]]))


def _reference(case: AttentionCase) -> Callable[[int], Tensor]:
    prepared = REFERENCE.prepare_attention(case.metadata, PAGE, case.group_size, case.q.dtype)
    return lambda layer: REFERENCE.paged_attention(case.q, case.k, case.v, *case.caches[layer], prepared, case.scale)


def _ours(bench: Bench, case: AttentionCase, settings: AttentionSettings) -> Run:
    """The Triton kernel, or the reference in a dry run; what the compiler made of it is looked at before it is timed."""
    if bench.is_dry:
        return Run(_reference(case), len(case.caches))
    from kernels.paged_attention import triton as ours

    prepared = ours.prepare(
        case.metadata, PAGE, case.group_size, case.q.dtype, num_kv_heads=case.config.num_kv_heads, settings=settings
    )

    def inspect() -> Cell:
        """Registers and memory of the compiled tiles. Raises ValueError where timing them would be a waste of time."""
        (work,) = prepared.lists
        compiled = ours.launch(torch.empty_like(case.q), case.q, case.k, case.v, *case.caches[0], prepared, work, case.scale)
        found = {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}
        why = tuning.objection(work.tile, found["spills"], found["shared"])
        if why:
            raise ValueError(why)
        return found

    return Run(
        lambda layer: ours.paged_attention(case.q, case.k, case.v, *case.caches[layer], prepared, case.scale),
        len(case.caches),
        inspect,
    )


def recommend(cells: Sequence[Cell]) -> list[str]:
    """A line for every constant that was measured: its best value for all sizes together, and what that gains."""
    lines = []
    for kernel, constant in CONSTANTS.items():
        times, packed = _times(cells, kernel)
        if not times:
            continue
        if kernel == "attention":
            chosen = tuning.choose_tiles(times, packed)
            tiles = {size: tuning.by_height(packed[size], chosen) for size in times} if chosen else {}
        else:
            found = tuning.best(times)
            chosen = found[0] if found else None
            tiles = dict.fromkeys(times, chosen)
        now = {c["size"]: _settings(kernel, c["settings"]) for c in cells if c.get("kernel") == kernel and c.get("is_now")}
        lost = [size for size in times if now[size] not in times[size]]
        if not chosen:
            lines.append(f"{constant.name}: no settings ran at every size")
        elif lost:
            lines.append(f"{constant.name} = {chosen!r}  # the present ones did not run at {'; '.join(lost)}")
        else:
            gain = tuning.excess(times, tiles) / tuning.excess(times, now)
            over = f"{gain:.3f} of the present time over {len(times)} sizes"
            lines.append(f"{constant.name} = {chosen if gain <= tuning.ENOUGH else constant.now!r}  # best found: {over}")
    return lines


def _times(cells: Sequence[Cell], kernel: str) -> tuple[dict[str, dict[Any, float]], dict[str, int]]:
    """Times by size and settings, of sizes whose alternatives were all tried; and query vectors by size."""
    times: dict[str, dict[Any, float]] = {}
    tried: dict[str, int] = {}
    is_whole: dict[str, bool] = {}
    packed: dict[str, int] = {}
    for cell in (cell for cell in cells if cell.get("kernel") == kernel and "of" in cell):
        size = cell["size"]
        tried[size] = tried.get(size, 0) + 1
        packed[size] = cell.get("packed", 0)
        if "us" in cell:
            times.setdefault(size, {})[_settings(kernel, cell["settings"])] = cell["us"]
        is_whole[size] = tried[size] == cell["of"]
    return {size: found for size, found in times.items() if is_whole[size]}, packed


def _settings(kernel: str, plain: dict[str, int]) -> Any:
    if kernel == "attention":
        return TileSettings(**plain)
    return plain["min_split"] if kernel == "min_split" else replace(CONSTANTS[kernel].now, **plain)


def show(records: list[Record]) -> str:
    """For every size the present settings beside the best ones; then what did not run, and the lines for the source."""
    cells = [cell for record in records for cell in record.cells if "kernel" in cell]
    sizes: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        sizes.setdefault((cell["kernel"], cell["size"]), []).append(cell)
    rows = []
    for (kernel, size), tried in sizes.items():
        ran = [cell for cell in tried if "us" in cell]
        now, best = next((c for c in ran if c["is_now"]), None), min(ran, key=lambda c: c["us"], default=None)
        row = {"kernel": kernel, "size": size, "tried": len(tried)}
        row |= {"now": now["text"], "now_us": now["us"]} if now else {}
        row |= {"best": best["text"], "best_us": best["us"]} if best else {}
        row |= {"ratio": best["us"] / now["us"]} if now and best else {}
        rows.append(row)
    columns = (
        ("kernel", "kernel", ""),
        ("size", "size", ""),
        ("tried", "tried", "d"),
        ("now", "now", ""),
        ("us", "now_us", ".2f"),
        ("best", "best", ""),
        ("us", "best_us", ".2f"),
        ("best / now", "ratio", ".3f"),
    )
    failures = {f"{c['kernel']}, {c['text']}: {c['error']}" for c in cells if "error" in c}
    table = tabulate([Record("tune", "", cells=rows)], columns)
    return "\n".join([table, "", *sorted(failures), *(["", *recommend(cells)] if cells else [])])


SECTION = Section(
    "tune",
    "which launch settings are best, and are they the present ones?",
    run,
    show,
    240.0,
    kinds=("attention", "rows"),
)
