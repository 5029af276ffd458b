"""Rows of logits and sampling parameters for the CPU and the GPU tests, and comparisons with the reference on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from kernels.philox.reference import gumbel
from kernels.process_logits import reference as process_reference
from kernels.process_logits.metadata import GrammarRows, Needs, Penalties, RowSampling
from kernels.sampling import reference as sampling_reference

MASK = 7
INF = float("inf")


@dataclass(frozen=True)
class Row:
    """What one row asks for."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


MIXED = (
    Row(),
    Row(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9),
    Row(temperature=0.7, top_k=50, seed=-3),
    Row(top_k=1),
    Row(top_k=10**6, seed=2**62),
    Row(top_p=0.9, seed=12),
    Row(top_p=1e-9),
    Row(temperature=1.7, top_p=0.999, seed=-(2**63)),
    Row(min_p=0.05, seed=2**63 - 1),
    Row(min_p=1.0),
    Row(temperature=1.3, top_k=40, top_p=0.8, min_p=0.01, seed=99),
    Row(temperature=0.3, top_k=5, top_p=0.5),
)


def sampling_of(rows: tuple[Row, ...], device: torch.device, **more: object) -> RowSampling:
    """The parameters of these rows; ``more`` are fields of ``RowSampling`` beside the basic ones."""
    random = [row for row in rows if row.temperature]
    needs = Needs(
        noise=bool(random),
        top_k=any(row.top_k for row in random),
        top_p=any(row.top_p < 1 for row in random),
        min_p=any(row.min_p for row in random),
        penalties="penalties" in more,
        bias="bias" in more,
        min_tokens="banned" in more,
    )

    def column(name: str, dtype: torch.dtype) -> Tensor:
        # A batch without noise has none of these, as in the engine.
        return torch.tensor([getattr(row, name) for row in rows if random], dtype=dtype, device=device)

    whole, real = torch.long, torch.float64
    columns = (column("seed", whole), column("temperature", real), column("top_k", whole))
    return RowSampling(needs, *columns, column("top_p", real), column("min_p", real), **more)  # type: ignore[arg-type]


