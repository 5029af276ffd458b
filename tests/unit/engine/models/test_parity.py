"""A loaded model computes what Transformers computes from the same folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.hf_config import read_model_config
from engine.models.loader import load_model
from engine.models.transformer import Transformer
from tests.unit.engine.models.checkpoints import transformers_model

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
ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 4}),
    "qwen3_bias": ("Qwen3ForCausalLM", {"head_dim": 8, "attention_bias": True}),
    "llama": ("LlamaForCausalLM", {}),
    "llama_bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
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
    theirs = transformers_model(architecture, tmp_path, tie_word_embeddings=tied, **changes)
    ours = assert_same_logits(theirs, tmp_path)
    assert (ours.lm_head is None) == tied
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
def test_rope_kinds(rope: dict[str, Any], tmp_path: Path):
    theirs = transformers_model("LlamaForCausalLM", tmp_path, head_dim=16, rope_parameters=dict(rope))
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
