"""The training loop: resumable, bounded by steps or by minutes, with a progress bar and held-out reports."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.models.transformer import Transformer
from training.data import Conversations, draw_batch
from training.evaluate import evaluate
from training.muon import Muon
from training.objective import Example, block_starts, loss, make_batch


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A run ends after ``minutes`` of training time (resumptions add up) or after ``steps``, whichever comes first."""

    minutes: float = 60.0
    steps: int = 1_000_000
    rows: int = 48
    block_lengths: tuple[int, ...] = (4, 8, 8, 8)
    alpha: float = 1.0
    matrix_lr: float = 0.02
    other_lr: float = 0.003
    weight_decay: float = 0.02
    warmup: float = 0.02
    cooldown: float = 0.5
    gradient_clip: float = 1.0
    seed: int = 0
    report_every: int = 250
    save_every: int = 100


def init_weights(model: Transformer, seed: int) -> None:
    """Normal initialisation at 0.02; the projections that write the residual start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() < 2 or name.endswith("qk_norm"):
            continue
        with torch.no_grad():
            if name.endswith(("output", "down")):
                p.zero_()
            else:
                p.normal_(std=0.02, generator=generator)


def schedule(progress: float, warmup: float, cooldown: float) -> float:
    """Learning-rate factor at a progress in [0, 1]: linear warm-up, plateau, linear fall to 2% over the last ``cooldown``."""
    if progress < warmup:
        return (progress + 0.001) / (warmup + 0.001)
    left = (1.0 - progress) / cooldown
    return max(0.02, min(1.0, left))


class Trainer:
    """Owns the optimisers, the random state and the checkpoint file of one run."""

    def __init__(
        self, model: Transformer, conversations: Conversations, held_out: Sequence[Example], config: TrainConfig, folder: Path
    ) -> None:
        self.model, self.conversations, self.held_out = model, conversations, held_out
        self.config, self.folder = config, folder
        assert model.config.tidar is not None, "training needs a model with a tidar section"
        self.tidar = model.config.tidar
        parameters = dict(model.named_parameters())
        matrices = [p for n, p in parameters.items() if n.startswith("layers") and p.dim() == 2 and not n.endswith("qk_norm")]
        others = [p for p in parameters.values() if all(p is not m for m in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay),
            torch.optim.AdamW(others, lr=config.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_lr = [config.matrix_lr, config.other_lr]
        self.rng = random.Random(config.seed)
        self.step, self.elapsed = 0, 0.0

    @property
    def device(self) -> torch.device:
        """Where the model is, and so where batches are made."""
        return self.model.embedding.device

    @property
    def state_file(self) -> Path:
        return self.folder / "state.pt"

    @property
    def progress(self) -> float:
        """Share of the budget that is used up."""
        return min(1.0, max(self.step / self.config.steps, self.elapsed / (60 * self.config.minutes)))

    def save(self) -> None:
        """Write the state atomically, so that a run which is cut off can go on."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.getstate(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        temporary = self.state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.state_file)

    def resume(self) -> bool:
        """Load the saved state if there is one; False if the run starts afresh."""
        if not self.state_file.exists():
            return False
        state = torch.load(self.state_file, weights_only=False, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        return True

    def train_step(self) -> dict[str, float]:
        """Draw a batch, take one optimiser step, return the losses."""
        config = self.config
        factor = schedule(self.progress, config.warmup, config.cooldown)
        for optimizer, lr in zip(self.optimizers, self.base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        examples = draw_batch(self.conversations, config.rows, self.rng)
        block_length = self.rng.choice(config.block_lengths)
        starts = [block_starts(e, block_length, self.rng) for e in examples]
        with self.device:
            batch = make_batch(examples, starts, block_length, self.tidar.mask_token_id)
        with _autocast(self.device):
            result = loss(self.model, batch, config.alpha)
        result.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"next": float(result.next_token.detach()), "same": float(result.same_position.detach())}

    def run(self) -> None:
        """Train until the budget is spent."""
        config = self.config
        bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}{postfix}", mininterval=2)
        while self.progress < 1.0:
            begun = time.monotonic()
            losses = self.train_step()
            self.step += 1
            self.elapsed += time.monotonic() - begun
            if not math.isfinite(losses["next"] + losses["same"]):
                raise RuntimeError(f"the loss is not finite at step {self.step}: lower the learning rates and resume")
            bar.n = round(100 * self.progress, 1)
            bar.set_postfix(step=self.step, **{k: f"{v:.3f}" for k, v in losses.items()})
            if self.step % config.report_every == 0:
                tqdm.write(f"step {self.step} ({self.elapsed / 60:.1f} min): {self.report()}")
            if self.step % config.save_every == 0:
                self.save()
        bar.close()
        self.save()
        print(f"done after {self.step} steps, {self.elapsed / 60:.1f} min: {self.report()}")

    def report(self) -> str:
        """Evaluate on the held-out examples."""
        with self.device:
            return evaluate(self.model, self.held_out, self.tidar.block_length, self.tidar.mask_token_id).line()


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Bfloat16 products where the processor has units for them: about twice as fast there, and slower elsewhere."""
    # A private name of torch: where a version lacks it, products stay as they are.
    cpu_has_units: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if device.type == "cuda" or (device.type == "cpu" and cpu_has_units()):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
