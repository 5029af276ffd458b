"""Eight-bit weights, made while a checkpoint is loaded or stored in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import Quantization
from engine.models.hf_config import read_model_config
from engine.models.loader import ModelLoadError, load_model
from engine.models.places import named_tensors
from engine.models.transformer import Transformer
from kernels.linear.weight import FP8, quantize
from tests.engine.bundled import FOLDER, question_prompts
from tests.unit.engine.models.checkpoints import transformers_model
from tests.unit.engine.models.test_parity import ARCHITECTURES, our_logits

CPU = torch.device("cpu")
SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
            "output_activations": None,
        }
    },
}
"""What llm-compressor writes for FP8_DYNAMIC, without keys that say nothing here."""


def large_weights(tensors: dict[str, Tensor]) -> Iterator[str]:
    return (name for name in tensors if "_proj.weight" in name and not name.endswith("_scale"))


def load(folder: Path, *, at_load: bool = False) -> Transformer:
    config = read_model_config(folder)
    if at_load:
        config = replace(config, quantization=Quantization.AT_LOAD)
    return load_model(folder, config, torch.float32, CPU)


def store_quantized(folder: Path) -> None:
    """Turn a checkpoint into a compressed-tensors one."""
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    for name in [*large_weights(tensors)]:
        quantized = quantize(tensors[name])
        tensors |= {name: quantized.values, f"{name}_scale": quantized.scale[:, None].bfloat16()}
    save_file(tensors, file)
    write_scheme(folder, SCHEME)


def write_scheme(folder: Path, scheme: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))


def dequantized(folder: Path, quantized: Transformer) -> Transformer:
    """An unquantised model with the very weights that a quantised one computes with."""
    stored = load_file(folder / "model.safetensors")
    tensors = {name: t.float() for name, t in named_tensors(quantized).items() if not name.endswith("_scale")}
    for name in large_weights(stored):
        tensors[name] = tensors[name] * named_tensors(quantized)[f"{name}_scale"]
    model = Transformer(replace(quantized.config, quantization=Quantization.NONE)).requires_grad_(False)
    for name, place in named_tensors(model).items():
        place.copy_(tensors[name])
    return model


def assert_computes_with_its_weights(folder: Path, model: Transformer) -> None:
    token_ids = torch.randint(0, model.config.vocab_size, (23,), generator=torch.Generator().manual_seed(1))
    expected = our_logits(dequantized(folder, model), token_ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(model, token_ids), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "changes"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_weights_are_quantised_while_they_are_loaded(architecture: str, changes: dict[str, Any], tmp_path: Path):
    transformers_model(architecture, tmp_path, **copy.deepcopy(changes))
    stored, model = load_file(tmp_path / "model.safetensors"), load(tmp_path, at_load=True)
    places = named_tensors(model)
    for name in large_weights(stored):
        assert torch.equal(places[name].float(), quantize(stored[name]).values.float()), name
        assert torch.equal(places[f"{name}_scale"][:, 0], quantize(stored[name]).scale), name
    others = stored.keys() - {*large_weights(stored)}
    assert all(torch.equal(places[name], stored[name]) for name in others if name in places)
    assert model.head.dtype == model.embedding.dtype == torch.float32
    assert_computes_with_its_weights(tmp_path, model)


def test_a_compressed_tensors_checkpoint(tmp_path: Path):
    transformers_model("Qwen2ForCausalLM", tmp_path)
    store_quantized(tmp_path)
    assert read_model_config(tmp_path).quantization is Quantization.STORED
    model = load(tmp_path)
    assert model.layers[0].qkv.dtype == FP8
    stored = load_file(tmp_path / "model.safetensors")
    parts = [stored[f"model.layers.0.self_attn.{name}_proj.weight_scale"] for name in "qkv"]
    assert torch.equal(model.layers[0].qkv_scale, torch.cat(parts)[:, 0].float())
    assert_computes_with_its_weights(tmp_path, model)


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ModelLoadError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_that_do_not_fit_the_scheme(tmp_path: Path):
    transformers_model("LlamaForCausalLM", tmp_path)
    store_quantized(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].float()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(FP8)
    save_file(tensors, file)
    message = error_of(lambda: load(tmp_path))
    assert "1 missing (model.layers.0.mlp.up_proj.weight_scale)" in message
    assert "2 of an unsupported type (lm_head.weight is F8_E4M3, model.layers.0.mlp.down_proj.weight is F32)" in message


def changed(**changes: Any) -> dict[str, Any]:
    """The scheme with other values: of the one group where they belong there, else at the top."""
    scheme = copy.deepcopy(SCHEME)
    group = scheme["config_groups"]["group_0"]
    for key, value in changes.items():
        place = next((d for d in (group["weights"], group["input_activations"], group) if key in d), scheme)
        place[key] = value
    return scheme


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("fp8", "quantization_config is not an object"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method is 'fp8'"),
        ({"quant_method": "compressed-tensors"}, "it has no config_groups"),
        (changed(format="pack-quantized"), "group_0 has the format 'pack-quantized'"),
        (changed(kv_cache_scheme={"num_bits": 8}), "it quantises the KV cache"),
        (changed(sparsity_config={"format": "sparse-24-bitmask"}), "its weights are sparse"),
        (changed(num_bits=4), "group_0 has weights with num_bits 4, not 8"),
        (changed(type="int"), "group_0 has weights with type 'int', not 'float'"),
        (changed(strategy="block"), "group_0 has weights with strategy 'block', not 'channel'"),
        (changed(strategy="tensor"), "group_0 has weights with strategy 'tensor', not 'channel'"),
        (changed(symmetric=False), "group_0 has weights with dynamic or asymmetric scales"),
        (changed(targets=["re:.*mlp.*"]), "group_0 is for ['re:.*mlp.*'], not ['Linear']"),
        (changed(input_activations={"num_bits": 8, "dynamic": False}), "group_0 has static scales of activations"),
        (changed(output_activations={"num_bits": 8}), "group_0 quantises outputs"),
    ],
)
def test_other_schemes_are_refused(scheme: Any, message: str, checkpoint: Path):
    write_scheme(checkpoint, scheme)
    error = error_of(lambda: read_model_config(checkpoint))
    assert f"config.json: this quantisation is not supported ({message}" in error
    assert "with --quantization fp8" in error


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "dynamic": True}])
def test_activations_are_not_quantised_whatever_the_checkpoint_would_allow(inputs: Any, checkpoint: Path):
    write_scheme(checkpoint, changed(input_activations=inputs))
    assert read_model_config(checkpoint).quantization is Quantization.STORED


def test_the_logits_of_the_bundled_model_hardly_move():
    """About 2% in the mean square were measured; a scale that belongs to another channel would give 100%."""
    config = read_model_config(FOLDER)
    plain, quantized = (
        load_model(FOLDER, replace(config, quantization=quantization), torch.float32, CPU)
        for quantization in (Quantization.NONE, Quantization.AT_LOAD)
    )
    for prompt in question_prompts()[:5]:
        token_ids = torch.tensor(prompt)
        expected = our_logits(plain, token_ids)
        error = (our_logits(quantized, token_ids) - expected).norm() / expected.norm()
        assert 0.001 < error < 0.04
