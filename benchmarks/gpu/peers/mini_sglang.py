"""mini-sglang with dummy weights: its own engine, scheduler and CUDA graphs, attention by FlashInfer."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bundled import MODEL
from benchmarks.gpu.peers.base import Peer, main, transformers_config


def measure(peer: Peer) -> dict[str, Any]:
    """Greedy, one request, straight through its offline interface."""
    peer.find("mini-sglang", "python")
    llm, core = importlib.import_module("minisgl.llm"), importlib.import_module("minisgl.core")
    folder = Path(tempfile.mkdtemp(prefix="shape-"))
    try:
        # A folder with a shape and any tokenizer: the weights are made up.
        (folder / "config.json").write_text(json.dumps(transformers_config(peer.config).to_dict()))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL / name, folder / name)
        server = llm.LLM(
            str(folder),
            dtype=peer.dtype,
            use_dummy_weight=True,
            attention_backend="fi",
            max_seq_len_override=4096,
            cuda_graph_max_bs=4,
            use_pynccl=False,
        )

        def generate(count: int) -> None:
            sampling = core.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count)
            made = server.generate([peer.prompt()], sampling)[0]["token_ids"]
            assert len(made) >= count - 1, f"{len(made)} tokens came instead of {count}"

        return {"tokens_per_second": peer.rate(generate)}
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(measure)
