"""Picks the implementation of every operation, once per device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.decode_state import DecodeState
from kernels.gather import reference as gather_reference
from kernels.linear import packed as packed_linear
from kernels.linear import reference as linear_reference
from kernels.linear.choice import ChoiceTable, Keep
from kernels.linear.invariant import InvariantLinear
from kernels.linear.weight import Weight
from kernels.paged_attention import invariant as invariant_attention
from kernels.paged_attention import reference as paged_attention_reference
from kernels.paged_attention.metadata import AttentionMetadata
from kernels.process_logits.metadata import RowSampling
from kernels.rms_norm import reference as rms_norm_reference
from kernels.rope_kv_write import reference as rope_reference
from kernels.rope_kv_write.metadata import RopeMetadata
from kernels.sampling import reference as sampling_reference
from kernels.step_rows import reference as step_rows_reference
from kernels.step_rows.metadata import StepLayout, StepRows
from kernels.swiglu import invariant as invariant_swiglu
from kernels.swiglu import reference as swiglu_reference
from kernels.verify import reference as verify_reference
from kernels.verify.metadata import StepRequests, Verified

PrepareLinear = Callable[[Sequence[Weight], torch.dtype, int, Callable[[str], None], Keep], ChoiceTable | None]
"""Chooses implementations for the model's weights, the type of its rows and the most rows of a step, or checks the one that
there is; reports progress, and may be given what an earlier start has measured. Raises ValueError when they do not keep their
promise on this machine."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a step. Every field has the signature of its reference; ``name`` is for the start-up report.

    What ``prepare_attention`` and ``prepare_rope`` return is opaque: it is made once a step, and every layer hands it to
    ``paged_attention`` or ``rope_kv_write``.
    ``prepare_linear`` is called once, before the first step; what ``linear`` does is fixed from then on.
    ``attends_by_length``: the work of attention follows the prefix lengths on the device, not the host's bounds of them, so
    that a captured step, whose bounds are the longest context, costs what its requests' contexts cost.
    """

    name: str
    linear: Callable[[Tensor, Weight, Tensor | None], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    prepare_rope: Callable[[RopeMetadata, int, int, torch.dtype], Any]
    rope_kv_write: Callable[[Tensor, Tensor | None, float, Any, tuple[Tensor, Tensor] | None], tuple[Tensor, Tensor, Tensor]]
    prepare_attention: Callable[[AttentionMetadata, int, int, torch.dtype], Any]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Any, float], Tensor]
    sample_tokens: Callable[[Tensor, Tensor | None, RowSampling, Tensor, int | None], Tensor]
    sample_drafts: Callable[[Tensor, Tensor | None, RowSampling, Tensor, int | None, float | None], tuple[Tensor, Tensor]]
    lay_out: Callable[[DecodeState, StepLayout, Tensor, Tensor, int, int], StepRows]
    gather: Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]
    verify: Callable[[DecodeState, StepLayout, StepRequests, Tensor, float | None, bool], Verified]
    prepare_linear: PrepareLinear
    attends_by_length: bool = False


def nothing_to_prepare(
    weights: Sequence[Weight], dtype: torch.dtype, max_rows: int, progress: Callable[[str], None], keep: Keep
) -> ChoiceTable | None:
    """Of linear layers that have one implementation for all shapes."""
    return None


REFERENCE = Kernels(
    name="reference",
    linear=linear_reference.linear,
    rms_norm=rms_norm_reference.rms_norm,
    add_rms_norm=rms_norm_reference.add_rms_norm,
    swiglu=swiglu_reference.swiglu,
    prepare_rope=rope_reference.prepare,
    rope_kv_write=rope_reference.rope_kv_write,
    prepare_attention=paged_attention_reference.prepare,
    paged_attention=paged_attention_reference.paged_attention,
    sample_tokens=sampling_reference.sample_tokens,
    sample_drafts=sampling_reference.sample_drafts,
    lay_out=step_rows_reference.lay_out,
    gather=gather_reference.gather,
    verify=verify_reference.verify,
    prepare_linear=nothing_to_prepare,
)
"""Plain torch on any device, with gradients: training uses it, too."""


def select_kernels(
    choice: str, device: torch.device, dtype: torch.dtype, num_kv_heads: int, batch_invariant: bool = False
) -> Kernels:
    """The implementations for a device. ``choice`` is ``auto``, ``reference`` or ``triton``.

    ``auto`` is the reference, with packed linear layers on a CPU; on a GPU the engine asks for ``triton`` where it has passed a
    check (``engine/self_check.py``). ``batch_invariant``: those whose bits for a row depend on that row and its request alone;
    on a GPU they are Triton's. Raises ValueError with what to do when the device or dtype cannot be served.
    """
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown kernels {choice!r}: use auto, reference or triton")
    if choice == "triton" or (batch_invariant and device.type != "cpu"):
        if choice == "reference":
            raise ValueError("batch invariance on a GPU needs the Triton kernels: use --kernels triton, or the CPU")
        return _triton_kernels_for(device, dtype, num_kv_heads, batch_invariant)
    if batch_invariant:
        return invariant_kernels()
    if choice == "auto" and device.type == "cpu" and dtype == torch.float32 and packed_linear.is_available():
        return replace(REFERENCE, name="reference, packed linear layers", linear=packed_linear.PackedLinear())
    return REFERENCE


def invariant_kernels() -> Kernels:
    """The batch-invariant operations on a CPU: the references where they are so already (``docs/decisions/0014``)."""
    linear = InvariantLinear()
    return replace(
        REFERENCE,
        name="batch-invariant",
        linear=linear,
        prepare_linear=linear.check,
        swiglu=invariant_swiglu.swiglu,
        prepare_attention=invariant_attention.prepare,
        paged_attention=invariant_attention.paged_attention,
    )


def _triton_kernels_for(device: torch.device, dtype: torch.dtype, num_kv_heads: int, batch_invariant: bool) -> Kernels:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("the Triton kernels need a CUDA GPU of compute capability 8.0 or above: use --kernels reference")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton kernels compute in float16 or bfloat16, not {dtype}: use --kernels reference")
    try:
        return triton_kernels(num_kv_heads, batch_invariant)
    except ImportError as error:
        raise ValueError("Triton is not installed: install it or use --kernels reference") from error


def triton_kernels(num_kv_heads: int, batch_invariant: bool = False) -> Kernels:
    """Every operation that has a Triton kernel, the references for the rest. Raises ImportError without Triton."""
    from kernels.gather import triton as gather
    from kernels.linear import triton as linear
    from kernels.linear.tuned import TunedLinear
    from kernels.paged_attention import triton as paged_attention
    from kernels.rms_norm import triton as rms_norm
    from kernels.rope_kv_write import triton as rope_kv_write
    from kernels.sampling import triton as sampling
    from kernels.step_rows import triton as step_rows
    from kernels.swiglu import triton as swiglu
    from kernels.verify import triton as verify

    tuned = TunedLinear()
    return replace(
        REFERENCE,
        attends_by_length=True,
        name="batch-invariant triton" if batch_invariant else "triton, linear layers by measurement",
        linear=linear.invariant_linear if batch_invariant else tuned,
        prepare_linear=linear.check_invariant if batch_invariant else tuned.tune,
        rms_norm=rms_norm.rms_norm,
        add_rms_norm=rms_norm.add_rms_norm,
        swiglu=swiglu.swiglu,
        prepare_rope=rope_kv_write.prepare,
        rope_kv_write=rope_kv_write.rope_kv_write,
        prepare_attention=functools.partial(
            paged_attention.prepare, num_kv_heads=num_kv_heads, batch_invariant=batch_invariant
        ),
        paged_attention=paged_attention.paged_attention,
        sample_tokens=sampling.sample_tokens,
        sample_drafts=sampling.sample_drafts,
        lay_out=step_rows.lay_out,
        gather=gather.gather,
        verify=verify.verify,
    )
