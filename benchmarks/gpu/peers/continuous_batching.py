"""Transformers' continuous batching: its own paged cache, scheduler and CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.peers.base import AbsentError, Peer, main
from benchmarks.gpu.peers.transformers_generate import build


@torch.no_grad()
def measure(peer: Peer) -> dict[str, Any]:
    """Greedy, one request. One manager serves all calls, the longest of which comes first and sets its sizes."""
    import transformers

    if peer.is_dry:
        raise AbsentError("continuous batching needs a GPU")
    model = build(peer)

    def generate(count: int) -> None:
        config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch([peer.prompt()], generation_config=config, persistent_manager=True)
        made = [len(output.generated_tokens) for output in found.values()]
        assert made == [count], f"{made} tokens came instead of {count}"

    try:
        return {"tokens_per_second": peer.rate(generate), "version": transformers.__version__}
    finally:
        model.destroy_cached_continuous_batching_manager()


if __name__ == "__main__":
    main(measure)
