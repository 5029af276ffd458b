"""Raw log-probabilities: the model's own distribution, before any processing, at the rows that verify or compute a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.input_batch import HostColumns
from engine.messages import TokenLogprobs
from engine.step import StepPlan
from engine.upload import upload
from kernels.step_rows.metadata import StepLayout

ROWS_AT_ONCE = 256
"""Bounds the memory of a long prompt over a large vocabulary."""


class Logprobs(NamedTuple):
    """Of Q rows: the tokens [Q, 1 + K], the row's own before the K likeliest, their values, and the rank from 1 of its own."""

    token_ids: Tensor
    logprobs: Tensor
    rank_Q: Tensor

    def rows(self) -> Iterator[TokenLogprobs]:
        """The rows as plain data, of tensors on the host."""
        for (token, *tokens), (logprob, *values), rank in zip(*(tensor.tolist() for tensor in self), strict=True):
            yield TokenLogprobs(token, logprob, rank, tuple(zip(tokens, values, strict=True)))


def raw_logprobs(logits_QV: Tensor, token_Q: Tensor, num_top: int) -> Logprobs:
    """Log-softmax of the raw logits at ``token`` and at the ``num_top`` likeliest tokens."""
    parts = [
        _raw_logprobs(logits, token, num_top)
        for logits, token in zip(logits_QV.split(ROWS_AT_ONCE), token_Q.split(ROWS_AT_ONCE), strict=True)
    ]
    return Logprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _raw_logprobs(logits_QV: Tensor, token_Q: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits_QV.dtype, torch.float32)
    values, token_Q1 = logits_QV.to(dtype).log_softmax(dim=-1), token_Q[:, None]
    logprob_Q1 = values.gather(1, token_Q1)
    rank = (values > logprob_Q1).sum(dim=1) + 1
    top, tokens = values.topk(min(num_top, values.shape[1]), dim=1)
    return torch.cat((token_Q1, tokens), dim=1), torch.cat((logprob_Q1, top), dim=1), rank


def verified_logprobs(
    host: HostColumns, plan: StepPlan, layout: StepLayout, logits_QV: Tensor, sampled_ND: Tensor
) -> Logprobs | None:
    """Of every verifying row of the requests that want them, request by request.

    The step may have been laid out for more requests, drafts and branches than the plan has, as a captured one is.
    """
    asked_N = host.num_logprobs_S[plan.slots]
    wanting = np.flatnonzero(asked_N >= 0).tolist()
    rows = [layout.verify_starts[i] + draft for i in wanting for draft in range(plan.num_drafts[i])]
    if not rows:
        return None
    rows_Q = upload(rows, logits_QV.device)
    tokens_Q = sampled_ND[layout.verify_request_D[rows_Q], layout.verify_index_D[rows_Q]]
    return raw_logprobs(logits_QV[rows_Q], tokens_Q, int(asked_N.max()))


def prompt_logprobs(host: HostColumns, plan: StepPlan, layout: StepLayout, logits_QV: Tensor) -> Logprobs | None:
    """Of the prompt tokens that follow this step's prefill rows, for the requests that want them."""
    if not len(plan.prompt_targets):
        return None
    most = int(host.num_prompt_logprobs_S[plan.slots].max())
    return raw_logprobs(logits_QV[layout.prompt_logits :], upload(plan.prompt_targets, logits_QV.device), most)
