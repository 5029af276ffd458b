"""Compiles the attention kernels to machine code for compute capability 9.0, without a GPU: ``python -m`` this module.

Needs a process in which Triton is not interpreting. Prints the shared memory of each variant.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.paged_attention import triton as kernels

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
"""Bytes that one program can use."""

VARIANTS = (
    {"HEAD_DIM": 128, "BLOCK_D": 128, "GROUP": 4, "PAGE": 64, "BLOCK_M": 128, "BLOCK_N": 64, "STEP_N": 64, "SPLIT": False},
    {"HEAD_DIM": 80, "BLOCK_D": 128, "GROUP": 6, "PAGE": 16, "BLOCK_M": 16, "BLOCK_N": 64, "STEP_N": 16, "SPLIT": True},
)


def pointer(name: str) -> str | None:
    """The type of a pointer argument, None for a number."""
    if name in ("out", "q", "k", "v", "k_cache", "v_cache"):
        return "*bf16"
    if name.startswith("partial"):
        return "*fp32"
    if name in ("prefix_lengths", "block_table", "limit", "branch"):
        return "*i64"
    return "*i32" if name == "items" else None


def compile_kernel(function: Any, constants: dict[str, Any], warps: int) -> None:
    """Compile one kernel as a launch would specialise it: pointers and strides are multiples of 16, lengths are not."""
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        number = "fp32" if name == "scale" else "i32"
        signature[name] = "constexpr" if name in constants else pointer(name) or number
        if pointer(name) or (name.endswith("_stride") and name != "table_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=attributes)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": 3})
    assert compiled.asm["cubin"]
    print(function.__name__, constants, "shared memory", compiled.metadata.shared)
    assert compiled.metadata.shared <= SHARED_MEMORY


if __name__ == "__main__":
    for variant in VARIANTS:
        compile_kernel(kernels._attention_kernel, variant, 8 if variant["BLOCK_M"] > 64 else 4)
    merge = {name: VARIANTS[1][name] for name in ("HEAD_DIM", "BLOCK_D", "GROUP", "BLOCK_M")}
    compile_kernel(kernels._merge_kernel, merge, 4)
    compile_kernel(kernels._bound_tiles_kernel, {"GROUP": 4, "BLOCK_M": 128, "STEP_N": 64, "SCAN": 128}, 4)
