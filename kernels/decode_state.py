"""The device state of running requests that decode steps read and write, shared by the operations around the model.

Shape suffixes: S slots, P pages of the longest request, K drafts a request may hold.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DecodeState(NamedTuple):
    """One row per slot; ``kernels.step_rows`` reads it, ``kernels.verify`` writes the progress of a step into it.

    ``block_table_SP``: page of every ``page_size`` positions. ``num_computed_S``: tokens whose K/V is in the cache.
    ``num_held_S``, ``drafts_SK``, ``draft_probs_SK``: drafts at hand; number 0 is certain. ``wanted_S``: tokens that may still
    be emitted. ``seed_S``: of the noise. ``is_diffusion_S``, ``is_decided_SK``, ``block_SK``: of the diffusion family, and the
    block that it is deciding.
    ``tried``, ``accepted`` [2, bins]: the outcomes of drafts in all slots, see ``kernels.survival``.
    """

    block_table_SP: Tensor
    num_computed_S: Tensor
    num_held_S: Tensor
    wanted_S: Tensor
    drafts_SK: Tensor
    draft_probs_SK: Tensor
    is_diffusion_S: Tensor
    is_decided_SK: Tensor
    block_SK: Tensor
    seed_S: Tensor
    tried: Tensor
    accepted: Tensor
