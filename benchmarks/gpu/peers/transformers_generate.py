"""Transformers' ``generate`` with a static cache and a compiled forward."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.peers.base import Peer, main, transformers_config


def build(peer: Peer) -> Any:
    """The model with random weights, made on its device."""
    from transformers import AutoModelForCausalLM

    with torch.device(peer.device):
        model = AutoModelForCausalLM.from_config(transformers_config(peer.config), dtype=peer.dtype)
    return model.eval()


@torch.no_grad()
def measure(peer: Peer) -> dict[str, Any]:
    """Greedy, one request. The cache has the size of the longest output from the start, so that nothing is compiled twice."""
    import transformers

    model = build(peer)
    ids = torch.tensor([peer.prompt()], device=peer.device)

    def generate(count: int) -> None:
        config = transformers.GenerationConfig(
            max_new_tokens=count, do_sample=False, cache_implementation="static", eos_token_id=None, pad_token_id=0
        )
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return {"tokens_per_second": peer.rate(generate), "version": transformers.__version__}


if __name__ == "__main__":
    main(measure)
