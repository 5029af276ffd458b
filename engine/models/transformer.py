"""The one model definition: a decoder-only transformer with configuration switches.

Shape suffixes: R rows of a step (tokens, flattened over requests), H query heads, G key/value heads, D head size,
E hidden size, V vocabulary. The model knows neither requests nor pages: attention and the caches' slots are handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.models.rope import query_scale_table, rope_tables
from kernels.backend import REFERENCE, Kernels
from kernels.linear.weight import FP8, Weight, with_scale
from kernels.rope_kv_write.metadata import RopeMetadata


class Attention(Protocol):
    """What a layer asks of its surroundings: mix the rows' values."""

    def __call__(self, layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
        """Return the attention output, [R, H, D]."""
        ...


class CacheSlots(NamedTuple):
    """Where the rows' keys and values are kept: every layer's pair of caches, and the slot of every row in all of them."""

    layers: Sequence[tuple[Tensor, Tensor]]
    slots_R: Tensor
    page_size: int


class _Rows(NamedTuple):
    """What every layer has to know of the rows, made once a forward. ``rope`` is opaque."""

    rope: Any
    cache: CacheSlots | None
    draft_rows: Tensor | None
    attention: Attention


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU. The q, k, v and the gate, up projections are merged into one matrix each."""

    def __init__(self, config: ModelConfig, index: int, kernels: Kernels) -> None:
        super().__init__()
        c, self.index, self.kernels = config, index, kernels
        self.num_heads, self.num_kv_heads, self.head_dim, self.eps = c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps
        heads = c.num_heads + 2 * c.num_kv_heads
        self.input_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.qkv = nn.Parameter(torch.empty(heads * c.head_dim, c.hidden_size))
        self.qkv_bias = nn.Parameter(torch.zeros(heads * c.head_dim)) if c.qkv_bias else None
        # Row 0 scales queries and row 1 keys.
        self.qk_norm = nn.Parameter(torch.ones(2, c.head_dim)) if c.qk_norm else None
        self.output = nn.Parameter(torch.empty(c.hidden_size, c.num_heads * c.head_dim))
        self.output_bias = nn.Parameter(torch.zeros(c.hidden_size)) if c.output_bias else None
        lora = c.tidar.draft_lora if c.tidar else None
        self.lora_scale = lora.scale if lora else 0.0
        self.output_lora_a = nn.Parameter(torch.empty(lora.rank, c.num_heads * c.head_dim)) if lora else None
        self.output_lora_b = nn.Parameter(torch.empty(c.hidden_size, lora.rank)) if lora else None
        self.post_attention_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.gate_up = nn.Parameter(torch.empty(2 * c.intermediate_size, c.hidden_size))
        self.gate_up_bias = nn.Parameter(torch.zeros(2 * c.intermediate_size)) if c.mlp_bias else None
        self.down = nn.Parameter(torch.empty(c.hidden_size, c.intermediate_size))
        self.down_bias = nn.Parameter(torch.zeros(c.hidden_size)) if c.mlp_bias else None
        # Of weights in eight bits, one number for each output channel.
        self.qkv_scale: Tensor | None = None
        self.output_scale: Tensor | None = None
        self.gate_up_scale: Tensor | None = None
        self.down_scale: Tensor | None = None

    @property
    def qkv_sizes(self) -> list[int]:
        """Output channels of q, k and v in the merged projection."""
        return [count * self.head_dim for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]

    def make_room_for_fp8(self) -> None:
        """Put uninitialised e4m3 values and their scales in the place of the four large weights."""
        for name in ("qkv", "output", "gate_up", "down"):
            weight = getattr(self, name)
            scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
            setattr(self, name, nn.Parameter(torch.empty_like(weight, dtype=FP8), requires_grad=False))
            setattr(self, f"{name}_scale", nn.Parameter(scale, requires_grad=False))

    def linear_weights(self) -> tuple[Weight, Weight, Weight, Weight]:
        """The weights that every row meets, in this order: q, k, v; attention output; gate and up; down."""
        return (
            with_scale(self.qkv, self.qkv_scale),
            with_scale(self.output, self.output_scale),
            with_scale(self.gate_up, self.gate_up_scale),
            with_scale(self.down, self.down_scale),
        )

    def forward(self, x_RE: Tensor, residual_RE: Tensor | None, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Return ``(output, residual)``; the caller adds them (fused with its own norm)."""
        ops = self.kernels
        if residual_RE is None:
            residual_RE = x_RE
            x_RE = ops.rms_norm(x_RE, self.input_norm, self.eps)
        else:
            x_RE, residual_RE = ops.add_rms_norm(x_RE, residual_RE, self.input_norm, self.eps)
        x_RE = self._attend(x_RE, rows)
        x_RE, residual_RE = ops.add_rms_norm(x_RE, residual_RE, self.post_attention_norm, self.eps)
        gate_up = ops.linear(x_RE, with_scale(self.gate_up, self.gate_up_scale), self.gate_up_bias)
        down = with_scale(self.down, self.down_scale)
        return ops.linear(ops.swiglu(gate_up), down, self.down_bias), residual_RE

    def _attend(self, x_RE: Tensor, rows: _Rows) -> Tensor:
        qkv = self.kernels.linear(x_RE, with_scale(self.qkv, self.qkv_scale), self.qkv_bias)
        qkv = qkv.view(len(x_RE), -1, self.head_dim)
        cache = None if rows.cache is None else rows.cache.layers[self.index]
        q_RHD, k_RGD, v_RGD = self.kernels.rope_kv_write(qkv, self.qk_norm, self.eps, rows.rope, cache)
        return self._project(rows.attention(self.index, q_RHD, k_RGD, v_RGD).reshape(len(x_RE), -1), rows.draft_rows)

    def _project(self, mixed: Tensor, draft_rows: Tensor | None) -> Tensor:
        """Return the output projection [R, E] of ``mixed`` [R, H * D], with the low-rank update in the draft rows alone."""
        out_RE = self.kernels.linear(mixed, with_scale(self.output, self.output_scale), self.output_bias)
        if draft_rows is None or self.output_lora_a is None or self.output_lora_b is None:
            return out_RE
        update = self.kernels.linear(self.kernels.linear(mixed[draft_rows], self.output_lora_a, None), self.output_lora_b, None)
        return out_RE.index_add_(0, draft_rows, update, alpha=self.lora_scale)


class Transformer(nn.Module):
    """Embedding, layers, final norm and head. ``forward`` gives hidden states; ``logits`` the head's output for chosen rows."""

    def __init__(self, config: ModelConfig, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, i, kernels) for i in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.cos = self.sin = torch.empty(0)
        self.query_scale: Tensor | None = None

    def build_rope(self, num_positions: int) -> None:
        """Make the tables by position for at least ``0..num_positions-1``, on the weights' device.

        Tables only grow: engines that share one model may serve contexts of different lengths.
        """
        if len(self.cos) >= num_positions:
            return
        rope, device = self.config.rope, self.embedding.device
        dtype = torch.promote_types(self.embedding.dtype, torch.float32)
        self.cos, self.sin = rope_tables(rope, self.config.head_dim, num_positions, dtype, device)
        self.query_scale = query_scale_table(rope, num_positions, dtype, device)

    def forward(
        self,
        token_ids_R: Tensor,
        positions_R: Tensor,
        attention: Attention,
        draft_rows: Tensor | None = None,
        cache: CacheSlots | None = None,
    ) -> Tensor:
        """Return the final hidden states [R, E] of rows with the given token ids and positions.

        With a ``cache`` the rows' keys and values are kept there; training has none.
        ``draft_rows``, different indices into the rows, are the masks and the copies of anchors: a draft LoRA is on for
        them, and off for all others. None or empty: off, as it is without one.
        """
        x = F.embedding(token_ids_R, self.embedding)
        if draft_rows is not None and len(draft_rows) == 0:
            draft_rows = None
        rows = _Rows(self._prepare_rope(positions_R, cache, x.dtype), cache, draft_rows, attention)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, rows)
        assert residual is not None, "a transformer has at least one layer"
        return self.kernels.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

    def _prepare_rope(self, positions_R: Tensor, cache: CacheSlots | None, dtype: torch.dtype) -> Any:
        slots_R, page_size = (None, 0) if cache is None else (cache.slots_R, cache.page_size)
        metadata = RopeMetadata(self.cos, self.sin, self.query_scale, positions_R, slots_R, page_size)
        return self.kernels.prepare_rope(metadata, self.config.num_heads, self.config.num_kv_heads, dtype)

    def make_room_for_fp8(self) -> None:
        """Put uninitialised e4m3 values and their scales in the place of every layer's large weights."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.make_room_for_fp8()

    @property
    def head(self) -> Tensor:
        """The weight that makes logits, [V, E]: the embedding's where the two are tied."""
        return self.embedding if self.lm_head is None else self.lm_head

    def linear_weights(self) -> list[Weight]:
        """The weights that every row of a step meets in a linear layer, and the head."""
        weights: list[Weight] = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            weights += layer.linear_weights()
        return [*weights, self.head]

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """Return next-token (clean rows) or same-position (mask rows) logits, [R, V], from the one head."""
        return self.kernels.linear(hidden_RE, self.head, None)
