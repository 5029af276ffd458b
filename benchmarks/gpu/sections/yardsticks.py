"""The same attention by FlashInfer and FlashAttention-3, where they can be imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch

from benchmarks.gpu.attention_case import AttentionCase
from benchmarks.gpu.attention_yardsticks import Runs, causal, flash_attention_runs, masked, merged
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import PAGE
from benchmarks.gpu.record import Cell, Record
from benchmarks.gpu.sections.attention import REFERENCE_TOKENS, cases, figures
from benchmarks.gpu.sections.attention import show as show_attention
from benchmarks.gpu.sections.base import Cells, Section, attempt
from kernels.backend import REFERENCE

YARDSTICKS: dict[str, tuple[str, Callable[[AttentionCase], Runs]]] = {
    "flash_attention": ("flash_attn_interface", flash_attention_runs),
    "flashinfer_masked": ("flashinfer", masked),
    "flashinfer_merged": ("flashinfer", merged),
    "flashinfer_causal": ("flashinfer", causal),
}
"""The module that has to be there, and what it runs. What is built ahead comes first; FlashInfer compiles each way when it is
first used, so that each has a process and a time of its own, and what one has compiled stays for the next."""


def run(bench: Bench, part: str) -> Cells:
    """The sizes of the section on attention, those of the target first, as far as the time goes."""
    model, kind = part.rsplit(".", 1)
    module, make_runs = YARDSTICKS[kind]
    why = absence(bench, module)
    if why:
        yield {"kernels": kind, "absent": why}
        return
    for size, case in cases(bench, model):
        try:
            runs = make_runs(case)
        except Exception as error:  # a peer may fail in any way, and its failure is a finding
            yield size | {"kernels": kind, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        for name, attend in runs.items():
            yield attempt(size | {"kernels": name}, lambda n=name, a=attend, c=case: _measure(bench, c, n, a))
        del case, runs


def absence(bench: Bench, module: str) -> str:
    """Why a yardstick cannot be used; empty if it can. What it needs may lie under ``site`` among the peers."""
    if bench.peers is not None and str(bench.peers / "site") not in sys.path:
        sys.path.insert(0, str(bench.peers / "site"))
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation fails in ways of its own
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _measure(bench: Bench, case: AttentionCase, name: str, attend: Callable[[int], torch.Tensor]) -> Cell:
    is_comparable = not name.endswith("no mask") and case.num_requests * case.context <= REFERENCE_TOKENS
    error = _error(case, attend(0)) if is_comparable else None
    return figures(bench, case, bench.kernel_ms(attend, len(case.caches))) | {"max_error": error}


def _error(case: AttentionCase, out: torch.Tensor) -> float:
    """The largest difference from the reference: whether the yardstick computes the same at all."""
    prepared = REFERENCE.prepare_attention(case.metadata, PAGE, case.group_size, case.q.dtype)
    expected = REFERENCE.paged_attention(case.q, case.k, case.v, *case.caches[0], prepared, case.scale)
    return float((out.view_as(expected) - expected).abs().max())


def show(records: list[Record]) -> str:
    """The table of the section on attention; who has no figure in it is named with the reason."""
    reasons = []
    for record in records:
        if not any("us" in cell or "absent" in cell for cell in record.cells):
            errors = [cell["error"] for cell in record.cells if "error" in cell]
            why = record.error or next(iter(errors), f"nothing was measured in {record.bound:.0f} s")
            reasons.append(f"{record.part}: no figure ({why.strip().splitlines()[-1]})")
    return "\n".join([show_attention(records), *reasons])


SECTION = Section(
    "yardsticks",
    "how fast are the attention kernels that others wrote, at the same sizes?",
    run,
    show,
    240.0,
    per_model=True,
    kinds=tuple(YARDSTICKS),
)
