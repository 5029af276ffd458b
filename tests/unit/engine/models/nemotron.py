"""Nemotron-Labs-Diffusion written out: a tiny checkpoint, its dense forward pass, and its two-pass self-speculation.

An oracle, deliberately simple: functions over the checkpoint's tensors, in float64, with nothing cached and a mask that says
which row sees which. It shares no code with the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CONFIG: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "auto_map": {"AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel"},
    "vocab_size": 128,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_parameters": ROPE,
    "sliding_window": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 11,
    "mask_token_id": 100,
    "block_size": 32,
    "dlm_paradigm": "bidirectional",
    "dtype": "bfloat16",
}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["o_proj"],
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` and ``lora`` (empty: none) by the names of their files."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    lora: dict[str, Tensor]


def tiny_checkpoint(seed: int = 0, lora: bool = False, shared: float = 0.0, **changes: Any) -> Checkpoint:
    """Random weights. ``shared`` mixes one direction into all embeddings: the larger, the more drafts are accepted."""
    config = CONFIG | changes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.35, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    tensors = {"encoder.embed_tokens.weight": normal(vocab, hidden, std=1.0) + shared * normal(1, hidden, std=1.0)}
    adapter = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = normal(hidden, std=0.1, mean=1.0)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = normal(rows, hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = normal(hidden, q)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = normal(rows, columns)
        if lora:
            adapter[f"base_model.model.{prefix}.self_attn.o_proj.lora_A.weight"] = normal(ADAPTER["r"], q)
            adapter[f"base_model.model.{prefix}.self_attn.o_proj.lora_B.weight"] = normal(hidden, ADAPTER["r"], std=0.1)
    tensors["encoder.norm.weight"] = normal(hidden, std=0.1, mean=1.0)
    tensors["diffusion_head.weight"] = normal(vocab, hidden, std=0.6)
    return Checkpoint(config, tensors, adapter)


def write(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """Write the folder as it is published; ``dtype`` is that of the stored tensors."""
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
        for file in files:
            save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if checkpoint.lora:
        adapter = folder / "linear_spec_lora"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
        save_file({name: t.to(dtype) for name, t in checkpoint.lora.items()}, adapter / "adapter_model.safetensors")
    return folder


@dataclass(frozen=True)
class Row:
    """One row of a forward pass. ``anchor`` is the position of its branch's anchor; None for a clean row."""

    token: int
    position: int
    anchor: int | None = None


def clean_rows(tokens: Sequence[int]) -> list[Row]:
    return [Row(token, position) for position, token in enumerate(tokens)]


def branch_rows(checkpoint: Checkpoint, anchor: Row, masks: int, copied: bool) -> list[Row]:
    """The rows of the branch behind a clean row: its copy, if this layout has one, and the masks."""
    copy = [Row(anchor.token, anchor.position, anchor.position)] if copied else []
    mask = checkpoint.config["mask_token_id"]
    return copy + [Row(mask, anchor.position + 1 + j, anchor.position) for j in range(masks)]


def visibility(rows: Sequence[Row], copied: bool) -> Tensor:
    """Whether row i sees row j, boolean [R, R]: clean rows causally; a branch its own rows and what stands before them."""

    def sees(row: Row, other: Row) -> bool:
        if row.anchor is None:
            return other.anchor is None and other.position <= row.position
        if other.anchor is not None:
            return other.anchor == row.anchor
        return other.position < row.anchor if copied else other.position <= row.anchor

    return torch.tensor([[sees(row, other) for other in rows] for row in rows])


