"""Compiles the Triton kernels to machine code for compute capability 9.0, without a GPU: ``python -m`` this module.

Needs a process in which Triton is not interpreting. Prints registers a thread, bytes of stack (what did not fit them) and
shared memory of each variant, and of the attention the instructions of its loop over the prefix. With ``--few``, it is compiled
in a few of its shapes, and the tiles of the linear layers are either split or whole.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.linear import triton as linear
from kernels.linear.choice import LayerShape, candidates
from kernels.paged_attention import triton as paged_attention
from kernels.paged_attention import triton_kernels as attention_kernels
from kernels.paged_attention import triton_work as attention_work
from kernels.paged_attention.settings import ATTENTION, INVARIANT, PROCESSOR_REGISTERS, TileSettings
from kernels.rms_norm import triton as rms_norm
from kernels.rope_kv_write import triton as rope_kv_write
from kernels.swiglu import triton as swiglu
from tests.kernels.machine_code import disassembled, loops_with_products, resources

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY, PROCESSOR_SHARED_MEMORY = 227 * 1024, 228 * 1024
"""Bytes that one program can use, and that a processor has."""

ATTENTION_SHAPES = (
    {"HEAD_DIM": 128, "BLOCK_D": 128, "GROUP": 4, "KV_HEADS": 8, "PAGE": 64},
    {"HEAD_DIM": 128, "BLOCK_D": 128, "GROUP": 6, "KV_HEADS": 2, "PAGE": 64},
    {"HEAD_DIM": 96, "BLOCK_D": 128, "GROUP": 1, "KV_HEADS": 8, "PAGE": 64},
    {"HEAD_DIM": 80, "BLOCK_D": 128, "GROUP": 5, "KV_HEADS": 4, "PAGE": 16},
    {"HEAD_DIM": 64, "BLOCK_D": 64, "GROUP": 8, "KV_HEADS": 4, "PAGE": 64},
)
ATTENTION_SETTINGS = (
    *((tile, 0) for tile in ATTENTION.tiles),
    *((tile, INVARIANT.split_size) for tile in INVARIANT.tiles),
    (TileSettings(128, block_n=128, num_warps=8, num_stages=2), 0),
)
"""Tiles with the split size of the batch-invariant setting or 0: what is launched, and blocks of two pages."""

# Qwen3-8B with everything on, the bundled model, and a head size and group that have to be padded, without a cache.
ROPE_SIZES = ("HEADS", "KV_HEADS", "HEAD_DIM", "PAGE", "TILE", "HALF", "NORM", "SCALE", "WRITE")
ROPE = (
    (32, 8, 128, 64, 8, 64, True, True, True),
    (4, 2, 64, 64, 4, 32, True, False, True),
    (15, 5, 80, 0, 8, 64, False, False, False),
)

POINTERS = {
    "*bf16": "out q k v k_cache v_cache x residual weight qkv qk_norm gate_up",
    "*fp32": "partial partial_acc partial_peak partial_total cos sin query_scale",
    "*i64": "row_starts prefix_lengths block_table limit branch positions slots",
    "*i32": "items merges records counts",
}
"""Arguments by type; all others are numbers."""


def pointer(name: str) -> str | None:
    """The type of a pointer argument, None for a number."""
    return next((kind for kind, names in POINTERS.items() if name in names.split()), None)


def compile_kernel(
    function: Any,
    constants: dict[str, Any],
    warps: int,
    stages: int = 3,
    pointers: dict[str, str] | None = None,
    **options: Any,
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
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps, "num_stages": stages, **options})
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    print(f"{function.__name__} {constants}: {registers} registers, {stack} bytes of stack, {shared} bytes of shared memory")
    assert shared <= SHARED_MEMORY
    return compiled


def compile_tile(tile: TileSettings, shape: dict[str, int], split_size: int = 0) -> Any:
    """Compile the attention as it is launched with a tile."""
    return compile_kernel(
        attention_kernels.attention_kernel,
        shape | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPLIT_SIZE": split_size},
        tile.num_warps,
        tile.num_stages,
        maxnreg=tile.max_registers,
        enable_fp_fusion=not split_size,
    )


def compile_attention(few: bool) -> None:
    """As many programs must fit a processor as the launch counts on. ``few``: every setting in one shape only."""
    for number, (tile, split_size) in enumerate(ATTENTION_SETTINGS):
        block_m, options = tile.block_m, {"warps": tile.num_warps, "enable_fp_fusion": not split_size}
        for shape in ATTENTION_SHAPES[number : number + 1] if few else ATTENTION_SHAPES:
            compiled = compile_tile(tile, shape, split_size)
            registers, threads = resources(compiled.asm["cubin"])[0], 32 * tile.num_warps
            shared = compiled.metadata.shared + 1024
            fit = min(PROCESSOR_REGISTERS // (registers * threads), PROCESSOR_SHARED_MEMORY // shared)
            assert fit >= tile.programs_per_processor
            assert "cp.async" in compiled.asm["ptx"], "loads run ahead of the products"
            assert ("wgmma.mma_async" in compiled.asm["ptx"]) == (block_m >= 64)
            main_loop = loops_with_products(disassembled(compiled.asm["cubin"]))[0]
            print(f"    {main_loop.total()} instructions for {tile.block_n} keys")
            is_gathered = shape["PAGE"] < 64  # such keys have an address each, and one register too few
            assert is_gathered or not main_loop["LDL"] + main_loop["STL"], "the loop over the prefix spills nothing"
            rows = block_m // paged_attention._MERGE_PROGRAMS
            pieces = 1 if split_size else paged_attention._MERGED // rows
            constants = {name: value for name, value in shape.items() if name != "PAGE"}
            constants |= {"BLOCK_M": block_m, "ROWS": rows, "PIECES": pieces}
            merge = compile_kernel(attention_kernels.merge_kernel, constants, **options)
            for kernel in (compiled, merge) if split_size else ():
                machine_code = disassembled(kernel.asm["cubin"])
                assert "FMUL" in machine_code
                assert "FFMA" not in machine_code, "batch invariance rests on multiplications that stay multiplications"
    for split_size in (0, 1024):
        constants = {"GROUP": 4, "BLOCK_M": 64, "REQUESTS": attention_work._REQUESTS}
        compile_kernel(attention_work.plan_kernel, constants | {"BLOCK_N": 64, "SPLIT_SIZE": split_size}, 4)
    compile_kernel(attention_work.fill_kernel, constants | {"SCAN": attention_work._SCAN}, 4)


def compile_linear(few: bool) -> None:
    """Every tile that a step of Qwen3-8B may choose from, with 16-bit and with eight-bit weights.

    ``few``: split with one kind of weights and whole with the other, by turns: all that is asserted is about the loop.
    """
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
                if few and is_split == (tile.block_n // 64 + tile.block_k // 64 + element_size) % 2:
                    continue
                out = {"out": "*fp32" if is_split else "*bf16"}
                constants = {**sizes, "SPLIT": is_split, "EVEN_K": True, **absent}
                compiled = compile_kernel(
                    linear._linear_kernel, constants, tile.num_warps, tile.num_stages, {**pointers, **out}
                )
                assert "wgmma.mma_async" in compiled.asm["ptx"], "the tensor cores of this generation are used"
                assert "cp.async" in compiled.asm["ptx"], "loads run ahead of the products"
        compile_kernel(linear._merge_kernel, {"SPLIT_K": 4, "BLOCK": 512, **absent}, 4, pointers=pointers)


def main(few: bool) -> None:
    """Compile every kernel, in the variants above or in the sizes of Qwen3-8B."""
    compile_attention(few)
    for variant in ROPE:
        compile_kernel(rope_kv_write._rope_kv_write_kernel, dict(zip(ROPE_SIZES, variant, strict=True)), 2)
    for add in (False, True):
        compile_kernel(rms_norm._rms_norm_kernel, {"WIDTH": 4096, "BLOCK": 4096, "ADD": add}, 16)
    compile_kernel(rms_norm._rms_norm_kernel, {"WIDTH": 1536, "BLOCK": 2048, "ADD": True}, 8)
    compile_kernel(swiglu._swiglu_kernel, {"WIDTH": 12288, "BLOCK": 1024}, 4)
    compile_linear(few)


if __name__ == "__main__":
    main("--few" in sys.argv[1:])
