"""A loaded model computes what Transformers computes from the same folder."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.models.transformer import Transformer
from tests.unit.engine.models.checkpoints import multimodal_model, transformers_model

CPU = torch.device("cpu")
LENGTH = 48
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 123456.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_untruncated": YARN | {"truncate": False},
    "yarn_attention_factor": YARN | {"attention_factor": 1.3},
    "yarn_mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn_mscale_equal": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn_betas": YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    "yarn_factor_below_one": YARN | {"factor": 0.25},
    "yarn_without_factor": YARN | {"factor": None},
}
QUERY_SCALE = {
    "published": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    "strong": YARN | {"llama_4_scaling_beta": 0.7},
    "off": YARN | {"llama_4_scaling_beta": 0.0},
    "without_yarn": {"rope_theta": 1e4, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.3},
}
ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 4}),
    "qwen3_yarn": ("Qwen3ForCausalLM", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3_bias": ("Qwen3ForCausalLM", {"head_dim": 8, "attention_bias": True}),
    "llama": ("LlamaForCausalLM", {}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama_bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral_yarn": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16, "rope_parameters": YARN}),
    "ministral3": ("Ministral3ForCausalLM", {"head_dim": 16, "rope_parameters": QUERY_SCALE["published"]}),
    "mistral_wide_window": ("MistralForCausalLM", {"sliding_window": 4096}),
}


def causal_attention(layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1) for t in (q_RHD, k_RGD, v_RGD))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@torch.no_grad()
def our_logits(model: Transformer, token_ids: Tensor) -> Tensor:
    model.build_rope(len(token_ids))
    return model.logits(model(token_ids, torch.arange(len(token_ids)), causal_attention))


@torch.no_grad()
def assert_same_logits(theirs: Any, folder: Path) -> Transformer:
    ours = load_model(folder, read_model_config(folder), torch.float32, CPU)
    token_ids = torch.randint(0, ours.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))
    expected = theirs(token_ids[None]).logits[0]
    assert expected.std() > 0.1, "logits this flat would hide a defect"
    torch.testing.assert_close(our_logits(ours, token_ids), expected, atol=1e-4, rtol=1e-5)
    return ours


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("architecture", "changes"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_architectures(architecture: str, changes: dict[str, Any], tied: bool, tmp_path: Path):
    theirs = transformers_model(architecture, tmp_path, tie_word_embeddings=tied, **copy.deepcopy(changes))
    ours = assert_same_logits(theirs, tmp_path)
    assert (ours.lm_head is None) == tied
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
def test_rope_kinds(rope: dict[str, Any], tmp_path: Path):
    theirs = transformers_model("LlamaForCausalLM", tmp_path, head_dim=16, rope_parameters=dict(rope))
    assert_same_logits(theirs, tmp_path)


@pytest.mark.parametrize("rope", QUERY_SCALE.values(), ids=QUERY_SCALE)
def test_scaled_queries(rope: dict[str, Any], tmp_path: Path):
    theirs = transformers_model("Ministral3ForCausalLM", tmp_path, head_dim=16, rope_parameters=dict(rope))
    ours = assert_same_logits(theirs, tmp_path)
    assert (ours.query_scale is not None) == (rope["llama_4_scaling_beta"] != 0)


def test_queries_are_scaled_from_the_original_context_on(tmp_path: Path):
    """The published numbers. Up to there nothing is multiplied at all."""
    transformers_model("Ministral3ForCausalLM", tmp_path, max_position_embeddings=262144)
    ours = load_model(tmp_path, read_model_config(tmp_path), torch.float32, CPU)
    ours.build_rope(16384)
    assert ours.query_scale is None
    ours.build_rope(16385)
    assert ours.query_scale is not None
    ours.build_rope(32769)
    expected = torch.tensor([1.0, 1.0, 1.0693147, 1.0693147, 1.1098612])
    torch.testing.assert_close(ours.query_scale[[0, 16383, 16384, 32767, 32768]], expected)


def test_a_ministral_that_leaves_out_what_has_a_default(tmp_path: Path):
    transformers_model("Ministral3ForCausalLM", tmp_path, head_dim=128, num_attention_heads=8, num_key_value_heads=8)
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "rms_norm_eps", "sliding_window", "eos_token_id"):
        del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["mistral_yarn", "ministral3"])
def test_the_language_model_of_a_multimodal_one(name: str, tied: bool, tmp_path: Path):
    architecture, changes = ARCHITECTURES[name]
    theirs = multimodal_model(architecture, tmp_path, "8KB", tie_word_embeddings=tied, **copy.deepcopy(changes))
    assert_same_logits(theirs, tmp_path)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 4), (4, 1, 4), (6, 2, 8), (3, 3, 10)])
def test_head_shapes(heads: int, kv_heads: int, head_dim: int, tmp_path: Path):
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    assert_same_logits(transformers_model("Qwen3ForCausalLM", tmp_path, **shape), tmp_path)


def test_shards(tmp_path: Path):
    theirs = transformers_model("Qwen3ForCausalLM", tmp_path, max_shard_size="4KB", head_dim=4)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_logits(theirs, tmp_path)


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
def test_rope_tables(rope: dict[str, Any], tmp_path: Path):
    """Tables far beyond the original context, and beyond ``max_position_embeddings``."""
    theirs = transformers_model("LlamaForCausalLM", tmp_path, head_dim=64, rope_parameters=dict(rope))
    ours = load_model(tmp_path, read_model_config(tmp_path), torch.float32, CPU)
    ours.build_rope(2048)
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), torch.arange(2048)[None])
    half = ours.config.head_dim // 2
    torch.testing.assert_close(ours.cos, cos[0], atol=2e-4, rtol=0)
    # Ours carries the sign of the half in which the rotation uses it.
    torch.testing.assert_close(torch.cat((-ours.sin[:, :half], ours.sin[:, half:]), dim=-1), sin[0], atol=2e-4, rtol=0)
