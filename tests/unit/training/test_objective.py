"""The doubled-sequence objective: what every row sees and predicts, and that training and evaluation agree with it."""

import itertools
import random

import pytest
import torch

from engine.config import ModelConfig, TidarConfig
from engine.models.transformer import Transformer
from kernels.mask_layout import visible
from training.evaluate import evaluate, steps_with_all_branches
from training.objective import IGNORE, Example, block_starts, hidden_states, loss, make_batch
from training.trainer import init_weights

MASK = 7
CONFIG = ModelConfig("test", 32, 16, 2, 2, 1, 8, 24, 64, qk_norm=True, tie_word_embeddings=True, tidar=TidarConfig(4, MASK))


@pytest.fixture
def model():
    model = Transformer(CONFIG).double()
    init_weights(model, seed=0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    model.build_rope(64)
    return model


EXAMPLE = Example((10, 11, 12, 13, 14, 15, 16), answer_start=3)


def test_blocks_start_at_the_answer_and_then_anywhere():
    offsets = set()
    for seed in range(40):
        starts = block_starts(EXAMPLE, 4, random.Random(seed))
        assert starts[0] == EXAMPLE.answer_start
        assert all(b - a == 4 for a, b in itertools.pairwise(starts[1:]))
        offsets.add(starts[1] - starts[0] if len(starts) > 1 else None)
    assert offsets >= {1, 2, 3}


def test_rows_have_the_mask_positions_and_targets_of_the_definition():
    batch = make_batch([EXAMPLE], [[3, 5]], block_length=4, mask_token_id=MASK)
    assert batch.num_clean == 7
    assert batch.token_ids[0].tolist() == [10, 11, 12, 13, 14, 15, 16] + [MASK] * 8
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 5, 6, 7, 8]
    # Clean rows predict the next token of the answer, mask rows their own; what lies past the end is ignored.
    none = IGNORE
    assert batch.targets[0].tolist() == [none, none, 13, 14, 15, 16, none, 13, 14, 15, 16, 15, 16, none, none]
    seen = visible(batch.limit, batch.branch)[0]
    for row in range(7):
        assert seen[row].nonzero().flatten().tolist() == list(range(row + 1))
    for row in range(7, 11):
        assert seen[row].nonzero().flatten().tolist() == [0, 1, 2, 7, 8, 9, 10]
    for row in range(11, 15):
        assert seen[row].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 11, 12, 13, 14]


def test_a_mask_block_does_not_depend_on_what_it_must_not_see(model):
    """Changing answer tokens behind a block's start, or another block's place, leaves the block's hidden states alone."""
    changed = Example((*EXAMPLE.token_ids[:5], 20, 21), EXAMPLE.answer_start)
    before = hidden_states(model, make_batch([EXAMPLE], [[3, 5]], 4, MASK))
    after = hidden_states(model, make_batch([changed], [[3, 6]], 4, MASK))
    torch.testing.assert_close(before[7:11], after[7:11])
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5], after[5])


def test_padding_changes_nothing(model):
    longer = Example(tuple(range(8, 24)), answer_start=5)
    alone = hidden_states(model, make_batch([EXAMPLE], [[3]], 4, MASK))
    together = hidden_states(model, make_batch([EXAMPLE, longer], [[3], [5, 9, 13]], 4, MASK))
    torch.testing.assert_close(alone[:7], together[:7])
    torch.testing.assert_close(alone[7:11], together[16:20])


def test_the_loss_weighs_its_parts_with_alpha(model):
    batch = make_batch([EXAMPLE], [[3]], 4, MASK)
    for alpha in (1.0, 0.25):
        result = loss(model, batch, alpha)
        expected = (alpha * result.next_token + result.same_position) / (1 + alpha)
        torch.testing.assert_close(result.total, expected)


def test_steps_are_counted_as_the_engine_would():
    """Prompt of 2, answer of 9, blocks of 4; token ``i`` stands at position ``i`` and every draft is right but for one."""
    length = 11
    next_token = torch.arange(1, length + 1)
    drafts = torch.arange(length)[:, None] + torch.arange(4)
    # The redraft emits token 2; then two steps verify positions 2..5 and 6..9 and emit 3..6 and 7..10.
    assert steps_with_all_branches(next_token, drafts, answer_start=2) == 3
    drafts[2, 1] = 50  # a wrong first guess: that step emits one token, and 4..7 and 8..10 take two more
    assert steps_with_all_branches(next_token, drafts, answer_start=2) == 4


def test_a_model_that_memorised_an_answer_is_reported_as_such(model):
    model = model.float()
    model.cos, model.sin = model.cos.float(), model.sin.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    rng = random.Random(0)
    for _ in range(150):
        result = loss(model, make_batch([EXAMPLE] * 4, [block_starts(EXAMPLE, 4, rng) for _ in range(4)], 4, MASK))
        result.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = evaluate(model, [EXAMPLE], 4, MASK)
    assert report.exact == 1.0
    assert report.next_token_accuracy == 1.0
    assert report.tokens_per_forward == pytest.approx(4 / 2)
