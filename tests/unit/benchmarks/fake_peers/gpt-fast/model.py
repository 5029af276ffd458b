"""The model that gpt-fast builds, without its layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float
    norm_eps: float


class Transformer(nn.Module):
    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.config = config
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
