"""Batch invariance of attention: one request's rows, computed in steps of every kind and in any company, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.cases import Case, Request, Shape, build

Attend = Callable[[Case], Tensor]


@dataclass(frozen=True)
class Text:
    """Queries, keys and values of one request by position: ``q`` [L, H, D], ``k`` and ``v`` [L, G, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def random(length: int, shape: Shape, dtype: torch.dtype, seed: int) -> Text:
        """Standard normal numbers."""
        random = torch.Generator().manual_seed(seed)
        heads = (shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads)
        return Text(*(torch.randn(length, n, shape.head_dim, generator=random).to(dtype) for n in heads))

    def put(self, case: Case, number: int) -> None:
        """Make it the content of a request: its prefix in the cache, its clean rows in the step."""
        request, page = case.requests[number], case.shape.page
        first, prefix, end = case.metadata.row_starts[number], request.prefix, request.prefix + request.num_clean
        position = torch.arange(prefix)
        places = case.metadata.block_table[number, position // page]
        case.k_cache[places, :, position % page] = self.k[:prefix]
        case.v_cache[places, :, position % page] = self.v[:prefix]
        rows = slice(first, first + request.num_clean)
        case.q[rows], case.k[rows], case.v[rows] = (t[prefix:end] for t in (self.q, self.k, self.v))


@dataclass(frozen=True)
class Dice:
    """Random steps."""

    random: torch.Generator

    @staticmethod
    def of(seed: int) -> Dice:
        """The same steps for the same seed."""
        return Dice(torch.Generator().manual_seed(seed))

    def pick(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def request(self, prefix: int, num_clean: int) -> Request:
        """A step of one request in which ``num_clean`` rows are prompt, drafts or padding drafts, behind ``prefix`` tokens."""
        drafts = self.pick(0, min(num_clean, 4))
        branches = torch.randperm(drafts, generator=self.random)[: self.pick(0, drafts)].tolist()
        padding = self.pick(0, num_clean - drafts) if drafts and self.pick(0, 1) else 0
        prefill = num_clean - drafts - padding
        return Request(prefix, prefill, drafts, tuple(branches), self.pick(1, 4), padding, self.pick(0, 2))

    def company(self) -> list[Request]:
        """Up to two other requests."""
        return [self.request(self.pick(0, 90), self.pick(1, 12)) for _ in range(self.pick(0, 2))]

    def cut(self, length: int) -> list[Request]:
        """Steps that compute positions of a text: alone, in a step of drafts and branches, in chunks, and all at once."""
        steps = [Request(length - 1, drafts=1), Request(self.pick(0, length - 1), drafts=1)]
        steps += [self.request(self.pick(0, length - 5), 5) for _ in range(3)]
        position = 0
        while position < length:
            size = min(self.pick(length // 4, length // 2), length - position)
            steps.append(self.request(position, size))
            position += size
        return [*steps, Request(0, prefill=length)]


def check_clean_rows(
    attends: Sequence[Attend], shape: Shape, dtype: torch.dtype, device: torch.device, length: int, seed: int
) -> None:
    """Cut a text of ``length`` tokens into steps, put each in random company, and compare every position's output.

    Step after step runs under the next of ``attends``, which may differ in what must not matter.
    """
    dice, text = Dice.of(seed), Text.random(length, shape, dtype, seed)
    seen: dict[int, Tensor] = {}
    for number, step in enumerate(dice.cut(length)):
        company = dice.company()
        place = dice.pick(0, len(company))
        case = build((*company[:place], step, *company[place:]), shape, dtype, seed=seed * 100 + number)
        text.put(case, place)
        out = attends[number % len(attends)](case.to(dtype, device)).cpu()
        for row in range(step.num_clean):
            position, mine = step.prefix + row, out[case.metadata.row_starts[place] + row]
            assert torch.equal(mine, seen.setdefault(position, mine)), f"position {position} in step {number}, {step}"
    assert len(seen) == length


def check_company(attend: Attend, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """All rows of a request, masks too, are the same alone and in company."""
    dice = Dice.of(seed)
    step = Request(dice.pick(0, 90), dice.pick(0, 20), 4, (2, 0, 3), 4)
    alone = build((step,), shape, dtype, seed)
    company = [dice.request(70, 20), *dice.company()]
    crowd = build((*company, step), shape, dtype, seed + 1)
    rows, page = slice(crowd.metadata.row_starts[-2], None), shape.page
    for name in ("q", "k", "v"):
        getattr(crowd, name)[rows] = getattr(alone, name)
    for position in range(0, step.prefix, page):
        mine, theirs = (int(c.metadata.block_table[-1, position // page]) for c in (alone, crowd))
        crowd.k_cache[theirs], crowd.v_cache[theirs] = alone.k_cache[mine], alone.v_cache[mine]
    assert torch.equal(attend(crowd.to(dtype, device))[rows], attend(alone.to(dtype, device)))