def random_logits(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers of a spread that a model's logits may have."""
    return (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3).to(device, dtype)


def extreme_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[12, V]: all equal, all but one or two forbidden, steps of equal logits, both zeros, and huge differences."""
    row = torch.arange(vocab_size)
    logits = torch.zeros(12, vocab_size)
    logits[1:4] = -INF
    logits[1, vocab_size - 1] = -5.0
    logits[2, [3, vocab_size // 2]] = 2.0
    logits[3, [3, 4, vocab_size - 2]] = torch.tensor([0.0, -0.0, -1.0])
    logits[4:6] = -(row // 3).float().clamp(max=200)
    logits[6] = torch.where(row % 2 == 0, 0.0, -0.0)
    logits[7] = torch.where(row == vocab_size - 1, 3e4, -3e4)
    logits[8:10] = torch.where(row % 5 == 0, -INF, -((row * 7919) % 64).float() / 8)
    logits[10:] = (row % 2).float()
    return logits.to(device, dtype)


def constraints(rows: int, vocab_size: int, device: torch.device) -> dict[str, dict[str, object]]:
    """Grammars, bans, biases and penalties that ``sampling_of`` takes, by name."""
    generator = torch.Generator().manual_seed(5)
    words = (vocab_size + 31) // 32
    mask = torch.randint(-(2**31), 2**31, (3, words), generator=generator).to(torch.int32)
    mask[2] = 0
    mask[2, 0] = 1 << 5  # one token alone
    grammar = GrammarRows(torch.tensor([rows - 2, 0, rows - 1], device=device), mask.to(device))
    ids = torch.randint(1, vocab_size, (rows, 6), generator=generator).to(device)
    ids[:, 0], ids[:, 4:] = 5, 0
    values = torch.tensor([-100.0, 3.25, -0.1, 7.0, 0.0, 0.0], dtype=torch.float64, device=device).expand(rows, -1)
    bans = torch.tensor([-INF, -INF, 0.0, -INF, 0.0, 0.0], dtype=torch.float64, device=device).expand(rows, -1)
    counts = torch.randint(-4, 4, (rows, vocab_size), generator=generator).clamp(min=0)

    def column(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(rows, generator=generator, dtype=torch.float64)).to(device)

    penalties = Penalties(
        (torch.rand(rows, vocab_size, generator=generator) < 0.2).to(device),
        counts.to(device, torch.int32),
        column(0.7, 1.6),
        column(-0.5, 1.0),
        column(-1.0, 0.5),
    )
    return {
        "grammar": {"grammar": grammar},
        "bias": {"bias": (ids, values)},
        "bans": {"banned": (ids, bans)},
        "penalties": {"penalties": penalties},
        # Of the last row nothing but a banned token is left, so the ban gives way.
        "all": {"grammar": grammar, "banned": (ids, bans), "bias": (ids, values), "penalties": penalties},
    }


def check_processing(module: ModuleType, logits: Tensor, sampling: RowSampling, mask_token_id: int | None = MASK) -> None:
    """The same tokens stay, with the same values.

    Sums of many small probabilities depend on their order: at the end of top-p tokens may differ that have less than 1e-6 of
    the probability together, far less than a token has in most rows.
    """
    before = logits.clone()
    expected = process_reference.process_logits(logits, sampling, mask_token_id)
    given = module.process_logits(logits, sampling, mask_token_id)
    assert torch.equal(logits, before), "the model's logits were changed"
    differs = (given > -INF) != (expected > -INF)
    without_top_p = replace(sampling, needs=replace(sampling.needs, top_p=False))
    whole = process_reference.process_logits(logits, without_top_p, mask_token_id)
    probs = torch.where(whole == -INF, 0.0, whole.double().softmax(dim=1))
    assert ((probs * differs).sum(dim=1) < 1e-6).all(), differs.sum(dim=1).tolist()
    assert not (differs & (probs == 0)).any()
    assert torch.equal(given[~differs], expected[~differs]), "processing is the same arithmetic"


def check_draws(module: ModuleType, logits: Tensor, sampling: RowSampling, draft_temperature: float | None = None) -> None:
    """Tokens are those of the reference (a tie of scores apart, which the logarithms' last bits may break), and probable."""
    num_rows, device = len(logits), logits.device
    place = torch.arange(num_rows - 1, -1, -1, device=device)
    position = torch.arange(num_rows, device=device) * 1001
    drawn = module.sample_drafts(logits, place, sampling, position, MASK, draft_temperature)
    processed = process_reference.process_logits(logits[place], sampling, MASK)
    check_tokens(drawn[0], processed, sampling, position, draft_temperature)
    expected = sampling_reference.probability_of(processed, drawn[0])
    torch.testing.assert_close(drawn[1], expected, atol=1e-6, rtol=1e-5)


def check_verifying_draws(module: ModuleType, logits: Tensor, sampling: RowSampling) -> None:
    """Verification draws what drafting draws, wherever a row's logits stand; one of them may stand in many places."""
    place = torch.arange(len(logits), device=logits.device) * 7 % (len(logits) - 1)
    position = torch.arange(len(logits), device=logits.device) + 10**5
    drafts = module.sample_drafts(logits, place, sampling, position, MASK, None)[0]
    unwanted = place.masked_fill(place == 1, -1)
    some, probs = module.sample_drafts(logits, unwanted, sampling, position, MASK, None)
    assert torch.equal(some[place != 1], drafts[place != 1])
    assert ((some >= 0) & (some < logits.shape[1]) & (probs >= 0)).all(), (
        "where nothing is wanted there is a token all the same"
    )
    assert torch.equal(module.sample_tokens(logits, place, sampling, position, MASK), drafts)
    assert torch.equal(module.sample_tokens(logits[place], None, sampling, position, MASK), drafts)


def check_tokens(
    tokens: Tensor, processed: Tensor, sampling: RowSampling, position: Tensor, draft_temperature: float | None
) -> None:
    """They have the best score there is."""
    assert tokens.dtype == torch.long
    scores = processed.double()
    if sampling.needs.noise and draft_temperature != 0:
        noise = gumbel(sampling.seed, position, processed.shape[1], torch.float32).double()
        temperature = sampling.temperature
        scale = temperature.new_ones(len(tokens)) if draft_temperature is None else draft_temperature / temperature
        scores += torch.where(temperature == 0, 0.0, scale)[:, None] * noise
        greedy = temperature == 0
    else:
        greedy = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    best = scores.argmax(dim=1)
    assert torch.equal(tokens[greedy], best[greedy]), "the first of the largest logits"
    taken = scores.gather(1, tokens[:, None]).squeeze(1)
    assert (taken >= scores.amax(dim=1) - 1e-4).all()
    assert (tokens != best).float().mean() < 0.01


def check_rows_are_alone(module: ModuleType, logits: Tensor, sampling: RowSampling) -> None:
    """A row has the same token and probability to the last bit when no other row is in the batch."""
    position = torch.arange(len(logits), device=logits.device) + 5
    together = module.sample_drafts(logits, None, sampling, position, None, None)
    for i in range(len(logits)):
        one = slice(i, i + 1)
        names = ("seed", "temperature", "top_k", "top_p", "min_p")
        alone = replace(sampling, **{name: getattr(sampling, name)[one] for name in names})
        given = module.sample_drafts(logits[one], None, alone, position[one], None, None)
        assert torch.equal(given[0], together[0][one])
        assert torch.equal(given[1], together[1][one])


def check_distribution(module: ModuleType, row: Row, device: torch.device, count: int) -> None:
    """Pearson's chi-square of samples of one distribution under different seeds and positions."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, 3.0, -3.0, 1.0], device=device)
    for by_seed in (True, False):
        number = torch.arange(count, device=device)
        sampling = replace(sampling_of((row,) * count, device), seed=number * by_seed)
        position = number * (not by_seed) + 17
        tokens = module.sample_tokens(logits.expand(count, -1), None, sampling, position, MASK).cpu()
        one = sampling_of((row,), device)
        probs = process_reference.process_logits(logits[None], one, MASK)[0].double().softmax(0).cpu()
        observed = tokens.bincount(minlength=len(probs))
        kept = probs > 0
        assert observed[~kept].sum() == 0
        expected = probs[kept] * count
        freedom = int(kept.sum()) - 1
        assert 6 <= freedom <= 8
        chi_square = ((observed[kept] - expected) ** 2 / expected).sum()
        assert float(chi_square) < (27.9 if freedom == 6 else 31.9), "1 in 10,000"
