"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), with the residual addition in front of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, reduced in at least float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)``: the sum is the next residual.

    A faster implementation may write the sum over ``residual``, so the caller goes on with the returned one.
    """
    residual = torch.add(x, residual)
    return rms_norm(residual, weight, eps), residual
