"""Entries of several columns, by number."""

from __future__ import annotations

from torch import Tensor


def gather(columns: tuple[Tensor, ...], number_Q: Tensor) -> tuple[Tensor, ...]:
    """The entries ``number`` [Q] of every column [S]."""
    return tuple(column[number_Q] for column in columns)
