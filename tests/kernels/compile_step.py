"""Compiles the kernels around the model for compute capability 9.0 as they are launched, and counts what a server compiles.

``python -m`` this module, without a GPU and in a process in which Triton is not interpreting. Asserts that the kernels need no
stack, and that steps with other numbers of requests, rows and branches ask for no other variant of any kernel of a step: a
running server never waits for the compiler because of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from triton.runtime import JITFunction
from triton.runtime.driver import driver
from triton.runtime.jit import compute_cache_key

from kernels.backend import triton_kernels
from kernels.gather import triton as gather
from kernels.linear.triton import invariant_linear
from kernels.paged_attention.metadata import AttentionMetadata
from kernels.rope_kv_write.metadata import RopeMetadata
from kernels.step_rows import triton as step_rows
from kernels.step_rows.metadata import StepLayout, StepRows
from kernels.verify import triton as verify
from tests.kernels.compile_sampling import compile_launches
from tests.kernels.machine_code import resources
from tests.kernels.sampling_cases import Row, sampling_of
from tests.kernels.step_cases import MASK, PAGE_SIZE, StepCase, random_step

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
VOCAB_SIZE, HEADS, KV_HEADS, HEAD_DIM = 20_000, 8, 2, 64
SAMPLING = (Row(temperature=0.0), Row(temperature=1.25), Row(temperature=1.25, top_k=8, top_p=0.9, min_p=0.01))
KERNELS = triton_kernels(KV_HEADS)


def launch_step(case: StepCase) -> None:
    """All kernels of a decode step of Qwen3, in small."""
    step = random_step(case, CPU)
    layout, state = step.layout, step.state
    rows = KERNELS.lay_out(state, layout, step.bounds_3N, step.prefill, PAGE_SIZE, MASK)
    launch_layers(layout, rows)
    verifying, num_guesses = len(rows.verify_slot_D), len(layout.guess_Q)
    logits = torch.empty((max(layout.num_rows, num_guesses), VOCAB_SIZE), dtype=DTYPE)
    for chance in (None, 0.9):
        verified = KERNELS.verify(state, layout, step.requests(rows), torch.zeros_like(rows.verify_slot_D), chance, True)
    for row in SAMPLING:
        KERNELS.sample_tokens(logits[:verifying], None, sampling_of((row,) * verifying, CPU), rows.verify_position_D, MASK)
        if num_guesses:
            sampling = sampling_of((row,) * num_guesses, CPU)
            KERNELS.sample_drafts(logits, verified.place_Q, sampling, verified.position_Q, MASK, None)
    KERNELS.gather((state.num_computed_S,) * 5, rows.verify_slot_D)


def launch_layers(layout: StepLayout, rows: StepRows) -> None:
    """One layer, over the cache."""
    num_rows, starts = layout.num_rows, (layout.row_starts, layout.device_row_starts)
    lengths = (rows.prefix_lengths_N, (100,) * len(rows.prefix_lengths_N))
    metadata = AttentionMetadata(*starts, *lengths, rows.block_table_NP, rows.limit_R, rows.branch_R)
    prepared = KERNELS.prepare_attention(metadata, 64, HEADS // KV_HEADS, DTYPE)
    qkv = torch.empty((num_rows, HEADS + 2 * KV_HEADS, HEAD_DIM), dtype=DTYPE)
    caches = tuple(torch.empty((4, KV_HEADS, 64, HEAD_DIM), dtype=DTYPE) for _ in range(2))
    tables, norm = torch.empty((2, 4096, HEAD_DIM)), torch.empty((2, HEAD_DIM), dtype=DTYPE)
    rope = RopeMetadata(tables[0], tables[1], None, rows.positions_R, rows.slot_mapping_R, 64)
    q, k, v = KERNELS.rope_kv_write(qkv, norm, 1e-5, KERNELS.prepare_rope(rope, HEADS, KV_HEADS, DTYPE), caches)
    KERNELS.paged_attention(q, k, v, *caches, prepared, 0.1)
    x, weight = torch.empty((num_rows, 512), dtype=DTYPE), torch.empty(512, dtype=DTYPE)
    KERNELS.rms_norm(x, weight, 1e-5)
    KERNELS.add_rms_norm(x, x.clone(), weight, 1e-5)
    KERNELS.swiglu(x)
    invariant_linear(x, torch.empty((384, 512), dtype=DTYPE))


def steps(counts: Iterable[int]) -> Iterable[StepCase]:
    """Steps of so many requests in all modes."""
    return (StepCase(num_requests=n, seed=n, **mode) for n in counts for mode in StepCase.MODES)


def check_stack() -> None:
    """Compile the kernels around the model for engines of several block lengths."""
    for max_drafts in (1, 6, 16, 32):
        step = random_step(StepCase(max_drafts=max_drafts), CPU)
        rows = step_rows.lay_out(step.state, step.layout, step.bounds_3N, step.prefill, PAGE_SIZE, MASK)
        for chance in (None, 0.9):
            verify.verify(step.state, step.layout, step.requests(rows), rows.verify_slot_D, chance, True)
        gather.gather((step.state.num_computed_S, step.state.draft_probs_SK[:, 0].contiguous()), rows.verify_slot_D)
    for module in (step_rows, verify, gather):
        for kernel in (f for f in vars(module).values() if isinstance(f, JITFunction) and f.device_caches):
            for variant in kernel.device_caches[0][0].values():
                registers, stack = resources(variant.asm["cubin"])
                print(f"{kernel.__name__}: {registers} registers, {stack} bytes of stack")
                assert stack == 0


def check_variants() -> None:
    """Only the keys of variants are made from here on."""
    keys: defaultdict[str, set[str]] = defaultdict(set)

    def find_key(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        *_, binder = self.device_caches[driver.active.get_current_device()]
        _, specialization, bound = binder(*args, **options)
        keys[f"{self.__module__}.{self.__name__}"].add(compute_cache_key({}, specialization, bound))

    JITFunction.run = find_key
    for case in steps((1, 5, 16)):
        launch_step(case)
    known = Counter({name: len(variants) for name, variants in keys.items()})
    for case in steps((2, 3, 4, 7, 8, 15, 17, 33, 64, 150, 255)):
        launch_step(case)
    for name, variants in keys.items():
        print(f"{name}: {len(variants)} variants")
        assert len(variants) == known[name], "\n".join((f"{name} was compiled anew:", *sorted(variants)))


if __name__ == "__main__":
    compile_launches()
    check_stack()
    check_variants()
