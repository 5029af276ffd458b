import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import RopeConfig, RopeKind, TensorNames, TidarConfig
from engine.messages import SamplingDefaults
from engine.models.hf_config import read_model_config, read_sampling_defaults
from engine.models.loader import ModelLoadError

WriteConfig = Callable[..., Path]
TIDAR = {"block_length": 8, "mask_token_id": 7, "prediction": "same_position"}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def write_generation_config(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def error_of(read: Callable[[Path], object], folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_minimal_config(write_config: WriteConfig):
    config = read_model_config(write_config())
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 4)
    assert config.rms_norm_eps == 1e-6
    assert config.rope == RopeConfig()
    assert not any((config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings))
    assert config.sliding_window is None
    assert config.tidar is None


@pytest.mark.parametrize("absent", [..., None])
def test_head_counts_and_sizes_that_are_left_out(write_config: WriteConfig, absent: Any):
    config = read_model_config(write_config(num_key_value_heads=absent, head_dim=absent))
    assert (config.num_kv_heads, config.head_dim) == (4, 4)


def test_keys_that_transformers_gives_another_default(write_config: WriteConfig):
    qwen3 = read_model_config(write_config(architectures=["Qwen3ForCausalLM"]))
    assert qwen3.head_dim == 128
    mistral = read_model_config(
        write_config(architectures=["MistralForCausalLM"], num_attention_heads=8, num_key_value_heads=...)
    )
    assert (mistral.num_kv_heads, mistral.sliding_window, mistral.eos_token_ids) == (8, 4096, (2,))


@pytest.mark.parametrize(
    ("architecture", "switches"),
    [
        ("Qwen2ForCausalLM", {"qkv_bias"}),
        ("Qwen3ForCausalLM", {"qk_norm", "qkv_bias", "output_bias"}),
        ("LlamaForCausalLM", {"qkv_bias", "output_bias", "mlp_bias"}),
        ("MistralForCausalLM", set()),
        ("Ministral3ForCausalLM", set()),
    ],
)
def test_only_an_architecture_s_own_switches_are_honoured(write_config: WriteConfig, architecture: str, switches: set[str]):
    config = read_model_config(write_config(architectures=[architecture], attention_bias=True, mlp_bias=True))
    assert {s for s in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm") if getattr(config, s)} == switches


@pytest.mark.parametrize(
    ("architecture", "keys", "window"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, None),
        ("MistralForCausalLM", {"sliding_window": 8}, 8),
        ("MistralForCausalLM", {"sliding_window": None}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 8}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": False}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("Qwen3ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
        ("Qwen3ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 8),
    ],
)
def test_sliding_window(write_config: WriteConfig, architecture: str, keys: dict[str, Any], window: int | None):
    assert read_model_config(write_config(architectures=[architecture], **keys)).sliding_window == window


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_both_forms_of_rope_give_the_same(write_config: WriteConfig, form: str):
    scaling = {"rope_type": "linear", "factor": 2}
    outer = {"rope_theta": 5e5, "rope_scaling": scaling}
    keys = outer if form == "rope_scaling" else {"rope_parameters": scaling | {"rope_theta": 5e5}}
    assert read_model_config(write_config(**keys)).rope == RopeConfig(RopeKind.LINEAR, 5e5, factor=2.0)


def test_llama3_rope(write_config: WriteConfig):
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    expected = RopeConfig(RopeKind.LLAMA3, 10_000.0, 8.0, original_max_position=16, low_freq_factor=1.0, high_freq_factor=4.0)
    inside = scaling | {"original_max_position_embeddings": 16}
    assert read_model_config(write_config(rope_scaling=inside)).rope == expected
    outside = {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    assert read_model_config(write_config(**outside)).rope == expected


def test_yarn_rope(write_config: WriteConfig):
    given = {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 1}
    rope = read_model_config(write_config(rope_scaling=YARN | given)).rope
    assert rope == RopeConfig(
        RopeKind.YARN,
        factor=4.0,
        original_max_position=16,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        attention_factor=1.5,
        mscale=0.5,
        mscale_all_dim=1.0,
    )


def test_yarn_factor_is_not_clamped_and_derived_when_absent(write_config: WriteConfig):
    assert read_model_config(write_config(rope_scaling=YARN | {"factor": 0.25})).rope.factor == 0.25
    assert read_model_config(write_config(rope_scaling=YARN | {"factor": None})).rope.factor == 4.0


def test_query_scale(write_config: WriteConfig):
    scaled = YARN | {"llama_4_scaling_beta": 0.1}
    rope = read_model_config(write_config(architectures=["Ministral3ForCausalLM"], rope_parameters=scaled)).rope
    assert rope == RopeConfig(RopeKind.YARN, factor=4.0, original_max_position=16, query_scale_beta=0.1)
    message = error_of(
        read_model_config, write_config(architectures=["Ministral3ForCausalLM"], rope_scaling={"llama_4_scaling_beta": 0.1})
    )
    assert "RoPE lacks original_max_position_embeddings" in message


TEXT = {"model_type": "ministral3", "vocab_size": 64, "hidden_size": 32, "rope_parameters": YARN}


def test_a_multimodal_config_is_its_text_part(write_config: WriteConfig):
    wrapper = {"architectures": ["Mistral3ForConditionalGeneration"], "tidar": TIDAR}
    config = read_model_config(write_config(**wrapper, text_config=TEXT))
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("Mistral3ForConditionalGeneration", 64, 32)
    assert (config.rope.kind, config.head_dim, config.tidar) == (RopeKind.YARN, 128, TidarConfig(8, 7))
    assert config.tensor_names == TensorNames(
        "language_model.model.", "language_model.lm_head.weight", ("vision_tower.", "multi_modal_projector.")
    )


@pytest.mark.parametrize(
    ("inner", "outer", "tied"),
    [(True, ..., True), (False, ..., False), (..., ..., False), (..., True, True), (True, False, True), (False, True, False)],
)
def test_whose_word_on_tied_embeddings_counts(write_config: WriteConfig, inner: Any, outer: Any, tied: bool):
    text = TEXT if inner is ... else TEXT | {"tie_word_embeddings": inner}
    folder = write_config(architectures=["Mistral3ForConditionalGeneration"], text_config=text, tie_word_embeddings=outer)
    assert read_model_config(folder).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": ...}, "a text_config of model_type 'None' is not supported; supported: mistral, ministral3"),
        ({"text_config": TEXT | {"model_type": "mistral4"}}, "a text_config of model_type 'mistral4' is not supported"),
        ({"text_config": TEXT, "quantization_config": {"quant_method": "fp8"}}, "this quantisation is not supported"),
    ],
)
def test_a_multimodal_config_that_is_refused(write_config: WriteConfig, change: dict[str, Any], message: str):
    keys = {"architectures": ["Mistral3ForConditionalGeneration"]} | change
    assert message in error_of(read_model_config, write_config(**keys))


def test_the_generation_config_s_eos_set_wins(write_config: WriteConfig):
    folder = write_config(eos_token_id=5)
    assert read_model_config(folder).eos_token_ids == (5,)
    write_generation_config(folder, temperature=0.5)
    assert read_model_config(folder).eos_token_ids == (5,)
    write_generation_config(folder, eos_token_id=[9, 3, 9])
    assert read_model_config(folder).eos_token_ids == (9, 3)
    write_generation_config(folder, eos_token_id=4)
    assert read_model_config(folder).eos_token_ids == (4,)


def test_tidar_section(write_config: WriteConfig):
    assert read_model_config(write_config(tidar=TIDAR)).tidar == TidarConfig(block_length=8, mask_token_id=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": 32}, "tidar: mask_token_id must be below vocab_size, 32, got 32"),
        ({"mask_token_id": -1}, "tidar: mask_token_id must be an integer of at least 0, got -1"),
        ({"mask_token_id": None}, "tidar lacks mask_token_id"),
        ({"block_length": 0}, "tidar: block_length must be an integer of at least 1, got 0"),
        ({"block_length": "8"}, "tidar: block_length must be an integer of at least 1, got '8'"),
        ({"block_length": None}, "tidar lacks block_length"),
        ({"prediction": "next_token"}, "tidar: prediction must be 'same_position', got 'next_token'"),
        ({"prediction": None}, "tidar: prediction must be 'same_position', got None"),
    ],
)
def test_a_bad_tidar_section(write_config: WriteConfig, change: dict[str, Any], message: str):
    assert message in error_of(read_model_config, write_config(tidar=TIDAR | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "the architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, ",
        ),
        (
            {"architectures": ...},
            "names no architecture; supported: LlamaForCausalLM, MistralForCausalLM, Ministral3ForCausalLM, ",
        ),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture; supported: "),
        ({"hidden_size": ...}, "config.json lacks hidden_size"),
        ({"vocab_size": "32"}, "vocab_size must be an integer of at least 1, got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer of at least 1, got True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_attention_heads, 4, got 3"),
        ({"head_dim": 5}, "head_dim must be even for rotary positions, got 5"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, "head_dim must be even for rotary positions, got 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0, got 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be a token id or a list of them, got ['</s>']"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
        ({"quantization_config": {"bits": 4}}, "this quantisation is not supported"),
        ({"tidar": 8}, "tidar must be an object such as"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            "the type 'dynamic' is not supported; supported: default, linear, ",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "RoPE: factor must be a number above 0, got 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1}}, "RoPE lacks high_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
            "RoPE: high_freq_factor must be above low_freq_factor, 4.0, got 4",
        ),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "RoPE: beta_fast must be a number above 0, got -1"),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "RoPE: llama_4_scaling_beta must be absent"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters must be one object for all layers"),
        ({"partial_rotary_factor": 0.5}, "RoPE: partial_rotary_factor must be 1"),
        ({"rope_theta": 1}, "RoPE: rope_theta must be above 1, got 1"),
    ],
)
def test_what_is_refused(write_config: WriteConfig, change: dict[str, Any], message: str):
    assert message in error_of(read_model_config, write_config(**change))


