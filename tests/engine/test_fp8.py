"""The promise with eight-bit weights: they are the same weights in every mode, so the tokens are the same, too."""

from __future__ import annotations

from engine.build import build_engine_core
from engine.config import EngineConfig
from engine.sampling_params import DecodingMode
from tests.engine.bundled import FOLDER, PLANS, answers, question_prompts, requests_for


def test_every_exact_mode_equals_ar() -> None:
    prompts = question_prompts()[::13]
    expected = answers(requests_for(prompts, 1.0, DecodingMode.AR), 1, 0, 1, dtype="float64", quantize_fp8=True)
    for place, (mode, num_branches) in enumerate(PLANS.values()):
        requests = requests_for(prompts, 1.0, mode)
        assert answers(requests, num_branches, place % 2, 16, dtype="float64", quantize_fp8=True) == expected, mode
    assert len(set(expected)) > 1


def test_the_engine_says_what_its_weights_are() -> None:
    core = build_engine_core(EngineConfig(str(FOLDER), dtype="float32", quantize_fp8=True))
    assert core.info.settings["weights"] == "fp8 (e4m3)"
    layer = core.runner.model.layers[0]
    assert layer.qkv.element_size() == layer.down.element_size() == 1
    assert "weights" not in build_engine_core(EngineConfig(str(FOLDER))).info.settings
