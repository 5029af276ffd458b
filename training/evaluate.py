"""Held-out report: both losses, and the tokens per forward that the full set of branches would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.transformer import Transformer
from training.objective import IGNORE, Example, hidden_states, make_batch


@dataclass(frozen=True, slots=True)
class Report:
    """Means over the held-out examples. ``tokens_per_forward`` and ``exact`` follow the reference answers (teacher forcing)."""

    next_token_loss: float
    same_position_loss: float
    next_token_accuracy: float
    tokens_per_forward: float
    exact: float

    def line(self) -> str:
        """One line for the log."""
        return (
            f"held-out loss next {self.next_token_loss:.3f} same {self.same_position_loss:.3f}  "
            f"accuracy {self.next_token_accuracy:.3f}  tokens/forward {self.tokens_per_forward:.2f}  exact {self.exact:.3f}"
        )


def steps_with_all_branches(next_token: Tensor, drafts: Tensor, answer_start: int) -> int:
    """Decode steps that ``tidar`` with every branch needs for one greedy answer.

    ``next_token`` [n]: the autoregressive choice after each token. ``drafts`` [n, k]: the choices of the block that starts at
    each position. Rows up to ``answer_start - 1`` are prompt. The first step is the redraft that ends the prompt.
    """
    length, block_length = drafts.shape
    computed, steps, held = answer_start - 1, 0, 1
    while computed < length - 1:
        accepted = 1
        while accepted < held and computed + accepted < length - 1:
            if drafts[computed, accepted] != next_token[computed + accepted - 1]:
                break
            accepted += 1
        computed, held, steps = computed + accepted, block_length, steps + 1
    return steps


@torch.no_grad()
def evaluate(model: Transformer, examples: Sequence[Example], block_length: int, mask_token_id: int) -> Report:
    """Run every example with one mask block at each answer position."""
    losses: dict[str, list[Tensor]] = {"next": [], "same": []}
    correct, tokens, steps, exact = 0, 0, 0, 0
    for example in examples:
        length, first = len(example.token_ids), example.answer_start
        starts = list(range(first, length))
        batch = make_batch([example], [starts], block_length, mask_token_id)
        logits = model.logits(hidden_states(model, batch)).float()
        targets = batch.targets.flatten()
        wanted = targets != IGNORE
        ce = torch.nn.functional.cross_entropy(logits[wanted], targets[wanted], reduction="none")
        clean = wanted.nonzero().squeeze(-1) < batch.num_clean
        losses["next"].append(ce[clean])
        losses["same"].append(ce[~clean])
        choice = logits.argmax(-1)
        next_token = choice[:length]
        right = next_token[first - 1 : -1] == targets[first - 1 : length - 1]
        drafts = torch.full((length, block_length), -1)
        drafts[first:] = choice[batch.num_clean :].view(-1, block_length)
        correct, tokens, exact = correct + int(right.sum()), tokens + length - first, exact + int(right.all())
        steps += steps_with_all_branches(next_token, drafts, first)
    return Report(
        float(torch.cat(losses["next"]).mean()),
        float(torch.cat(losses["same"]).mean()),
        correct / tokens,
        tokens / steps,
        exact / len(examples),
    )
