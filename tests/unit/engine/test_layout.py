"""What a plan becomes: rows, positions, what each row sees, and where its keys and values go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from engine.decode.inputs import StepInputs
from engine.decode.layout import build_layout
from engine.decode.tidar import TidarDecoder
from engine.input_batch import InputBatch
from engine.sampling_params import DecodingMode, SamplingParams
from engine.step import NO_DRAFTS, Admission, DraftPlan, RequestShape, ScheduledRequest, StepPlan
from kernels.mask_layout import visible

CPU = torch.device("cpu")
A, B, C, D, E, F, MASK = 1, 2, 3, 4, 5, 6, 9
PAGE_SIZE = 4
PAGES = (5, 2, 7)


def decoder(num_slots: int = 1, max_drafts: int = 3) -> TidarDecoder:
    return TidarDecoder(InputBatch(num_slots, max_drafts, len(PAGES), 10, CPU), PAGE_SIZE, MASK)


def admit(slot: int, num_computed: int, last: int, wanted: int = 100) -> Admission:
    return Admission(slot, num_computed, (last,), (), DecodingMode.TIDAR, SamplingParams(wanted, temperature=0.0))


def pages(slot: int, *page_ids: int) -> list[tuple[int, int, int]]:
    return [(slot, number, page) for number, page in enumerate(page_ids)]


def lay_out_example(plan: DraftPlan, held: int = 3, wanted: int = 100) -> StepInputs:
    """The design's example: prefix A B C in the cache, drafts D E F."""
    tidar = decoder()
    share = ScheduledRequest(0, (), plan, max_computed=3)
    tidar.batch.update(StepPlan.of(0, (), [admit(0, 3, D, wanted)]))
    tidar.batch.drafts_SK[0] = torch.tensor([D, E, F])
    tidar.batch.num_held_S[0] = held
    # Falling chances, so that branches are ranked 0, 1, 2.
    tidar.batch.draft_probs_SK[0] = torch.tensor([1.0, 0.4, 0.3])
    plan = StepPlan.of(1, (share,), (), pages(0, *PAGES))
    tidar.batch.update(plan)
    return tidar.lay_out(plan)


def seen_by(inputs: StepInputs, row: int) -> list[int]:
    table = visible(inputs.attention.limit, inputs.attention.branch)
    return table[row].nonzero().flatten().tolist()


def test_the_worked_example_has_its_rows() -> None:
    inputs = lay_out_example(DraftPlan(3, 3, 3))
    assert inputs.token_ids_R.tolist() == [D, E, F] + [MASK] * 9
    assert inputs.positions_R.tolist() == [3, 4, 5, *[4, 5, 6], *[5, 6, 7], *[6, 7, 8]]
    assert inputs.order_NB.tolist() == [[0, 1, 2]]
    assert inputs.num_drafts_N.tolist() == [3]


def test_the_worked_example_sees_what_it_should() -> None:
    inputs = lay_out_example(DraftPlan(3, 3, 3))
    assert [seen_by(inputs, row) for row in range(3)] == [[0], [0, 1], [0, 1, 2]]
    for branch in range(3):
        masks = [3 + 3 * branch + j for j in range(3)]
        for row in masks:
            assert seen_by(inputs, row) == [*range(branch + 1), *masks]
    assert inputs.attention.prefix_lengths.tolist() == [3]
    assert inputs.attention.row_starts == (0, 12)


def test_only_drafts_are_kept_and_masks_go_to_the_null_page() -> None:
    inputs = lay_out_example(DraftPlan(3, 3, 3))
    # Position 3 is the last of page 5; positions 4 and 5 are the first of page 2.
    assert inputs.slot_mapping_R.tolist() == [5 * PAGE_SIZE + 3, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 1] + [0] * 9


def test_drafts_beyond_those_held_are_padding_that_nobody_keeps() -> None:
    inputs = lay_out_example(DraftPlan(3, 1, 3), held=1)
    assert inputs.num_drafts_N.tolist() == [1]
    assert inputs.order_NB.tolist() == [[0]]
    assert inputs.slot_mapping_R.tolist() == [5 * PAGE_SIZE + 3] + [0] * 5
    assert [seen_by(inputs, row) for row in (3, 4, 5)] == [[0, 3, 4, 5]] * 3, "a mask of branch 0 sees draft 0 and its block"


