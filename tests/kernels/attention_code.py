"""What the compiler makes of the attention tiles that ``benchmarks.gpu`` times: ``python -m`` this module, without a GPU.

Qwen3-8B's heads on compute capability 9.0. A line a tile: registers a thread, bytes of stack and of shared memory, and the
instructions of the loop over the prefix for one block of keys. How many of these are barriers, how many move spilled registers.
"""

from __future__ import annotations

import contextlib
import io

from benchmarks.gpu.tuning import attention_tiles
from kernels.paged_attention.settings import ATTENTION, INVARIANT, TileSettings
from tests.kernels.compile_for_gpu import ATTENTION_SHAPES, compile_tile
from tests.kernels.machine_code import disassembled, loops_with_products, resources

FEW, MANY = 4, 288
"""Query vectors of a request with one row, and with 72."""


def describe(tile: TileSettings, split_size: int = 0) -> str:
    """The line of a tile."""
    with contextlib.redirect_stdout(io.StringIO()):
        compiled = compile_tile(tile, ATTENTION_SHAPES[0], split_size)
    registers, stack = resources(compiled.asm["cubin"])
    loop = loops_with_products(disassembled(compiled.asm["cubin"]))[0]
    memory = f"{registers:4} registers {stack:4} stack {compiled.metadata.shared:7} shared"
    return f"{tile!s:42} {memory} {loop.total():5} instructions {loop['BAR']:2} barriers {loop['LDL'] + loop['STL']:3} spills"


if __name__ == "__main__":
    for name, tiles, split_size in (
        ("as launched", ATTENTION.tiles, 0),
        ("batch-invariant", INVARIANT.tiles, INVARIANT.split_size),
        ("candidates", tuple(dict.fromkeys((*attention_tiles(FEW, 128), *attention_tiles(MANY, 128)))), 0),
    ):
        print(name)
        for tile in tiles:
            print(f"  {describe(tile, split_size)}", flush=True)