def yarn(rope: dict[str, Any], head_dim: int) -> tuple[list[float], float]:
    """Radians per position of every pair of dimensions, and the factor of cos and sin."""
    theta, factor, original = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """The pair that makes so many turns within the original context."""
        return head_dim / 2 * math.log(original / (2 * math.pi * times)) / math.log(theta)

    first = max(math.floor(pair_that_turns(rope["beta_fast"])), 0)
    last = min(math.ceil(pair_that_turns(rope["beta_slow"])), head_dim - 1)
    frequencies = []
    for pair in range(head_dim // 2):
        interpolated = min(max((pair - first) / (last - first), 0.0), 1.0)
        frequencies.append(theta ** (-2 * pair / head_dim) * (1 - interpolated + interpolated / factor))

    def attention(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    return frequencies, attention(rope["mscale"]) / attention(rope["mscale_all_dim"])


def rotate(x_RHD: Tensor, positions: Sequence[int], rope: dict[str, Any]) -> Tensor:
    """Turn the pair (d, d + D/2) of every head by its frequency times the position."""
    half = x_RHD.shape[-1] // 2
    frequencies, scale = yarn(rope, 2 * half)
    angles = torch.tensor([[position * frequency for frequency in frequencies] for position in positions]).double()[:, None]
    a, b = x_RHD[..., :half], x_RHD[..., half:]
    return scale * torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


def forward(checkpoint: Checkpoint, rows: Sequence[Row], visible_RR: Tensor) -> Tensor:
    """Logits [R, V] in float64; the LoRA is on for the rows of branches."""
    config, rope = checkpoint.config, checkpoint.config["rope_parameters"]
    w = {name: tensor.double() for name, tensor in (checkpoint.tensors | checkpoint.lora).items()}
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    positions, draft = [row.position for row in rows], torch.tensor([row.anchor is not None for row in rows])
    beta, original = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    query_scale = torch.tensor([1 + beta * math.log(1 + position // original) for position in positions]).double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    x = w["encoder.embed_tokens.weight"][[row.token for row in rows]]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}"
        y = norm(x, f"{prefix}.input_layernorm.weight")
        q, k, v = (
            (y @ w[f"{prefix}.self_attn.{name}_proj.weight"].T).view(len(rows), count, size)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q = rotate(q, positions, rope) * query_scale[:, None, None]
        k = rotate(k, positions, rope)
        mixed = []
        for head in range(heads):
            group = head * kv_heads // heads
            scores = q[:, head] @ k[:, group].T / math.sqrt(size)
            mixed.append(scores.masked_fill(~visible_RR, -math.inf).softmax(-1) @ v[:, group])
        y = torch.cat(mixed, dim=-1)
        out = y @ w[f"{prefix}.self_attn.o_proj.weight"].T
        if checkpoint.lora:
            a, b = (w[f"base_model.model.{prefix}.self_attn.o_proj.lora_{part}.weight"] for part in "AB")
            out = out + draft[:, None] * (ADAPTER["lora_alpha"] / ADAPTER["r"]) * (y @ a.T @ b.T)
        x = x + out
        y = norm(x, f"{prefix}.post_attention_layernorm.weight")
        gate, up, down = (w[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return norm(x, "encoder.norm.weight") @ w["diffusion_head.weight"].T


def likeliest(checkpoint: Checkpoint, logits_RV: Tensor) -> list[int]:
    """The likeliest token of every row; the mask is none."""
    logits_RV = logits_RV.clone()
    logits_RV[:, checkpoint.config["mask_token_id"]] = -math.inf
    return logits_RV.argmax(-1).tolist()


def next_tokens(checkpoint: Checkpoint, tokens: Sequence[int]) -> list[int]:
    """The likeliest next token after every token."""
    rows = clean_rows(tokens)
    return likeliest(checkpoint, forward(checkpoint, rows, visibility(rows, copied=False)))


def autoregressive(checkpoint: Checkpoint, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy decoding, one token a pass."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_tokens(checkpoint, tokens)[-1])
    return tokens[len(prompt) :]


def drafts_after(checkpoint: Checkpoint, tokens: Sequence[int], masks: int) -> list[int]:
    """The drafting pass: guesses for the positions after the last token, which sees the masks as they see it."""
    *context, last = clean_rows(tokens)
    rows = context + branch_rows(checkpoint, last, masks, copied=True)
    logits = forward(checkpoint, rows, visibility(rows, copied=True))
    return likeliest(checkpoint, logits[-masks:])


@dataclass(frozen=True)
class Round:
    """What one drafting and one verifying pass gave: the drafts, how many were accepted, and the tokens emitted."""

    drafts: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]


def self_speculation(checkpoint: Checkpoint, prompt: Sequence[int], max_tokens: int, block_size: int) -> list[Round]:
    """Greedy two-pass self-speculation. Round 0 is the prompt's pass, which emits the first token without drafts."""
    tokens = list(prompt)
    rounds = [Round((), 0, (next_tokens(checkpoint, tokens)[-1],))]
    tokens += rounds[0].tokens
    while len(tokens) < len(prompt) + max_tokens:
        drafts = drafts_after(checkpoint, tokens, block_size - 1)
        taken = next_tokens(checkpoint, tokens + drafts)[len(tokens) - 1 :]
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == taken[accepted]:
            accepted += 1
        wanted = len(prompt) + max_tokens - len(tokens)
        rounds.append(Round(tuple(drafts), accepted, tuple(taken[: accepted + 1][:wanted])))
        tokens += rounds[-1].tokens
    return rounds
