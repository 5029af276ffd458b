"""Acceptance of drafts, and what follows from it: small integers, in plain torch.

Shape suffixes as in ``kernels.verify.metadata``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.decode_state import DecodeState
from kernels.philox.reference import philox
from kernels.step_rows.metadata import StepLayout
from kernels.survival.reference import observe
from kernels.verify.metadata import StepRequests, Verified


def verify(
    state: DecodeState, layout: StepLayout, requests: StepRequests, tokens_D: Tensor, chance: float | None, observes: bool
) -> Verified:
    """Accept drafts while they equal what verification takes, pick the branch that was hit, and write the progress.

    ``tokens_D``: the tokens that the verifying rows take. ``chance``: what they are compared with is imposed, see
    ``imposed_drafts``. ``observes``: what became of the drafts is counted. The next drafts are still to be drawn, but for the
    certain one.
    """
    slot_N, prefix_N, num_drafts_N, order_NB = requests
    sampled_ND = tokens_D.new_zeros((len(slot_N), layout.max_drafts))
    sampled_ND[layout.verify_request_D, layout.verify_index_D] = tokens_D
    drafts_ND = state.drafts_SK[slot_N, : layout.max_drafts]
    first_N = prefix_N + layout.num_prefill_N
    if chance is not None:
        accepted_N = num_accepted(sampled_ND, imposed_drafts(sampled_ND, state.seed_S[slot_N], first_N, chance), num_drafts_N)
    else:
        accepted_N = num_accepted(sampled_ND, drafts_ND, num_drafts_N)
    if observes:
        observe(state.draft_probs_SK[slot_N, : layout.max_drafts], num_drafts_N, accepted_N, state.tried, state.accepted)

    is_hit_N, place_NW = _hit_branch(layout, order_NB, accepted_N)
    num_held_N = torch.where(is_hit_N, layout.block_length_N, 1)
    state.num_computed_S[slot_N] = first_N + accepted_N
    state.wanted_S[slot_N] = state.wanted_S[slot_N] - accepted_N
    # A prefill chunk leaves the one draft that its request was admitted with.
    state.num_held_S[slot_N] = num_held_N
    if layout.max_drafts:
        last_N = sampled_ND.gather(1, (accepted_N - 1).clamp(min=0)[:, None]).squeeze(1)
        state.drafts_SK[slot_N, 0] = torch.where(num_drafts_N > 0, last_N, drafts_ND[:, 0])

    counts_N4 = torch.stack((accepted_N, num_drafts_N, num_held_N, accepted_N), dim=1)
    # Mask j stands at the position of the token that it drafts.
    number_W = torch.arange(1, layout.num_guesses + 1, device=slot_N.device)
    return Verified(
        torch.cat((counts_N4, sampled_ND), dim=1),
        place_NW.flatten(),
        slot_N.repeat_interleave(layout.num_guesses),
        (first_N[:, None] + accepted_N[:, None] + number_W).flatten(),
    )


def num_accepted(sampled_ND: Tensor, drafts_ND: Tensor, num_drafts_N: Tensor) -> Tensor:
    """How many drafts each request commits, [N], at least 1 where there is a draft at all.

    Draft 0 is certain; draft ``i`` is accepted while it equals ``sampled[i - 1]`` and all before it were accepted.
    """
    first = num_drafts_N.clamp(max=1)
    if sampled_ND.shape[1] < 2:
        return first
    index = torch.arange(1, sampled_ND.shape[1], device=sampled_ND.device)
    matches = (sampled_ND[:, :-1] == drafts_ND[:, 1:]) & (index < num_drafts_N[:, None])
    return first + matches.cumprod(dim=1).sum(dim=1)


def imposed_drafts(sampled_ND: Tensor, seed_N: Tensor, position_N: Tensor, chance: float) -> Tensor:
    """Drafts [N, D] that are accepted by a coin, independently with ``chance`` each, whatever was guessed: for benchmarks.

    The coin is a function of the request's seed and the position (Philox), the first verifying row's being ``position_N``.
    Requests with different seeds accept independently, as real ones do: in step, they would average nothing out.
    """
    seed_N1, zero = seed_N[:, None], torch.zeros_like(position_N)[:, None]
    positions_ND = position_N[:, None] + torch.arange(sampled_ND.shape[1], device=sampled_ND.device)
    words_ND = philox((seed_N1 & 0xFFFFFFFF, (seed_N1 >> 32) & 0xFFFFFFFF), (positions_ND, zero, zero, zero))[0]
    right_ND = torch.cat((sampled_ND[:, :1], sampled_ND[:, :-1]), dim=1)
    return torch.where(words_ND < words_below(chance), right_ND, -1)


def words_below(chance: float) -> int:
    """How many of the 2^32 words are heads of a coin with this chance."""
    return round(chance * 2**32)


def _hit_branch(layout: StepLayout, order_NB: Tensor, accepted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Which requests ran the branch that bet on what was accepted, [N], and where the logits of its guesses stand, [N, W]."""
    num_requests, width = len(accepted_N), layout.num_guesses
    if width == 0:
        return torch.zeros_like(accepted_N, dtype=torch.bool), accepted_N.new_zeros((num_requests, 0))
    is_hit_NB = (order_NB == (accepted_N - 1)[:, None]) & (accepted_N > 0)[:, None]
    is_hit_N, rank_N = is_hit_NB.max(dim=1)
    place_NW = layout.masks_NBK[torch.arange(num_requests, device=rank_N.device), rank_N, 1:]
    return is_hit_N, place_NW.masked_fill(~is_hit_N[:, None], -1)
