"""The inference engine. The server uses the names of this module and no others; importing it loads neither torch nor models."""

from engine.async_engine import Engine, EngineDeadError, QueueFullError
from engine.config import CacheConfig, DecodeConfig, EngineConfig, SchedulerConfig
from engine.messages import (
    AbortRequest,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    RequestOutput,
    RequestTimes,
    SamplingDefaults,
    SpeculationStats,
)
from engine.process import AsyncEngine
from engine.sampling_params import DecodingMode, SamplingParams, choice_seed

__all__ = [
    "AbortRequest",
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
    "QueueFullError",
    "RequestOutput",
    "RequestTimes",
    "SamplingDefaults",
    "SamplingParams",
    "SchedulerConfig",
    "SpeculationStats",
    "choice_seed",
]
