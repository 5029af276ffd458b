"""The inference engine. The server uses the names of this module and no others; importing it loads neither torch nor models."""

from engine.config import CacheConfig, DecodeConfig, EngineConfig, SchedulerConfig
from engine.interface import Engine, EngineDeadError, Outputs, QueueFullError
from engine.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    GrammarSpec,
    RequestOutput,
    RequestTimes,
    SamplingDefaults,
    SpeculationStats,
    Thinking,
    TokenLogprobs,
)
from engine.process import AsyncEngine
from engine.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    DecodingMode,
    SamplingParams,
    choice_seed,
)

__all__ = [
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "MAX_STOP_TOKEN_IDS",
    "AsyncEngine",
    "CacheConfig",
    "DecodeConfig",
    "DecodingMode",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "GenerateRequest",
    "GrammarSpec",
    "Outputs",
    "QueueFullError",
    "RequestOutput",
    "RequestTimes",
    "SamplingDefaults",
    "SamplingParams",
    "SchedulerConfig",
    "SpeculationStats",
    "Thinking",
    "TokenLogprobs",
    "choice_seed",
]
