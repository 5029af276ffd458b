"""Compiles the Triton kernels to machine code for compute capability 9.0, without a GPU: ``python -m`` this module.

Needs a process in which Triton is not interpreting. Prints the shared memory of each variant.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.linear import triton as linear
from kernels.linear.choice import LayerShape, candidates
from kernels.paged_attention import triton as paged_attention
from kernels.rms_norm import triton as rms_norm
from kernels.rope_kv_write import triton as rope_kv_write
from kernels.swiglu import triton as swiglu

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
"""Bytes that one program can use."""

ATTENTION = (
    {"HEAD_DIM": 128, "BLOCK_D": 128, "GROUP": 4, "PAGE": 64, "BLOCK_M": 128, "BLOCK_N": 64, "STEP_N": 64, "SPLIT": False},
    {"HEAD_DIM": 80, "BLOCK_D": 128, "GROUP": 6, "PAGE": 16, "BLOCK_M": 16, "BLOCK_N": 64, "STEP_N": 16, "SPLIT": True},
)


# Qwen3-8B with everything on, the bundled model, and a head size and group that have to be padded, without a cache.
ROPE_SIZES = ("HEADS", "KV_HEADS", "HEAD_DIM", "PAGE", "TILE", "HALF", "NORM", "SCALE", "WRITE")
ROPE = (
    (32, 8, 128, 64, 8, 64, True, True, True),
    (4, 2, 64, 64, 4, 32, True, False, True),
    (15, 5, 80, 0, 8, 64, False, False, False),
)

POINTERS = {
    "*bf16": "out q k v k_cache v_cache x residual weight qkv qk_norm gate_up",
    "*fp32": "partial partial_lse cos sin query_scale",
    "*i64": "prefix_lengths block_table limit branch positions slots",
    "*i32": "items",
}
"""Arguments by type; all others are numbers."""


def pointer(name: str) -> str | None:
    """The type of a pointer argument, None for a number."""
    return next((kind for kind, names in POINTERS.items() if name in names.split()), None)


def compile_kernel(
    function: Any, constants: dict[str, Any], warps: int, stages: int = 3, pointers: dict[str, str] | None = None
) -> Any:
    """Compile one kernel as a launch would specialise it: pointers and strides are multiples of 16, lengths are not.

    ``pointers``: types that differ from those of most kernels.
    """
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        number = "fp32" if name in ("scale", "eps") else "i32"
        kind = (pointers or {}).get(name) or pointer(name)
        signature[name] = "constexpr" if name in constants else kind or number
        if kind or name.startswith("width") or (name.endswith("_stride") and name != "table_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=attributes)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages})
    assert compiled.asm["cubin"]
    print(function.__name__, constants, "shared memory", compiled.metadata.shared)
    assert compiled.metadata.shared <= SHARED_MEMORY
    return compiled


def compile_linear() -> None:
    """Every tile that a step of Qwen3-8B may choose from, with 16-bit and with eight-bit weights."""
    for element_size, weight in ((2, "*bf16"), (1, "*fp8e4nv")):
        pointers = {"x": "*bf16", "weight": weight, "bias": "*bf16", "scale": "*fp32"}
        absent = {"bias": None, **({} if element_size == 1 else {"scale": None})}
        done = set()
        for rows in (16, 32, 64, 128):
            for tile in candidates(LayerShape(4096, 4096, element_size), rows, 132):
                is_split = tile.split_k > 1
                sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
                if (variant := (*sizes.values(), is_split)) in done:
                    continue
                done.add(variant)
                out = {"out": "*fp32" if is_split else "*bf16"}
                constants = {**sizes, "SPLIT": is_split, "EVEN_K": True, **absent}
                compiled = compile_kernel(
                    linear._linear_kernel, constants, tile.num_warps, tile.num_stages, {**pointers, **out}
                )
                assert "wgmma.mma_async" in compiled.asm["ptx"], "the tensor cores of this generation are used"
                assert "cp.async" in compiled.asm["ptx"], "loads run ahead of the products"
        compile_kernel(linear._merge_kernel, {"SPLIT_K": 4, "BLOCK": 512, **absent}, 4, pointers=pointers)


def main() -> None:
    """Compile every kernel, in the variants above or in the sizes of Qwen3-8B."""
    for variant in ATTENTION:
        compile_kernel(paged_attention._attention_kernel, variant, 8 if variant["BLOCK_M"] > 64 else 4)
    merge = {name: ATTENTION[1][name] for name in ("HEAD_DIM", "BLOCK_D", "GROUP", "BLOCK_M")}
    compile_kernel(paged_attention._merge_kernel, merge, 4)
    compile_kernel(paged_attention._bound_tiles_kernel, {"GROUP": 4, "BLOCK_M": 128, "STEP_N": 64, "SCAN": 128}, 4)
    for variant in ROPE:
        compile_kernel(rope_kv_write._rope_kv_write_kernel, dict(zip(ROPE_SIZES, variant, strict=True)), 2)
    for add in (False, True):
        compile_kernel(rms_norm._rms_norm_kernel, {"WIDTH": 4096, "BLOCK": 4096, "ADD": add}, 16)
    compile_kernel(rms_norm._rms_norm_kernel, {"WIDTH": 1536, "BLOCK": 2048, "ADD": True}, 8)
    compile_kernel(swiglu._swiglu_kernel, {"WIDTH": 12288, "BLOCK": 1024}, 4)
    compile_linear()


if __name__ == "__main__":
    main()
