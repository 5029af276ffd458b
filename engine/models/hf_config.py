"""Reads a Hugging Face checkpoint's ``config.json`` and ``generation_config.json``; weights are ``engine.models.loader``'s.

The files are read as plain JSON, with the meaning that Transformers gives them, also to what they leave out. What the
model definition cannot compute exactly is refused with a ModelLoadError of one line, never approximated.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import DraftAnchor, LoraConfig, ModelConfig, RopeConfig, RopeKind, TensorNames, TidarConfig
from engine.messages import SamplingDefaults
from engine.models.fp8_checkpoint import stored_quantization
from engine.models.loader import ADAPTER_CONFIG, DRAFT_LORA_FOLDER, ModelLoadError, read_json
from engine.sampling_params import SamplingParams


class _Window(enum.Enum):
    """Which key of ``config.json`` decides about sliding-window attention."""

    NEVER = enum.auto()
    SLIDING_WINDOW = enum.auto()
    USE_SLIDING_WINDOW = enum.auto()


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What distinguishes an architecture from the others, as switches of the one model definition.

    ``attention_bias`` and ``mlp_bias``: the config key of that name is honoured. The first puts biases on q, k, v and the
    output projection. ``query_scale``: queries may be scaled by position. ``block_diffusion``: it drafts, and says how in keys
    of its own instead of a ``tidar`` section. ``defaults``: what Transformers assumes for keys that a file leaves out, where
    not the same for all; ``rope``: the same for a file without RoPE. ``required``: keys for which nothing is assumed.

    ``text``: the model is one part of several, described by ``text_config``, and is the architecture that stands here for
    the ``model_type`` there. ``names`` are then those of the whole.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    query_scale: bool = False
    block_diffusion: bool = False
    window: _Window = _Window.NEVER
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    text: Mapping[str, str] = field(default_factory=dict)
    names: TensorNames = field(default_factory=TensorNames)


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture(
        attention_bias=True,
        mlp_bias=True,
        defaults={"eos_token_id": 2},
    ),
    "MistralForCausalLM": _Architecture(
        window=_Window.SLIDING_WINDOW,
        defaults={"eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Ministral3ForCausalLM": _Architecture(
        query_scale=True,
        window=_Window.SLIDING_WINDOW,
        defaults={"eos_token_id": 2, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5},
        rope={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "Mistral3ForConditionalGeneration": _Architecture(
        text={"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
        names=TensorNames(
            "language_model.model.", "language_model.lm_head.weight", ignored=("vision_tower.", "multi_modal_projector.")
        ),
    ),
    "NemotronLabsDiffusionModel": _Architecture(
        query_scale=True,
        block_diffusion=True,
        window=_Window.SLIDING_WINDOW,
        defaults={"eos_token_id": 11, "rms_norm_eps": 1e-5},
        required=("rope_parameters",),
        names=TensorNames("encoder.", "diffusion_head.weight"),
    ),
    "Qwen2ForCausalLM": _Architecture(
        qkv_bias=True,
        window=_Window.USE_SLIDING_WINDOW,
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "Qwen3ForCausalLM": _Architecture(
        qk_norm=True,
        attention_bias=True,
        window=_Window.USE_SLIDING_WINDOW,
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
}


class _Section:
    """A JSON object whose values are read with their types; every error names the file and the key. null means absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.optional_integer(key, minimum)
        value = default if value is None else value
        if value is None:
            raise self.missing(key)
        return value

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        value = self.values.get(key)
        if value is not None and (type(value) is not int or value < minimum):
            raise self.error(key, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.optional_number(key)
        value = default if value is None else value
        if value is None:
            raise self.missing(key)
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is not None and type(value) not in (int, float):
            raise self.error(key, "a number")
        return None if value is None else float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if not value > 0:
            raise self.error(key, "a number above 0")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.error(key, "true or false")
        return default if value is None else value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A set of ids, written as one integer or a list; in the file's order, without repetition."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def error(self, key: str, expected: str) -> ModelLoadError:
        return ModelLoadError(f"{self.source}: {key} must be {expected}, got {self.values.get(key)!r}")

    def missing(self, key: str) -> ModelLoadError:
        return ModelLoadError(f"{self.source} lacks {key}: check that it belongs to this model")


def read_model_config(folder: Path) -> ModelConfig:
    """Return the model's shape. Raises ModelLoadError for a broken file or a model that is not supported."""
    file = folder / "config.json"
    raw = read_json(file)
    name, architecture = _architecture(raw, str(file))
    if architecture.text:
        raw, architecture = _text_part(raw, architecture, str(file))
    config = _Section({**architecture.defaults, **raw}, str(file))
    _refuse_unsupported(config, architecture)
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    attention_bias = architecture.attention_bias and config.flag("attention_bias")
    generation = _generation_config(folder)
    model = ModelConfig(
        architecture=name,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=config.integer("head_dim", hidden_size // num_heads),
        intermediate_size=config.integer("intermediate_size"),
        max_position=config.integer("max_position_embeddings"),
        rms_norm_eps=config.positive("rms_norm_eps", 1e-6),
        rope=_rope(config, architecture),
        qkv_bias=architecture.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=architecture.mlp_bias and config.flag("mlp_bias"),
        qk_norm=architecture.qk_norm,
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(architecture.window, config),
        tidar=_block_diffusion(config, folder) if architecture.block_diffusion else _tidar(config),
        eos_token_ids=generation.token_ids("eos_token_id") or config.token_ids("eos_token_id"),
        tensor_names=architecture.names,
        quantization=stored_quantization(config.values.get("quantization_config"), config.source),
    )
    _check_heads(model, config)
    return model


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Return the sampling that ``generation_config.json`` asks for; without one, the whole distribution at temperature 1.

    ``do_sample: false`` without a temperature means greedy. Raises ModelLoadError for values out of range.
    """
    generation = _generation_config(folder)
    sampling = SamplingDefaults(
        temperature=generation.number("temperature", 1.0 if generation.flag("do_sample", default=True) else 0.0),
        top_p=generation.number("top_p", 1.0),
        top_k=generation.integer("top_k", 0, minimum=0),
        min_p=generation.number("min_p", 0.0),
        repetition_penalty=generation.number("repetition_penalty", 1.0),
    )
    try:
        SamplingParams(1, **dataclasses.asdict(sampling))
    except ValueError as error:
        raise ModelLoadError(f"{generation.source}: {error}") from error
    return sampling


def _generation_config(folder: Path) -> _Section:
    file = folder / "generation_config.json"
    return _Section(read_json(file) if file.exists() else {}, str(file))


def _architecture(raw: Mapping[str, Any], source: str) -> tuple[str, _Architecture]:
    names = raw.get("architectures")
    names = names if isinstance(names, list) else []
    for name in names:
        if name in _ARCHITECTURES:
            return name, _ARCHITECTURES[name]
    found = f"the architecture {', '.join(map(str, names))} is not supported" if names else "names no architecture"
    raise ModelLoadError(f"{source}: {found}; supported: {', '.join(_ARCHITECTURES)}")


def _text_part(raw: Mapping[str, Any], whole: _Architecture, source: str) -> tuple[dict[str, Any], _Architecture]:
    """The keys and the architecture of the language model in a model that has other parts. Its own keys go first."""
    text = raw.get("text_config")
    text = text if isinstance(text, dict) else {}
    kind = str(text.get("model_type"))
    if kind not in whole.text:
        supported = ", ".join(whole.text)
        raise ModelLoadError(f"{source}: a text_config of model_type {kind!r} is not supported; supported: {supported}")
    return {**raw, **text}, replace(_ARCHITECTURES[whole.text[kind]], names=whole.names)


def _refuse_unsupported(config: _Section, architecture: _Architecture) -> None:
    for key in architecture.required:
        if config.values.get(key) is None:
            raise config.missing(key)
    activation = config.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"{config.source}: hidden_act {activation!r} is not supported, only silu: use another model")


def _check_heads(model: ModelConfig, config: _Section) -> None:
    if model.num_heads % model.num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {model.num_heads}")
    if model.head_dim < 2 or model.head_dim % 2:
        raise ModelLoadError(f"{config.source}: head_dim must be even for rotary positions, got {model.head_dim}")


def _sliding_window(window: _Window, config: _Section) -> int | None:
    """Positions that a token sees, itself included; None: all.

    Qwen's later layers may slide while the earlier ones do not. The window stands for the whole model then, since the
    model is exact, with every layer seeing everything, only up to that length.
    """
    if window is _Window.NEVER:
        return None
    if window is _Window.USE_SLIDING_WINDOW:
        if not config.flag("use_sliding_window"):
            return None
        layer_types = config.values.get("layer_types")
        if isinstance(layer_types, list):
            slides = "sliding_attention" in layer_types
        else:
            slides = config.integer("max_window_layers", minimum=0) < config.integer("num_hidden_layers")
        if not slides:
            return None
    return config.optional_integer("sliding_window")


def _tidar(config: _Section) -> TidarConfig | None:
    values = config.values.get("tidar")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise config.error("tidar", 'an object such as {"block_length": 8, "mask_token_id": 7, "prediction": "same_position"}')
    section = _Section(values, f"{config.source}, tidar")
    if values.get("prediction") != "same_position":
        raise section.error("prediction", "'same_position'")
    return TidarConfig(section.integer("block_length"), _mask_token_id(section, config))


def _block_diffusion(config: _Section, folder: Path) -> TidarConfig | None:
    """How a Nemotron-Labs-Diffusion checkpoint drafts.

    A block of its drafter is the certain token and ``block_size - 1`` masks, all of which see each other, so there is a copy
    of the anchor. ``dlm_paradigm`` names the attention of a training run; only an autoregressive one has not learnt to draft.
    """
    if config.values.get("dlm_paradigm") == "autoregressive":
        return None
    masks = config.integer("block_size", 32, minimum=2) - 1
    return TidarConfig(masks, _mask_token_id(config, config, 100), DraftAnchor.COPY, _draft_lora(folder / DRAFT_LORA_FOLDER))


def _mask_token_id(section: _Section, config: _Section, default: int | None = None) -> int:
    mask_token_id, vocab_size = section.integer("mask_token_id", default, minimum=0), config.integer("vocab_size")
    if mask_token_id >= vocab_size:
        raise section.error("mask_token_id", f"below vocab_size, {vocab_size}")
    return mask_token_id


def _draft_lora(folder: Path) -> LoraConfig | None:
    """The size of the adapter in a folder; None when there is no folder. The loader checks what it is an adapter of."""
    if not folder.is_dir():
        return None
    file = folder / ADAPTER_CONFIG
    adapter = _Section(read_json(file), str(file))
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if adapter.values.get(key):
            raise adapter.error(key, "absent (only a plain LoRA is supported)")
    rank = adapter.integer("r")
    return LoraConfig(rank, adapter.positive("lora_alpha") / rank)


def _rope(config: _Section, architecture: _Architecture) -> RopeConfig:
    """The rotary embedding, from ``rope_theta`` and ``rope_scaling`` or from the ``rope_parameters`` that replaced them."""
    values = config.values.get("rope_scaling") or config.values.get("rope_parameters") or architecture.rope
    if not isinstance(values, Mapping) or any(isinstance(value, dict) for value in values.values()):
        raise config.error("rope_parameters", "one object for all layers")
    partial = {"partial_rotary_factor": config.values.get("partial_rotary_factor")}
    rope = _Section({"rope_theta": config.values.get("rope_theta"), **partial, **values}, f"{config.source}, RoPE")
    name = values.get("rope_type") or values.get("type") or RopeKind.DEFAULT.value
    if name not in [kind.value for kind in RopeKind]:
        supported = ", ".join(kind.value for kind in RopeKind)
        raise ModelLoadError(f"{rope.source}: the type {name!r} is not supported; supported: {supported}")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "1 (a head that is rotated in part is not supported)")
    if rope.values.get("llama_4_scaling_beta") is not None and not architecture.query_scale:
        raise rope.error("llama_4_scaling_beta", "absent (this architecture does not scale its queries)")
    theta = rope.number("rope_theta", 10_000.0)
    if theta <= 1:
        raise rope.error("rope_theta", "above 1")
    scaled, beta = _scaled_rope(RopeKind(name), theta, rope, config), rope.number("llama_4_scaling_beta", 0.0)
    if beta == 0.0:
        return scaled
    original = scaled.original_max_position or rope.integer("original_max_position_embeddings")
    return replace(scaled, original_max_position=original, query_scale_beta=beta)


def _scaled_rope(kind: RopeKind, theta: float, rope: _Section, config: _Section) -> RopeConfig:
    if kind is RopeKind.DEFAULT:
        return RopeConfig(kind, theta)
    if kind is RopeKind.LINEAR:
        return RopeConfig(kind, theta, factor=rope.positive("factor"))
    max_position = config.integer("max_position_embeddings")
    inside = rope.integer("original_max_position_embeddings", max_position)
    # Where a file has it in both places, Transformers takes the outer one.
    original = config.integer("original_max_position_embeddings", inside)
    if kind is RopeKind.LLAMA3:
        low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"above low_freq_factor, {low}")
        factor = rope.positive("factor")
        return RopeConfig(kind, theta, factor, original_max_position=original, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        kind,
        theta,
        factor=rope.positive("factor", max_position / original),
        original_max_position=original,
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        truncate=rope.flag("truncate", default=True),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
    )
