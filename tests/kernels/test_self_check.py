"""The check before Triton kernels serve: sound ones pass, and each kind of fault is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.config import ConfigError, DraftAnchor, EngineConfig, LoraConfig, ModelConfig, TidarConfig
from engine.self_check import Question, ask, choose_kernels, disagreement
from kernels.backend import REFERENCE, Kernels, triton_kernels
from tests.engine.tiny import ARCHITECTURES

CPU = torch.device("cpu")
CONFIG = replace(ARCHITECTURES["qwen3"], vocab_size=97, tidar=TidarConfig(4, 96))


def check(kernels: Kernels, config: ModelConfig = CONFIG, device: torch.device = CPU) -> str | None:
    return disagreement(kernels, config, torch.float32, device, 16)


def test_the_references_agree_with_themselves() -> None:
    assert check(REFERENCE) is None
    assert check(REFERENCE, replace(CONFIG, tidar=None)) is None
    copies = TidarConfig(4, 96, DraftAnchor.COPY, LoraConfig(rank=4, scale=2.0))
    assert check(REFERENCE, replace(CONFIG, tidar=copies)) is None
    assert disagreement(REFERENCE, CONFIG, torch.bfloat16, CPU, 16) is None


# Blocks of two: the fewest drafts with which steps of every kind are different, since the interpreter takes its time for each.
WIDE = replace(CONFIG, hidden_size=256, num_heads=8, head_dim=64, tidar=TidarConfig(2, 96))


@pytest.mark.parametrize(("config", "dtype", "page_size"), [(CONFIG, torch.float32, 16), (WIDE, torch.float16, 64)])
def test_the_triton_kernels_agree(config: ModelConfig, dtype: torch.dtype, page_size: int, device: torch.device) -> None:
    assert disagreement(triton_kernels(config.num_kv_heads), config, dtype, device, page_size) is None


def test_drafts_that_nobody_holds_may_be_anything() -> None:
    """A draw without a row to read is meaningless, and kernels need not agree on what it is."""

    def other_tokens(logits_RV, place_Q, *rest):
        tokens, chances = REFERENCE.sample_drafts(logits_RV, place_Q, *rest)
        missed.append(int((place_Q < 0).sum()))
        return tokens.where(place_Q >= 0, 5), chances.where(place_Q >= 0, 0.25)

    missed: list[int] = []
    for vocab_size in range(100, 160):
        small = replace(CONFIG, vocab_size=vocab_size, tidar=TidarConfig(8, 0))
        assert check(replace(REFERENCE, sample_drafts=other_tokens), small) is None
        if sum(missed) > 0:
            return
    raise AssertionError("every branch was hit: nothing was drawn without a row")


def scaled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return REFERENCE.rms_norm(x, weight, eps) * 1.001


def sees_one_key_too_many(metadata, *sizes):
    return REFERENCE.prepare_attention(replace(metadata, limit=metadata.limit + (metadata.limit == 2)), *sizes)


def off_by_one_in_the_last_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = REFERENCE.linear(x, weight, bias)
    out[-1] = out[-1].roll(1)
    return out


def another_mask_token(state, layout, bounds_3N, prefill, page_size, mask_token_id):
    return REFERENCE.lay_out(state, layout, bounds_3N, prefill, page_size, mask_token_id - 1)


def accepts_all(state, layout, requests, tokens_D, chance, observes):
    return REFERENCE.verify(state, layout, requests, tokens_D, 1.0, observes)


def counts_nothing(state, layout, requests, tokens_D, chance, observes):
    return REFERENCE.verify(state, layout, requests, tokens_D, chance, False)


def not_a_number(gate_up: Tensor) -> Tensor:
    return REFERENCE.swiglu(gate_up) * float("nan")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ({"rms_norm": scaled}, "times as far off"),
        ({"prepare_attention": sees_one_key_too_many}, "times as far off"),
        ({"linear": off_by_one_in_the_last_row}, "times as far off"),
        ({"swiglu": not_a_number}, "not finite"),
        ({"lay_out": another_mask_token}, "rows of a step differ"),
        ({"verify": accepts_all}, "another verdict"),
        ({"verify": counts_nothing}, "another state"),
    ],
)
def test_a_fault_is_found(fault: dict[str, Callable[..., object]], found: str) -> None:
    problem = check(replace(REFERENCE, **fault))
    assert problem is not None
    assert found in problem


def test_a_process_of_its_own_answers_whatever_becomes_of_it(tmp_path, monkeypatch) -> None:
    question = Question(CONFIG, torch.float32, CPU, 16, kernels="reference")
    assert ask(question) is None
    for name, program in {
        "crashes": "import os; os.abort()",
        "complains": "raise SystemExit('CUDA error: an illegal memory access')",
        "hangs": "import threading; threading.Event().wait()",
        "disagrees": "print('\"they differ\"')",
        "chatters": "print('hello')",
    }.items():
        (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    assert "status -6" in (ask(question, "crashes") or "")
    assert "illegal memory access" in (ask(question, "complains") or "")
    assert "not done after 1 s" in (ask(question, "hangs", 1.0) or "")
    assert ask(question, "disagrees") == "they differ"
    assert ask(question, "chatters") == "their check ended with status 0: hello"


def test_the_process_runs_this_source_whatever_the_working_directory_holds(tmp_path, monkeypatch) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise RuntimeError('another project')")
    monkeypatch.chdir(tmp_path)
    assert ask(Question(CONFIG, torch.float32, CPU, 16, kernels="reference")) is None


class GPU:
    """A device that says it is a GPU, of the capability that Triton's kernels need."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        self.said: list[str] = []
        self.answers: list[str | None] = []

    def choose(self, config: EngineConfig, dtype: torch.dtype = torch.bfloat16) -> Kernels:
        device = torch.device("cuda")
        return choose_kernels(config, device, dtype, CONFIG, self.said.append, lambda question: self.answers.pop(0))


def test_auto_on_a_gpu_is_triton_once_it_has_passed_and_that_is_kept(tmp_path, monkeypatch) -> None:
    gpu, config = GPU(monkeypatch), EngineConfig("model", cost_cache=str(tmp_path))
    gpu.answers = ["they differ", None]
    assert gpu.choose(config).name == "reference (they differ)"
    assert "they differ" in gpu.said[-1]
    assert gpu.choose(config).attends_by_length
    assert gpu.choose(config).attends_by_length
    assert gpu.answers == [], "asked once more after a fault, and not again after it has passed"


def test_without_the_means_for_triton_auto_is_the_reference_and_says_why(tmp_path, monkeypatch) -> None:
    config = EngineConfig("model", cost_cache=str(tmp_path))
    for gpu, dtype in ((GPU(monkeypatch), torch.float32), (GPU(monkeypatch, (7, 5)), torch.float16)):
        assert gpu.choose(config, dtype) is REFERENCE
        assert "Triton" in gpu.said[-1]
        with pytest.raises(ConfigError, match="Triton"):
            gpu.choose(replace(config, kernels="triton"), dtype)
        with pytest.raises(ConfigError, match="Triton"):
            gpu.choose(replace(config, batch_invariant=True), dtype)


def test_batch_invariance_is_refused_where_its_kernels_are_wrong(tmp_path, monkeypatch) -> None:
    gpu = GPU(monkeypatch)
    gpu.answers = ["they differ"]
    with pytest.raises(ConfigError, match="they differ"):
        gpu.choose(EngineConfig("model", cost_cache=str(tmp_path), batch_invariant=True))
