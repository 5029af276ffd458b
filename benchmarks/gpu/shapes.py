"""The shapes of the models that speed is measured on, and what one of their steps must at least move and compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config import ModelConfig, RopeConfig, TidarConfig
from engine.step import DraftPlan

BLOCK_LENGTH = 16

QWEN25_15B = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=151_936,
    hidden_size=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=8960,
    max_position=131_072,
    rope=RopeConfig(theta=1e6),
    qkv_bias=True,
    tie_word_embeddings=True,
    tidar=TidarConfig(BLOCK_LENGTH, mask_token_id=151_935),
    eos_token_ids=(151_643,),
)
QWEN3_8B = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151_936,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12_288,
    max_position=40_960,
    rope=RopeConfig(theta=1e6),
    qk_norm=True,
    tidar=TidarConfig(BLOCK_LENGTH, mask_token_id=151_935),
    eos_token_ids=(151_643,),
)
TINY = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position=4096,
    qk_norm=True,
    tidar=TidarConfig(BLOCK_LENGTH, mask_token_id=63),
    eos_token_ids=(62,),
)
"""What a dry run has in the place of either model."""

MODELS = {"8b": QWEN3_8B, "1.5b": QWEN25_15B}

ACCEPTANCE = {"8b": 0.902, "1.5b": 0.885}
"""The chance of acceptance that gives the tokens per forward of the TiDAR paper (arXiv 2511.08923) at blocks of 16."""


def one_layer(config: ModelConfig) -> ModelConfig:
    """The same shapes in one layer with a small vocabulary: enough to lay out steps and to attend."""
    return replace(config, num_layers=1, vocab_size=256, tidar=TidarConfig(BLOCK_LENGTH, 255), eos_token_ids=(254,))


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's matrices and of the head."""
    heads, groups, size, width = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    return {
        "qkv": ((heads + 2 * groups) * size, width),
        "o": (width, heads * size),
        "gate_up": (2 * config.intermediate_size, width),
        "down": (width, config.intermediate_size),
        "lm_head": (config.vocab_size, width),
    }


@dataclass(frozen=True, slots=True)
class Work:
    """What something must at least move through device memory, in bytes, and compute, in floating-point operations."""

    num_bytes: float
    flops: float

    def floor_ms(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Milliseconds that no implementation undercuts at these ceilings."""
        return 1000 * max(self.num_bytes / bytes_per_second, self.flops / flops_per_second)


def kv_bytes(config: ModelConfig, element_size: int = 2) -> int:
    """Bytes that one cached token has over all layers."""
    return config.kv_bytes_per_token_factor * element_size


def weight_bytes(config: ModelConfig, element_size: int = 2) -> int:
    """Bytes of the matrices that a step streams: all layers, and the head once."""
    shapes = linear_shapes(config)
    head = shapes.pop("lm_head")
    elements = config.num_layers * sum(out * width for out, width in shapes.values()) + head[0] * head[1]
    return elements * element_size


def step_work(config: ModelConfig, num_requests: int, plan: DraftPlan, context: int, element_size: int = 2) -> Work:
    """A decode step of requests with one plan and ``context`` cached tokens each.

    Weights and the cache are read once. Every row meets every matrix, but for the head, which mask 0 of a branch does not need.
    """
    rows = num_requests * plan.num_rows
    head_rows = rows - num_requests * plan.num_branches
    head = config.vocab_size * config.hidden_size
    layers = weight_bytes(config, 1) - head
    attention = 4 * rows * context * config.num_heads * config.head_dim * config.num_layers
    return Work(
        weight_bytes(config, element_size) + num_requests * context * kv_bytes(config),
        2 * (rows * layers + head_rows * head) + attention,
    )
