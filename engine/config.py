"""Frozen configuration: resolved once at start-up, never changed afterwards."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.sampling_params import DecodingMode

PAGE_SIZE = 64
"""Tokens in one KV page, unless a test asks for another size."""


class ConfigError(Exception):
    """The configuration cannot work; the message is one line that says what to change."""


class RopeKind(enum.Enum):
    """How rotary frequencies are derived; the names are those of Hugging Face's ``rope_type``."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields that a kind does not use stay at their defaults.

    ``query_scale_beta`` above 0: rotated queries are scaled by ``1 + beta * ln(1 + floor(position / original_max_position))``.
    """

    kind: RopeKind = RopeKind.DEFAULT
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    query_scale_beta: float = 0.0


class DraftAnchor(enum.Enum):
    """What stands at the position of draft ``i`` for the masks of branch ``i``.

    CLEAN: the draft's own causal row. COPY: one more row of the branch with the same token and position, which sees the
    prefix, drafts ``0..i-1`` and the branch's masks, and is seen by them instead of the clean row; its K/V is never kept.
    """

    CLEAN = "clean"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A low-rank update of every layer's attention output projection ``W``: draft rows use ``W + scale * B A``."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class TidarConfig:
    """How a checkpoint drafts. ``block_length`` is the number of masks in a branch, an anchor's copy not counted."""

    block_length: int
    mask_token_id: int
    anchor: DraftAnchor = DraftAnchor.CLEAN
    draft_lora: LoraConfig | None = None


class Quantization(enum.Enum):
    """The four large weights of a layer: as the checkpoint has them, made e4m3 while it is loaded, or stored as e4m3.

    e4m3 weights have a scale for each output channel (``kernels.linear.weight``). Embedding and head stay as they are.
    """

    NONE = "none"
    AT_LOAD = "at load"
    STORED = "stored"


@dataclass(frozen=True, slots=True)
class TensorNames:
    """A checkpoint's names: what stands before ``embed_tokens``, ``layers`` and ``norm``, and what the head is called.

    Tensors that begin with one of ``ignored`` belong to parts that are not served, such as a vision tower.
    """

    body: str = "model."
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer; ``tidar`` is None for a plain autoregressive checkpoint."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    tidar: TidarConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    tensor_names: TensorNames = field(default_factory=TensorNames)
    quantization: Quantization = Quantization.NONE

    @property
    def kv_bytes_per_token_factor(self) -> int:
        """Elements of K and V that one token keeps over all layers; times the element size gives bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache. ``num_pages`` None: sized from free memory, on a CPU from ``max_num_seqs`` as well."""

    page_size: int = PAGE_SIZE
    num_pages: int | None = None
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue.

    ``async_depth`` 1 launches a step before the host has read the one before; None: 1 on a GPU, 0 on a CPU.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1_000_000
    async_depth: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """The configured draft plan. ``mode`` is what ``auto`` means in a request.

    ``block_length`` None: the checkpoint's own. ``num_branches`` None: all of them. The other four are those of
    ``engine.decode.tidar.DecoderSettings``.
    """

    mode: DecodingMode = DecodingMode.TIDAR
    block_length: int | None = None
    num_branches: int | None = 1
    trust_ar: float = 1.0
    draft_temperature: float | None = None
    diffusion_threshold: float = 0.9
    synthetic_acceptance: float | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine process needs. ``model`` is a folder or Hub id; ``max_model_len`` None: what the checkpoint allows.

    ``kernels`` is ``auto``, ``reference`` (plain torch) or ``triton``. ``tokenizer`` is the folder whose vocabulary grammars
    speak of; None: the model's. ``enforce_eager``: no step is captured in a CUDA graph;
    None: with the reference kernels alone, whose attention would read the whole context in every captured step.
    ``cost_cache``: the folder that keeps what a start has measured: costs of draft plans, choices of linear layers, kernels
    that have passed their check; None: the user's cache folder on a GPU, none on a CPU.
    ``quantize_fp8``: weights become e4m3 while they are loaded, unless the checkpoint has them so.
    ``batch_invariant``: a request's logits have the same bits in every exact mode, alone and in any batch.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    quantize_fp8: bool = False
    batch_invariant: bool = False
    device: str = "auto"
    max_model_len: int | None = None
    num_threads: int | None = None
    kernels: str = "auto"
    enforce_eager: bool | None = None
    cost_cache: str | None = None
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
