"""Nemotron-Labs-Diffusion checkpoints, against an oracle that is written out in ``nemotron``."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import DraftAnchor, LoraConfig, RopeConfig, RopeKind, TidarConfig
from engine.models.hf_config import read_model_config
from engine.models.loader import ModelLoadError, load_model
from engine.models.places import adapter_tensors, named_tensors
from engine.models.transformer import Transformer
from tests.unit.engine.models.nemotron import (
    ADAPTER,
    ROPE,
    Checkpoint,
    Row,
    autoregressive,
    branch_rows,
    clean_rows,
    forward,
    self_speculation,
    tiny_checkpoint,
    visibility,
    write,
)

LENGTH = 40
"""Tokens of a prompt, more than twice the original context."""

MASKS = 5


def load(folder: Path) -> Transformer:
    model = load_model(folder, read_model_config(folder), torch.float32, torch.device("cpu"))
    model.build_rope(64)
    return model


def tokens_of(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def step_rows(checkpoint: Checkpoint, copied: bool) -> list[Row]:
    """A whole step: a prefix, three drafts and two branches."""
    drafts = clean_rows(tokens_of(LENGTH))[-3:]
    branches = [branch_rows(checkpoint, drafts[i], MASKS, copied) for i in (0, 2)]
    return clean_rows(tokens_of(LENGTH)) + branches[0] + branches[1]


def dense_attention(visible_RR: Tensor) -> Callable[..., Tensor]:
    def attention(layer: int, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor) -> Tensor:
        group = q_RHD.shape[1] // k_RGD.shape[1]
        q, k, v = (t.transpose(0, 1) for t in (q_RHD, k_RGD.repeat_interleave(group, 1), v_RGD.repeat_interleave(group, 1)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible_RR).transpose(0, 1)

    return attention


@torch.no_grad()
def our_logits(model: Transformer, rows: list[Row], copied: bool, draft_rows: Tensor | None = None) -> Tensor:
    token_ids, positions = (torch.tensor([getattr(row, name) for row in rows]) for name in ("token", "position"))
    return model.logits(model(token_ids, positions, dense_attention(visibility(rows, copied)), draft_rows))


def drafts_of(rows: list[Row]) -> Tensor:
    return torch.tensor([i for i, row in enumerate(rows) if row.anchor is not None])


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1, "logits this flat would hide a defect"
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-5)


ROPES = {
    "published": ROPE,
    "base": ROPE | {"factor": 0.25},
    "mscale": ROPE | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "betas": ROPE | {"beta_fast": 8.0, "beta_slow": 2.0, "llama_4_scaling_beta": 0.5},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_the_oracle_s_causal_rows_are_those_of_ministral_3(rope: dict[str, Any]):
    checkpoint = tiny_checkpoint(rope_parameters=rope)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    config = transformers.Ministral3Config(**{key: checkpoint.config[key] for key in keys}, rope_parameters=dict(rope))
    theirs = transformers.Ministral3ForCausalLM(config).eval()
    renamed = {n.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): t for n, t in checkpoint.tensors.items()}
    theirs.load_state_dict(renamed)
    rows = clean_rows(tokens_of(LENGTH))
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens_of(LENGTH)])).logits[0]
    assert_close(logits, forward(checkpoint, rows, visibility(rows, copied=False)))


@pytest.mark.parametrize("lora", [False, True], ids=["no_lora", "lora"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_causal_rows(tmp_path: Path, rope: dict[str, Any], lora: bool):
    checkpoint = tiny_checkpoint(lora=lora, rope_parameters=rope)
    rows = clean_rows(tokens_of(LENGTH))
    expected = forward(checkpoint, rows, visibility(rows, copied=False))
    assert_close(our_logits(load(write(checkpoint, tmp_path)), rows, copied=False), expected)


@pytest.mark.parametrize("lora", [False, True], ids=["no_lora", "lora"])
@pytest.mark.parametrize("copied", [False, True], ids=["clean", "copy"])
def test_a_step_with_branches(tmp_path: Path, copied: bool, lora: bool):
    checkpoint = tiny_checkpoint(lora=lora)
    rows = step_rows(checkpoint, copied)
    expected = forward(checkpoint, rows, visibility(rows, copied))
    assert_close(our_logits(load(write(checkpoint, tmp_path)), rows, copied, drafts_of(rows)), expected)


def test_a_copied_anchor_gives_the_drafting_pass_in_a_step_that_also_verifies(tmp_path: Path):
    checkpoint = tiny_checkpoint(lora=True)
    *context, anchor = clean_rows(tokens_of(LENGTH))
    branch = branch_rows(checkpoint, anchor, MASKS, copied=True)
    alone = context + branch
    expected = forward(checkpoint, alone, visibility(alone, copied=True))[-MASKS:]
    step = [*context, anchor, *clean_rows(tokens_of(LENGTH + 3))[LENGTH:], *branch]
    ours = our_logits(load(write(checkpoint, tmp_path)), step, True, drafts_of(step))
    assert_close(ours[-MASKS:], expected)


def test_layout_and_lora_are_no_small_matter():
    """The comparisons above could not pass by accident: each moves logits by far more than their tolerance."""
    lora = tiny_checkpoint(lora=True)
    plain = replace(lora, lora={})
    copied = step_rows(plain, copied=True)
    clean = [row for row in copied if row.anchor != row.position]

    def masks(checkpoint: Checkpoint, rows: list[Row], with_copy: bool) -> Tensor:
        return forward(checkpoint, rows, visibility(rows, with_copy))[-MASKS:]

    variants = masks(plain, clean, False), masks(plain, copied, True), masks(lora, copied, True)
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(variants, 2))


def test_clean_rows_do_not_feel_the_lora_by_a_bit(tmp_path: Path):
    checkpoint = tiny_checkpoint(lora=True)
    rows = step_rows(checkpoint, copied=True)
    draft_rows = drafts_of(rows)
    model = load(write(checkpoint, tmp_path))
    on, off = our_logits(model, rows, True, draft_rows), our_logits(model, rows, True)
    assert torch.equal(on[:LENGTH], off[:LENGTH])
    assert (on[LENGTH:] - off[LENGTH:]).abs().max() > 0.1
    assert torch.equal(our_logits(model, rows, True, draft_rows[:0]), off)


@pytest.mark.parametrize(("dtype", "shards"), [(torch.bfloat16, 1), (torch.float16, 3), (torch.float32, 2)])
def test_stored_types_and_shards(tmp_path: Path, dtype: torch.dtype, shards: int):
    checkpoint = tiny_checkpoint(lora=True)
    model = load(write(checkpoint, tmp_path, dtype, shards))
    tensors, adapter = named_tensors(model), adapter_tensors(model)
    assert tensors.keys() == checkpoint.tensors.keys()
    assert adapter.keys() == checkpoint.lora.keys()
    stored = checkpoint.tensors | checkpoint.lora
    assert all(torch.equal(place, stored[name].to(dtype).float()) for name, place in (tensors | adapter).items())


def test_what_the_config_says(tmp_path: Path):
    config = read_model_config(write(tiny_checkpoint(), tmp_path))
    assert config.architecture == "NemotronLabsDiffusionModel"
    assert config.tidar == TidarConfig(block_length=31, mask_token_id=100, anchor=DraftAnchor.COPY)
    assert config.rope == RopeConfig(
        RopeKind.YARN,
        theta=1000.0,
        factor=16.0,
        original_max_position=16,
        mscale=1.0,
        mscale_all_dim=1.0,
        query_scale_beta=0.1,
    )
    assert (config.max_position, config.sliding_window, config.eos_token_ids) == (256, None, (11,))
    assert not any((config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings))


def test_the_draft_lora_is_part_of_the_config(tmp_path: Path):
    config = read_model_config(write(tiny_checkpoint(lora=True), tmp_path))
    assert config.tidar is not None
    assert config.tidar.draft_lora == LoraConfig(rank=4, scale=1.5)
    # Another layout of the draft is one changed field.
    one_pass = replace(config, tidar=replace(config.tidar, anchor=DraftAnchor.CLEAN))
    assert adapter_tensors(load_model(tmp_path, one_pass, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize(
    ("changes", "tidar"),
    [
        ({"mask_token_id": None}, TidarConfig(31, 100, DraftAnchor.COPY)),
        ({"mask_token_id": 7}, TidarConfig(31, 7, DraftAnchor.COPY)),
        ({"block_size": 8, "dlm_paradigm": "block_diff"}, TidarConfig(7, 100, DraftAnchor.COPY)),
        ({"dlm_paradigm": "autoregressive"}, None),
    ],
)
def test_draft_keys(tmp_path: Path, changes: dict[str, Any], tidar: TidarConfig | None):
    assert read_model_config(write(tiny_checkpoint(**changes), tmp_path)).tidar == tidar


def error_of(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 128}, "config.json: mask_token_id must be below vocab_size, 128, got 128"),
        ({"block_size": 1}, "config.json: block_size must be an integer of at least 2, got 1"),
        ({"rope_parameters": None}, "config.json lacks rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "this quantisation is not supported (quant_method is None)"),
    ],
)
def test_a_bad_config(tmp_path: Path, changes: dict[str, Any], message: str):
    (tmp_path / "config.json").write_text(json.dumps(tiny_checkpoint().config | changes))
    assert message in error_of(tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path):
    checkpoint = tiny_checkpoint()
    del checkpoint.tensors["diffusion_head.weight"], checkpoint.tensors["encoder.layers.1.mlp.up_proj.weight"]
    checkpoint.tensors["lm_head.weight"] = torch.zeros(128, 24)
    checkpoint.tensors["encoder.norm.weight"] = torch.zeros(8)
    message = error_of(write(checkpoint, tmp_path))
    assert "2 missing (diffusion_head.weight, encoder.layers.1.mlp.up_proj.weight)" in message
    assert "1 unknown to NemotronLabsDiffusionModel (lm_head.weight)" in message
    assert "1 of another shape (encoder.norm.weight is [8], config.json says [24])" in message


def test_adapter_tensors_that_do_not_fit(tmp_path: Path):
    checkpoint = tiny_checkpoint(lora=True)
    prefix = "base_model.model.encoder.layers.{}.self_attn.{}_proj.lora_{}.weight"
    del checkpoint.lora[prefix.format(1, "o", "A")]
    checkpoint.lora[prefix.format(0, "q", "A")] = torch.zeros(4, 24)
    checkpoint.lora[prefix.format(0, "o", "B")] = torch.zeros(24, 8)
    message = error_of(write(checkpoint, tmp_path))
    assert f"the tensors in {tmp_path}/linear_spec_lora do not fit its adapter_config.json: " in message
    assert f"1 missing ({prefix.format(1, 'o', 'A')})" in message
    assert f"1 unknown to NemotronLabsDiffusionModel ({prefix.format(0, 'q', 'A')})" in message
    assert f"({prefix.format(0, 'o', 'B')} is [24, 8], adapter_config.json says [24, 4])" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "adapter_config.json: r must be an integer of at least 1, got 0"),
        ({"lora_alpha": None}, "adapter_config.json lacks lora_alpha"),
        ({"use_rslora": True}, "use_rslora must be absent (only a plain LoRA is supported), got True"),
        ({"alpha_pattern": {"o_proj": 8}}, "alpha_pattern must be absent"),
    ],
)
def test_a_bad_adapter_config(tmp_path: Path, change: dict[str, Any], message: str):
    folder = write(tiny_checkpoint(lora=True), tmp_path) / "linear_spec_lora"
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | change))
    assert message in error_of(tmp_path)


def test_an_adapter_without_its_files(tmp_path: Path):
    folder = write(tiny_checkpoint(lora=True), tmp_path) / "linear_spec_lora"
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    assert f"{folder} has no adapter_model.safetensors: download it again, or remove the folder" in error_of(tmp_path)
    save_file(tensors, folder / "adapter_model.safetensors")
    load(tmp_path)
    (folder / "adapter_config.json").unlink()
    assert f"{folder} has no adapter_config.json" in error_of(tmp_path)


@pytest.mark.parametrize("lora", [False, True], ids=["no_lora", "lora"])
@pytest.mark.parametrize("shared", [0.0, 1.0, 3.0])
def test_self_speculation_emits_what_plain_decoding_does(shared: float, lora: bool):
    """A check of the oracle itself."""
    checkpoint, prompt = tiny_checkpoint(lora=lora, shared=shared), tokens_of(9)
    expected = autoregressive(checkpoint, prompt, 24)
    for block_size in (2, 5):
        rounds = self_speculation(checkpoint, prompt, 24, block_size)
        assert [token for step in rounds for token in step.tokens] == expected
        for step in rounds[:-1]:
            assert step.tokens[:-1] == step.drafts[: step.accepted]
            assert step.tokens[-1:] != step.drafts[step.accepted : step.accepted + 1]


def test_self_speculation_accepts_nothing_all_and_what_is_between():
    models = [tiny_checkpoint(seed, lora=True, shared=1.0) for seed in (1, 3)]
    counts = {step.accepted for model in models for step in self_speculation(model, tokens_of(9), 24, 5)[1:]}
    assert counts == {0, 1, 2, 3, 4}
