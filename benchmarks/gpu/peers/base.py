"""What the programs that run a peer have in common: a model's shape in Transformers' words, and the rate of decoding.

Each is a process of its own, ``python3 -m benchmarks.gpu.peers.NAME --model 8b --peers DIR``, whose last line is JSON: a peer
may take the whole device, fix its own versions, or hang.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shapes import MODELS, TINY
from engine.config import ModelConfig

PROMPT_TOKENS, SHORT, LONG, ROUNDS = 1024, 64, 320, 3
"""Tokens of the prompt and of the two outputs whose difference is timed."""


class AbsentError(Exception):
    """The peer is not there; the message says what was looked for."""


class Peer:
    """The arguments of a peer's program."""

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--model", choices=[*MODELS], required=True)
        parser.add_argument("--peers", type=Path)
        parser.add_argument("--dry-run", action="store_true")
        parsed = parser.parse_args(arguments)
        self.model, self.folder, self.is_dry = parsed.model, parsed.peers, parsed.dry_run
        self.device = torch.device("cpu" if self.is_dry else "cuda")
        self.dtype = torch.float32 if self.is_dry else torch.bfloat16
        self.sizes = (8, 2, 4, 1) if self.is_dry else (PROMPT_TOKENS, SHORT, LONG, ROUNDS)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return TINY if self.is_dry else MODELS[self.model]

    def find(self, name: str, *inside: str) -> Path:
        """Put a folder among the peers in front of the import path. Raises AbsentError."""
        if self.folder is None:
            raise AbsentError(f"no --peers folder was given to find {name} in")
        path = self.folder.joinpath(name, *inside).resolve()
        if not path.is_dir():
            raise AbsentError(f"the peers have no folder {'/'.join((name, *inside))}")
        for found in (self.folder.resolve() / "site", path):
            if found.is_dir() and str(found) not in sys.path:
                sys.path.insert(0, str(found))
        return path

    def prompt(self) -> list[int]:
        """Token ids."""
        return [5 + i % 50 for i in range(self.sizes[0])]

    def rate(self, generate: Callable[[int], object]) -> float:
        """Tokens per second of decoding alone.

        ``generate(n)`` makes ``n`` tokens, prompt included in its time; two lengths are run in turn, and what the longer one
        takes more is the time of its additional tokens.
        """
        _, short, long, rounds = self.sizes
        for count in (long, short):
            generate(count)  # compiles and allocates
        seconds: dict[int, list[float]] = {long: [], short: []}
        for _ in range(rounds):
            for count, found in seconds.items():
                begun = time.perf_counter()
                generate(count)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                found.append(time.perf_counter() - begun)
        return (long - short) / (statistics.median(seconds[long]) - statistics.median(seconds[short]))


def run_peer(measure: Callable[[Peer], dict[str, Any]], arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a peer's program; what it found, why it is absent, or the error that it met."""
    try:
        return measure(Peer(arguments))
    except (AbsentError, ImportError) as error:
        return {"absent": f"{type(error).__name__}: {error}"[:300]}


def main(measure: Callable[[Peer], dict[str, Any]]) -> None:
    """Run a peer's program and print its line. A peer's threads may keep a process from ending; they are not waited for."""
    print(json.dumps(run_peer(measure)), flush=True)
    os._exit(0)


def transformers_config(config: ModelConfig) -> Any:
    """The same shape as Transformers has it."""
    from transformers import Qwen2Config, Qwen3Config

    kind = Qwen3Config if config.qk_norm else Qwen2Config
    found = kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_word_embeddings,
    )
    found.architectures = [config.architecture]
    return found