def test_files_that_are_missing_or_broken(tmp_path: Path, write_config: WriteConfig):
    assert f"{tmp_path} has no config.json: give a Hugging Face checkpoint folder" in error_of(read_model_config, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 32,\n}')
    assert "config.json is not readable as JSON (" in error_of(read_model_config, tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not readable as JSON (" in error_of(read_model_config, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json does not hold a JSON object" in error_of(read_model_config, tmp_path)
    write_config()
    (tmp_path / "generation_config.json").write_text("")
    assert "generation_config.json is not readable as JSON (" in error_of(read_model_config, tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, SamplingDefaults()),
        ({}, SamplingDefaults()),
        ({"temperature": None, "top_k": None}, SamplingDefaults()),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
            SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1),
        ),
        ({"do_sample": False}, SamplingDefaults(temperature=0.0)),
        ({"do_sample": False, "temperature": 0.7}, SamplingDefaults(temperature=0.7)),
        ({"do_sample": True}, SamplingDefaults()),
    ],
)
def test_sampling_defaults(tmp_path: Path, values: dict[str, Any] | None, expected: SamplingDefaults):
    if values is not None:
        write_generation_config(tmp_path, **values)
    assert read_sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "generation_config.json: temperature must be between 0 and 2, got -1.0"),
        ({"temperature": "hot"}, "generation_config.json: temperature must be a number, got 'hot'"),
        ({"top_p": 0}, "generation_config.json: top_p must be above 0 and at most 1, got 0.0"),
        ({"top_k": -1}, "generation_config.json: top_k must be an integer of at least 0, got -1"),
        ({"do_sample": 0}, "generation_config.json: do_sample must be true or false, got 0"),
    ],
)
def test_bad_sampling_defaults(tmp_path: Path, values: dict[str, Any], message: str):
    write_generation_config(tmp_path, **values)
    assert message in error_of(read_sampling_defaults, tmp_path)
