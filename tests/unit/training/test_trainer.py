"""The trainer resumes exactly, the export is read back, and the encoding is that of the chat template."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from engine.config import ModelConfig, TidarConfig
from engine.models.transformer import Transformer
from training.data import SYSTEM_PROMPTS, Conversations
from training.muon import orthogonalise
from training.tokenizer import END, MASK, save_tokenizer, train_tokenizer
from training.trainer import TrainConfig, Trainer, init_weights, schedule

PAIRS = [("What is one?", "One is 1."), ("What is two?", "Two is 2."), ("And three?", "Three is 3, and more than two.")]
CONFIG = ModelConfig("test", 300, 16, 1, 2, 1, 8, 24, 64, qk_norm=True, tie_word_embeddings=True, tidar=TidarConfig(4, MASK))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((text for pair in PAIRS for text in pair), 300)


@pytest.fixture
def conversations(tokenizer):
    return Conversations(tokenizer, lambda rng: rng.choice(PAIRS))


def new_trainer(conversations, folder, steps):
    model = Transformer(CONFIG)
    init_weights(model, seed=0)
    model.build_rope(256)
    config = TrainConfig(steps=steps, rows=4, save_every=3, report_every=1000)
    return Trainer(model, conversations, [conversations.example(*PAIRS[0])], config, folder)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(conversations, tmp_path):
    whole = new_trainer(conversations, tmp_path / "whole", steps=6)
    whole.folder.mkdir()
    assert not whole.resume()
    whole.run()
    first = new_trainer(conversations, tmp_path / "cut", steps=6)
    first.folder.mkdir()
    for _ in range(3):
        first.train_step()
        first.step += 1
    first.save()
    second = new_trainer(conversations, tmp_path / "cut", steps=6)
    assert second.resume()
    second.run()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_examples_are_encoded_as_the_chat_template_does(tokenizer, conversations, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    question, answer = PAIRS[0]
    example = conversations.example(question, answer)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = loaded.apply_chat_template(messages, tokenize=False)
    prompt = loaded.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert tuple(loaded(whole, add_special_tokens=False)["input_ids"]) == example.token_ids
    assert len(loaded(prompt, add_special_tokens=False)["input_ids"]) == example.answer_start
    assert loaded.decode(example.token_ids[example.answer_start :], skip_special_tokens=True) == answer
    assert example.token_ids[-1] == END == loaded.eos_token_id


def test_conversations_vary_and_fit(conversations):
    rng = random.Random(0)
    drawn = [conversations.draw(rng) for _ in range(200)]
    starts = {conversations.encode(p)[0] for p in SYSTEM_PROMPTS}
    assert any(e.token_ids[1] in starts and e.token_ids[0] == 1 for e in drawn), "no system prompt in 200 draws"
    assert any(e.token_ids.count(END) > 2 for e in drawn), "no earlier turn in 200 draws"
    assert max(len(e.token_ids) for e in drawn) <= conversations.max_length


def test_the_learning_rate_warms_up_stays_and_falls():
    factors = [schedule(p / 100, warmup=0.1, cooldown=0.5) for p in range(101)]
    assert factors[0] < 0.05
    assert factors[20] == factors[49] == 1.0
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.5
