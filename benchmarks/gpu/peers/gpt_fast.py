"""gpt-fast: plain PyTorch, compiled, with CUDA graphs. Its own architecture (Llama's) in the shape of ours, in bfloat16."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.gpu.peers.base import Peer, main


@torch.no_grad()
def measure(peer: Peer) -> dict[str, Any]:
    """One request at the settings of its own benchmark: temperature 0.8, top-k 200, the decode step compiled."""
    peer.find("gpt-fast")
    generation, definition = importlib.import_module("generate"), importlib.import_module("model")
    c = peer.config
    arguments = definition.ModelArgs(
        block_size=8192,
        vocab_size=c.vocab_size,
        n_layer=c.num_layers,
        n_head=c.num_heads,
        dim=c.hidden_size,
        intermediate_size=c.intermediate_size,
        n_local_heads=c.num_kv_heads,
        rope_base=c.rope.theta,
        norm_eps=c.rms_norm_eps,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(peer.dtype)
    with torch.device(peer.device):
        model = definition.Transformer(arguments).eval()
    torch.set_default_dtype(before)
    if not peer.is_dry:
        generation.decode_one_token = torch.compile(generation.decode_one_token, mode="reduce-overhead", fullgraph=True)
    prompt = torch.tensor(peer.prompt(), dtype=torch.int, device=peer.device)

    def generate(count: int) -> None:
        made, _ = generation.generate(
            model,
            prompt,
            count,
            batch_size=1,
            interactive=False,
            draft_model=None,
            temperature=0.8,
            top_k=min(200, c.vocab_size),
        )
        assert made.shape[-1] == len(prompt) + count

    return {"tokens_per_second": peer.rate(generate)}


if __name__ == "__main__":
    main(measure)
