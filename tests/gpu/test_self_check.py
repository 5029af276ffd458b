"""The check that decides at every start whether Triton's kernels serve, at the sizes of real checkpoints."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.shapes import QWEN3_8B, QWEN25_15B
from engine.self_check import disagreement
from kernels.backend import triton_kernels


@pytest.mark.smoke_where(batch_invariant=False, dtype=torch.bfloat16)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [QWEN3_8B, QWEN25_15B], ids=["8B", "1.5B"])
def test_triton_passes_the_check(config, dtype, batch_invariant, device):
    assert disagreement(triton_kernels(config.num_kv_heads, batch_invariant), config, dtype, device, 64) is None
