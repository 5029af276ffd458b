"""Sampling parameters of rows of logits, as plain tensors.

Shape suffixes: Q rows, V vocabulary, W entries of the longest list, C rows under a grammar, M words of a grammar mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """Which parts of sampling a batch needs at all; known on the host, so that a plain greedy batch pays for none of them."""

    noise: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    min_tokens: bool = False


@dataclass(frozen=True, slots=True)
class GrammarRows:
    """The rows that a grammar constrains, [C], and their masks, [C, M] int32 words."""

    rows_C: Tensor
    mask_CM: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Counts of the tokens said before each row, [Q, V], and the three penalties, [Q] each."""

    in_prompt_QV: Tensor
    output_QV: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of Q rows, one entry a row; what no row needs is None, or empty for a greedy batch.

    ``seed`` and ``top_k`` (0: off) are int64, the others float64. A row of ``temperature`` 0 is greedy and truncates nothing.
    ``banned`` and ``bias`` are token ids [Q, W] and what is added to their logits, padded with zeros for token 0.
    """

    needs: Needs
    seed: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    grammar: GrammarRows | None = None
    banned: tuple[Tensor, Tensor] | None = None
    bias: tuple[Tensor, Tensor] | None = None
    penalties: Penalties | None = None
