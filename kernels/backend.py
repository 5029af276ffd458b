"""Picks the implementation of every operation, once per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.kv_write import reference as kv_write_reference
from kernels.paged_attention import reference as paged_attention_reference
from kernels.paged_attention.metadata import AttentionMetadata
from kernels.rms_norm import reference as rms_norm_reference
from kernels.rope import reference as rope_reference
from kernels.swiglu import reference as swiglu_reference


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a step. Every field has the signature of its reference; ``name`` is for the start-up report.

    What ``prepare_attention`` returns is opaque: it is made once a step and handed to ``paged_attention`` by every layer.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    prepare_attention: Callable[[AttentionMetadata, int, int, torch.dtype], Any]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Any, float], Tensor]


REFERENCE = Kernels(
    name="reference",
    rms_norm=rms_norm_reference.rms_norm,
    add_rms_norm=rms_norm_reference.add_rms_norm,
    rope=rope_reference.rope,
    swiglu=swiglu_reference.swiglu,
    kv_write=kv_write_reference.kv_write,
    prepare_attention=paged_attention_reference.prepare,
    paged_attention=paged_attention_reference.paged_attention,
)
"""Plain torch on any device; the CPU path."""


def select_kernels(device: torch.device) -> Kernels:
    """The implementations for a device: the references everywhere, until a kernel is proven on the GPU in question."""
    return REFERENCE
