"""What rotation and K/V write need to know of a step's rows, built once and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeMetadata:
    """Tables by position, and the rows that are read against them.

    ``cos``, ``sin`` [P, D]: for the half-split layout. Both halves of a row of ``cos`` are equal; those of ``sin`` are ``-s``
    and ``s``. ``query_scale`` [P]: the factor of rotated queries by position, None where all of them are 1.
    ``positions`` [R]: of the rows. ``slots`` [R]: where their K/V is kept, ``page * page_size + offset``. Rows that must leave
    no trace (masks and padding) carry a slot of the null page 0. Without a cache ``slots`` is None and ``page_size`` 0.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None
    positions: Tensor
    slots: Tensor | None
    page_size: int
