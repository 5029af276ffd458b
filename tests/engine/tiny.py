"""Tiny random models in float64, one for each architecture's set of switches, and engines around them.

A random model hardly ever accepts a draft, because what a mask row says has nothing to do with what the causal row says. So
``shared`` mixes one common direction into all token embeddings: the larger it is, the more both readings agree, and the less
the output depends on the context. Models between the extremes accept drafts at every length and still depend on their context.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from engine.build import assemble
from engine.config import (
    CacheConfig,
    DecodeConfig,
    EngineConfig,
    ModelConfig,
    RopeConfig,
    RopeKind,
    SchedulerConfig,
    TidarConfig,
)
from engine.core import EngineCore
from engine.cuda_graphs import Capture
from engine.grammar import GrammarCompiler
from engine.memory import DeviceMemory
from engine.messages import SamplingDefaults
from engine.models.transformer import Transformer
from engine.sampling_params import DecodingMode
from tests.engine.vocabulary import EOS_TOKEN, MASK_TOKEN, TINY, VOCAB_SIZE, Language

MAX_MODEL_LEN = 64
BLOCK_LENGTH = 6

_BASE = ModelConfig(
    architecture="",
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    max_position=256,
    tidar=TidarConfig(BLOCK_LENGTH, MASK_TOKEN),
    eos_token_ids=(EOS_TOKEN,),
)
_LLAMA3 = RopeConfig(RopeKind.LLAMA3, theta=500.0, factor=4.0, original_max_position=32)

ARCHITECTURES: dict[str, ModelConfig] = {
    "qwen2": replace(_BASE, architecture="Qwen2ForCausalLM", qkv_bias=True, tie_word_embeddings=True),
    "qwen3": replace(_BASE, architecture="Qwen3ForCausalLM", qk_norm=True, tie_word_embeddings=True),
    "llama": replace(_BASE, architecture="LlamaForCausalLM", num_kv_heads=4, rope=_LLAMA3, rms_norm_eps=1e-5),
    "mistral": replace(_BASE, architecture="MistralForCausalLM", num_kv_heads=1, rms_norm_eps=1e-5),
}

SHARED = (0.0, 1.0, 3.0)
"""How much the embeddings have in common: drafts are rarely, often and mostly accepted."""


@functools.lru_cache(maxsize=64)
def tiny_model(architecture: str, seed: int = 0, shared: float = 0.0, language: Language = TINY) -> Transformer:
    """A random model in float64. It is built once for its arguments; nothing may change it."""
    torch.manual_seed(seed)
    config = replace(
        ARCHITECTURES[architecture],
        vocab_size=language.vocab_size,
        tidar=TidarConfig(BLOCK_LENGTH, language.mask),
        eos_token_ids=(language.eos,),
    )
    model = Transformer(config).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.35)
    model.embedding.copy_(torch.randn_like(model.embedding) + shared * torch.randn(1, model.embedding.shape[1]))
    if model.lm_head is not None:
        nn.init.normal_(model.lm_head, std=0.6)
    else:
        # A tied head reads the embeddings: their size sets that of the logits, the norm after them undoes it at the input.
        model.embedding.mul_(0.6)
    model.build_rope(MAX_MODEL_LEN + 2 * BLOCK_LENGTH)
    return model


def tiny_engine(
    model: Transformer,
    *,
    page_size: int = 8,
    num_pages: int | None = None,
    prefix_caching: bool = True,
    max_num_seqs: int = 8,
    budget: int = 256,
    depth: int = 0,
    num_branches: int | None = 1,
    block_length: int | None = None,
    mode: DecodingMode = DecodingMode.TIDAR,
    capture: Capture | None = None,
    memory: DeviceMemory | None = None,
    grammars: GrammarCompiler | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    cost_cache: Path | None = None,
    **decode: float,
) -> EngineCore:
    """An engine around a model, assembled as the server's is; grammars are for the tiny vocabulary if nothing is said."""
    config = EngineConfig(
        "tiny",
        cache=CacheConfig(page_size, num_pages, prefix_caching),
        scheduler=SchedulerConfig(max_num_seqs, budget, async_depth=depth),
        decode=DecodeConfig(mode, block_length, num_branches, **decode),
        cost_cache=cost_cache and str(cost_cache),
    )
    compiler = grammars or TINY.compiler()
    return assemble(config, model, max_model_len, SamplingDefaults(), compiler, capture=capture, memory=memory)