def test_the_end_of_a_request_shortens_its_drafts_and_drops_its_branches() -> None:
    inputs = lay_out_example(DraftPlan(3, 3, 3), wanted=3)
    assert inputs.num_drafts_N.tolist() == [3]
    assert inputs.order_NB.tolist() == [[0, -1, -1]]
    assert lay_out_example(DraftPlan(3, 3, 3), wanted=2).order_NB.tolist() == [[-1, -1, -1]]
    assert lay_out_example(DraftPlan(3, 3, 3), wanted=2).num_drafts_N.tolist() == [2]


def test_a_branch_that_is_not_run_sees_nobody_elses_masks() -> None:
    inputs = lay_out_example(DraftPlan(3, 2, 3), wanted=3)
    table = visible(inputs.attention.limit, inputs.attention.branch)
    assert not table[:6, 6:].any(), "a row of the step sees padding"
    assert not table[6:, 3:6].any()


def test_prefill_chunks_and_decode_steps_share_a_step() -> None:
    tidar = decoder(num_slots=2)
    requests = (
        ScheduledRequest(1, (A, B), NO_DRAFTS, 0),
        ScheduledRequest(0, (B, C), DraftPlan(1, 1, 3), 1),
    )
    plan = StepPlan.of(1, requests, (admit(1, 0, F), admit(0, 1, D)), (*pages(1, 3), *pages(0, *PAGES)))
    tidar.admit(plan)
    inputs = tidar.lay_out(plan)
    assert inputs.token_ids_R.tolist() == [A, B, *[B, C, D, MASK, MASK, MASK]]
    assert inputs.positions_R.tolist() == [0, 1, *[1, 2, 3, 4, 5, 6]]
    first, second = 3 * PAGE_SIZE, 5 * PAGE_SIZE
    assert inputs.slot_mapping_R.tolist() == [first, first + 1, second + 1, second + 2, second + 3, 0, 0, 0]
    assert inputs.num_drafts_N.tolist() == [0, 1]
    assert inputs.layout.logit_rows.tolist() == [4, 6, 7], "the draft, and the masks that draft: the first mask never does"
    assert inputs.attention.row_starts == (0, 2, 8)
    assert inputs.attention.limit.tolist() == [1, 2, *[1, 2, 3, 3, 3, 3]]


def test_the_draft_rows_beside_a_diffusion_request_are_those_of_exact_branches() -> None:
    tidar = decoder(num_slots=3)
    lossy = replace(admit(2, 1, F), mode=DecodingMode.DIFFUSION)
    requests = (
        ScheduledRequest(2, (), DraftPlan(1, 1, 3), 1),
        ScheduledRequest(1, (A, B), NO_DRAFTS, 0),
        ScheduledRequest(0, (B,), DraftPlan(1, 2, 2), 1),
    )
    plan = StepPlan.of(1, requests, (lossy, admit(1, 0, F), admit(0, 1, D)), pages(0, *PAGES))
    tidar.admit(plan)
    inputs = tidar.lay_out(plan)
    assert inputs.layout.draft_rows.tolist() == [1, 2, 3, *[8, 9, 10, 11]]
    assert inputs.draft_rows.tolist() == [8, 9, 10, 11]


def test_logits_of_masks_are_found_by_request_rank_and_number() -> None:
    layout = build_layout(np.array([RequestShape(0, 2, 2, 3), RequestShape(1, 1, 1, 2)]), False, CPU)
    assert layout.row_starts == (0, 8, 12)
    assert layout.device_row_starts.tolist() == [0, 8, 12]
    assert layout.verify_rows_D.tolist() == [0, 1, 9]
    assert layout.verify_request_D.tolist() == [0, 0, 1]
    assert layout.verify_index_D.tolist() == [0, 1, 0]
    masks = {(0, 0): [3, 4], (0, 1): [6, 7], (1, 0): [11]}
    for (request, rank), rows in masks.items():
        places = layout.masks_NBK[request, rank, 1 : len(rows) + 1]
        assert layout.logit_rows[places].tolist() == rows
    assert (layout.max_drafts, layout.max_branches, layout.max_block) == (2, 2, 3)


def test_a_layout_without_branches_has_clean_rows_only() -> None:
    layout = build_layout(np.array([RequestShape(0, 1, 0, 1), RequestShape(3, 0, 0, 1)]), False, CPU)
    assert layout.clean_R.all()
    assert layout.prefill_rows.tolist() == [1, 2, 3]
    assert layout.logit_rows.tolist() == [0]
