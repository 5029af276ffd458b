"""The recipe of the bundled model, one command: ``python -m training.stdlib --minutes 60``.

It builds the corpus, trains the tokenizer, trains the model (resuming a run that was cut off) and exports the checkpoint.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.config import ModelConfig, RopeConfig, TidarConfig
from engine.models.transformer import Transformer
from training.corpus.build import Corpus, build_corpus
from training.data import Conversations
from training.export import export
from training.objective import Example
from training.tokenizer import MASK, save_tokenizer, train_tokenizer
from training.trainer import TrainConfig, Trainer, init_weights

MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=2048,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=640,
    max_position=1024,
    rope=RopeConfig(theta=10_000.0),
    qk_norm=True,
    tie_word_embeddings=True,
    tidar=TidarConfig(block_length=8, mask_token_id=MASK),
    eos_token_ids=(4,),
)


def load_or_train_tokenizer(corpus: Corpus, folder: Path) -> Tokenizer:
    """The run's tokenizer: a resumed run must keep its own."""
    file = folder / "tokenizer.json"
    if not file.exists():
        rng = random.Random(1)
        pairs = (corpus.sample(rng) for _ in range(20_000))
        tokenizer = train_tokenizer((text for pair in pairs for text in pair), MODEL.vocab_size)
        save_tokenizer(tokenizer, folder, MODEL.max_position)
    return Tokenizer.from_file(str(file))


def held_out_examples(corpus: Corpus, conversations: Conversations, count: int) -> list[Example]:
    """Phrasings that training never samples, a fixed random choice of them."""
    questions = list(corpus.dev_questions)
    random.Random(2).shuffle(questions)
    return [conversations.example(question, item.answer) for question, item in questions[:count]]


def main() -> None:
    """Train and export the bundled model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/stdlib"), help="folder of the run's state (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="where to export the checkpoint (default: RUN/checkpoint)")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="end after so many steps, for a repeatable run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.run.mkdir(parents=True, exist_ok=True)

    corpus = build_corpus()
    tokenizer = load_or_train_tokenizer(corpus, arguments.run)
    conversations = Conversations(tokenizer, corpus.sample)
    model = Transformer(MODEL)
    init_weights(model, seed=0)
    model.build_rope(MODEL.max_position)
    config = TrainConfig(minutes=arguments.minutes, steps=arguments.steps)
    trainer = Trainer(model, conversations, held_out_examples(corpus, conversations, 200), config, arguments.run)
    print("resumed" if trainer.resume() else "started", f"with {sum(p.numel() for p in model.parameters()):,} parameters")
    trainer.run()

    out = arguments.out or arguments.run / "checkpoint"
    export(model, out)
    save_tokenizer(tokenizer, out, MODEL.max_position)
    print(f"exported to {out}")


if __name__ == "__main__":
    main()
