"""From a plan to the rows of a step, with what the device knows of its requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from engine.decode.calibration import SurvivalTable
from engine.decode.layout import build_layout
from engine.input_batch import InputBatch, SamplingNeeds
from engine.step import IntArray, StepPlan, spread
from engine.upload import upload
from kernels.backend import Kernels
from kernels.decode_state import DecodeState
from kernels.paged_attention.metadata import AttentionMetadata
from kernels.step_rows.metadata import StepLayout
from kernels.verify.metadata import StepRequests


def bounds_of(plan: StepPlan) -> IntArray:
    """What the host says of a step to the device, [3, N]: its requests' slots, and the bounds of their drafts and branches."""
    return np.stack((plan.slots, plan.num_drafts, plan.num_branches))


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One laid-out step. ``draft_rows`` are those that a checkpoint's draft adapter is for: all rows of exact branches.

    The runner reads the first group of fields. The judge reads the second, and of the first the layout and the prefix lengths.
    """

    layout: StepLayout
    token_ids_R: Tensor
    positions_R: Tensor
    slot_mapping_R: Tensor
    attention: AttentionMetadata
    draft_rows: Tensor

    slot_N: Tensor
    num_drafts_N: Tensor
    most_branches_N: Tensor
    order_NB: Tensor
    verify_slot_D: Tensor
    verify_position_D: Tensor
    needs: SamplingNeeds
    has_diffusion: bool

    @property
    def requests(self) -> StepRequests:
        """The requests as the verdict reads them."""
        return StepRequests(self.slot_N, self.attention.prefix_lengths, self.num_drafts_N, self.order_NB)


def decode_state(batch: InputBatch, survival: SurvivalTable) -> DecodeState:
    """The part of the device state that rows are made of and that a verdict writes."""
    return DecodeState(
        batch.block_table_SP,
        batch.num_computed_S,
        batch.num_held_S,
        batch.wanted_S,
        batch.drafts_SK,
        batch.draft_probs_SK,
        batch.is_diffusion_S,
        batch.is_decided_SK,
        batch.block_SK,
        batch.seed_S,
        survival.tried,
        survival.accepted,
    )


class RowBuilder:
    """Lays plans out over the state of the running requests, which it does not change."""

    def __init__(
        self, batch: InputBatch, state: DecodeState, page_size: int, mask_token_id: int | None, kernels: Kernels
    ) -> None:
        self.batch, self.state, self.page_size, self.mask_token_id = batch, state, page_size, mask_token_id or 0
        self.kernels = kernels

    def lay_out(self, plan: StepPlan, first_masks: bool) -> StepInputs:
        """Turn a plan into rows, with what the device knows: drafts held, branches worth running, positions.

        ``first_masks``: the logits of mask 0 are wanted, whoever is in the step.
        """
        host, device = self.batch.host, self.batch.device
        has_diffusion = host.has_diffusion(plan.slots)
        layout = build_layout(plan.shapes, first_masks or has_diffusion, device)
        bounds_3N, prefill = upload(bounds_of(plan), device), upload(plan.prefill_token_ids, device)
        max_prefix = tuple(plan.max_computed.tolist())
        inputs = self.build(layout, bounds_3N, prefill, max_prefix, host.needs(plan.slots), has_diffusion)
        return replace(inputs, draft_rows=self._exact_draft_rows(plan, layout)) if has_diffusion else inputs

    def build(
        self,
        layout: StepLayout,
        bounds_3N: Tensor,
        prefill_token_ids: Tensor,
        max_prefix: tuple[int, ...],
        needs: SamplingNeeds,
        has_diffusion: bool = False,
    ) -> StepInputs:
        """The rows of a layout for these requests: device operations alone, so that they can be captured."""
        slot_N, _, most_branches_N = bounds_3N.unbind(0)
        rows = self.kernels.lay_out(self.state, layout, bounds_3N, prefill_token_ids, self.page_size, self.mask_token_id)
        return StepInputs(
            layout=layout,
            token_ids_R=rows.token_ids_R,
            positions_R=rows.positions_R,
            slot_mapping_R=rows.slot_mapping_R,
            attention=AttentionMetadata(
                row_starts=layout.row_starts,
                device_row_starts=layout.device_row_starts,
                prefix_lengths=rows.prefix_lengths_N,
                max_prefix=max_prefix,
                block_table=rows.block_table_NP,
                limit=rows.limit_R,
                branch=rows.branch_R,
            ),
            draft_rows=layout.draft_rows,
            slot_N=slot_N,
            num_drafts_N=rows.num_drafts_N,
            most_branches_N=most_branches_N,
            order_NB=rows.order_NB,
            verify_slot_D=rows.verify_slot_D,
            verify_position_D=rows.verify_position_D,
            needs=needs,
            has_diffusion=has_diffusion,
        )

    def _exact_draft_rows(self, plan: StepPlan, layout: StepLayout) -> Tensor:
        """All rows of branches but those of diffusion requests. The host knows whose are whose; a mask would wait for it."""
        counts_N = plan.num_mask_rows * ~self.batch.host.is_diffusion_S[plan.slots]
        return upload(spread(np.array(layout.row_starts[1:]) - counts_N, counts_N), self.batch.device)
