"""The mask of a draft-and-verify step as compact data: two small integers a row.

Rows of one sequence are numbered from 0, *clean* rows (prompt and draft tokens) first, mask rows after them. A row has

* ``limit``: it sees the clean rows whose index is below its limit, and
* ``branch``: it sees the mask rows of the same branch; clean rows have none (``CLEAN``), so they never see a mask row.

Causal attention among clean rows is ``limit = index + 1``. A mask row of a branch that bets on drafts ``0..i`` has
``limit = i + 1``. A training sequence is the same thing: a mask block that starts at position ``s`` has ``limit = s``.
The prefix that lies in the KV cache is seen by every row and needs no data here. This representation is shared by the
reference attention, the Triton kernel and training (arXiv 2511.08923, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

CLEAN = -1
"""``branch`` of a clean row."""


def visible(limit: Tensor, branch: Tensor, index: Tensor | None = None) -> Tensor:
    """Expand the compact mask to booleans.

    ``limit`` and ``branch`` are [..., R]; ``index`` (row numbers within the sequence, [..., R]) defaults to ``0..R-1``.
    Returns [..., R, R], True where the row (second to last dimension) sees the key (last dimension).
    """
    if index is None:
        index = torch.arange(limit.shape[-1], device=limit.device)
    key_clean = (branch == CLEAN).unsqueeze(-2)
    sees_clean = key_clean & (index.unsqueeze(-2) < limit.unsqueeze(-1))
    same_branch = branch.unsqueeze(-1) == branch.unsqueeze(-2)
    return sees_clean | (same_branch & ~key_clean)
