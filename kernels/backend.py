"""Picks the implementation of every operation, once per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels.rms_norm import reference as rms_norm_reference
from kernels.rope import reference as rope_reference
from kernels.swiglu import reference as swiglu_reference


@dataclass(frozen=True, slots=True)
class Kernels:
    """The elementwise operations of one transformer layer, chosen for a device."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


REFERENCE = Kernels(
    rms_norm=rms_norm_reference.rms_norm,
    add_rms_norm=rms_norm_reference.add_rms_norm,
    rope=rope_reference.rope,
    swiglu=swiglu_reference.swiglu,
)
