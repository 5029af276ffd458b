"""Launch settings of the kernels on rows: norms, rotation with the K/V write, SwiGLU, and sampling over the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.gpu import tuning
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections.base import Cells, attempt
from benchmarks.gpu.sections.elementwise import CALLS, operations
from benchmarks.gpu.trial import Run, measure, tensors
from kernels.backend import REFERENCE, Kernels
from kernels.launch import LOGITS, RMS_NORM, ROPE_KV_WRITE, SWIGLU
from kernels.process_logits.metadata import Needs, RowSampling

ROWS, LOGIT_ROWS = (72, 1, 256, 1024), (72, 1, 256)
OPERATIONS = {"rms_norm": "rms_norm", "add_rms_norm": "rms_norm", "swiglu": "swiglu", "rope_kv_write": "rope_kv_write"}
"""Operations, and the kernel whose settings they run with."""

SETTINGS: dict[str, tuple[Any, Sequence[Any]]] = {
    "rms_norm": (RMS_NORM, tuning.NORM_SETTINGS),
    "rope_kv_write": (ROPE_KV_WRITE, tuning.ROPE_SETTINGS),
    "swiglu": (SWIGLU, tuning.SWIGLU_SETTINGS),
    "logits": (LOGITS, tuning.LOGITS_SETTINGS),
}
"""By kernel: the present settings, and all that are worth timing."""

NEEDS = {"greedy": Needs(), "noise": Needs(noise=True), "truncated": Needs(noise=True, top_k=True, top_p=True, min_p=True)}


def compare_row_kernels(bench: Bench, model: str) -> Cells:
    """Every kernel at every number of rows, inputs in the L2 cache as they are in a step."""
    config = bench.config(model)
    for rows in bench.pick(ROWS, (3,)):
        for name, kernel in OPERATIONS.items():

            def make(kernels: Kernels, name: str = name, rows: int = rows) -> Callable[[int], Any]:
                torch.manual_seed(rows)  # an operation may write over its inputs: every run has new ones, all alike
                return operations(bench, config, rows)[name].run(kernels)

            yield from _compare(bench, kernel, f"{name}, {rows} rows", make)
    for rows in bench.pick(LOGIT_ROWS, (3,)):
        logits = 3 * torch.randn(rows, config.vocab_size, dtype=bench.dtype, device=bench.device)
        for name, needs in NEEDS.items():
            sampling, position = _sampling(bench, rows, needs), torch.arange(rows, device=bench.device)

            def sample(kernels: Kernels, s: RowSampling = sampling, p: Any = position, x: Any = logits) -> Callable[[int], Any]:
                return lambda i: kernels.sample_drafts(x, None, s, p, 0, None)

            yield from _compare(bench, "logits", f"{name}, {rows} rows", sample)
        bench.release()


def _compare(bench: Bench, kernel: str, size: str, make: Callable[[Kernels], Callable[[int], Any]]) -> Cells:
    now, candidates = SETTINGS[kernel]
    choices = [now, *(settings for settings in candidates if settings != now)]
    choices = list(bench.pick(choices, choices[:2]))
    expected, calls = tensors(make(REFERENCE)(0)), bench.size(CALLS, 2)
    for settings in choices:
        text = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
        about = {"kernel": kernel, "size": size, "settings": asdict(settings), "text": text, "is_now": settings == now}
        kernels = REFERENCE if bench.is_dry else _with_settings(kernel, settings)
        yield attempt(
            about | {"of": len(choices)},
            lambda kernels=kernels: measure(bench, Run(make(kernels), calls), expected),
        )


def _with_settings(kernel: str, settings: Any) -> Kernels:
    """The references, but for a Triton kernel with these settings."""
    from kernels.rms_norm import triton as rms_norm
    from kernels.rope_kv_write import triton as rope_kv_write
    from kernels.sampling import triton as sampling
    from kernels.swiglu import triton as swiglu

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, settings=settings)

    if kernel == "rms_norm":
        return replace(REFERENCE, rms_norm=bind(rms_norm.rms_norm), add_rms_norm=bind(rms_norm.add_rms_norm))
    if kernel == "rope_kv_write":
        rope = bind(rope_kv_write.rope_kv_write)
        return replace(REFERENCE, prepare_rope=rope_kv_write.prepare, rope_kv_write=rope)
    if kernel == "swiglu":
        return replace(REFERENCE, swiglu=bind(swiglu.swiglu))
    return replace(REFERENCE, sample_tokens=bind(sampling.sample_tokens), sample_drafts=bind(sampling.sample_drafts))


def _sampling(bench: Bench, rows: int, needs: Needs) -> RowSampling:
    """Parameters as chats have them; a greedy batch has none."""
    count, options = rows if needs.noise else 0, {"dtype": torch.float64, "device": bench.device}
    whole = {"dtype": torch.long, "device": bench.device}
    return RowSampling(
        needs,
        seed=torch.arange(count, **whole),
        temperature=torch.full((count,), 0.8, **options),
        top_k=torch.full((count,), 50, **whole),
        top_p=torch.full((count,), 0.95, **options),
        min_p=torch.full((count,), 0.01, **options),
    )
