"""What a configuration asks for, against the machine and the checkpoint: resolved, or refused with what to do instead.

Everything here raises ConfigError.
"""

from __future__ import annotations

import torch

from engine.config import ConfigError, DecodeConfig, EngineConfig, ModelConfig
from engine.sampling_params import DecodingMode


def resolve_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch finds no CUDA GPU: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} was asked for, but the last GPU is cuda:{torch.cuda.device_count() - 1}")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    return device


def resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of the longest request: what is asked for, within what the checkpoint can do."""
    limit = min(model.max_position, model.sliding_window or model.max_position)
    wanted = config.max_model_len
    if wanted is None:
        return limit
    if wanted < 2:
        raise ConfigError(f"max_model_len must be at least 2, got {wanted}")
    if wanted > limit:
        reason = "its sliding window" if limit == model.sliding_window else "the positions it was trained for"
        raise ConfigError(f"max_model_len {wanted} is beyond what this checkpoint can serve ({limit}, {reason}): lower it")
    return wanted


def resolve_block_length(config: EngineConfig, model: ModelConfig) -> int | None:
    """Drafts of a block; None where the checkpoint cannot draft."""
    wanted = config.decode.block_length
    if model.tidar is None:
        if config.decode.mode not in (DecodingMode.AUTO, DecodingMode.AR):
            raise ConfigError(
                f"decoding {config.decode.mode.value!r} needs a TiDAR checkpoint, and this one has no 'tidar' section in its "
                "config.json: use --decoding ar"
            )
        return None
    if wanted is not None and not 2 <= wanted <= model.tidar.block_length:
        raise ConfigError(
            f"block_length {wanted} is not between 2 and {model.tidar.block_length}, the length this checkpoint was trained "
            "with"
        )
    return wanted or model.tidar.block_length


def check(config: EngineConfig, block_length: int | None) -> None:
    """Raise ConfigError for numbers that do not go together."""
    limits, branches = config.scheduler, config.decode.num_branches
    if limits.max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs must be at least 1, got {limits.max_num_seqs}")
    if limits.max_num_batched_tokens < limits.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({limits.max_num_batched_tokens}) must be at least max_num_seqs ({limits.max_num_seqs}), "
            "so that every running request gets a row"
        )
    if limits.async_depth not in (None, 0, 1):
        raise ConfigError(f"async_depth must be 0 or 1, got {limits.async_depth}")
    if config.cache.page_size < 1:
        raise ConfigError(f"page_size must be at least 1, got {config.cache.page_size}")
    if branches is not None and block_length is not None and not 1 <= branches <= block_length:
        raise ConfigError(f"num_branches {branches} is not between 1 and the block length {block_length}; use 'all' for all")
    if config.decode.mode is DecodingMode.DIFFUSION and block_length and limits.max_num_batched_tokens < 2 * block_length:
        raise ConfigError(
            f"max_num_batched_tokens ({limits.max_num_batched_tokens}) must be at least two blocks ({2 * block_length}) for "
            "decoding by diffusion"
        )
    _check_decode(config.decode, block_length)


def _check_decode(decode: DecodeConfig, block_length: int | None) -> None:
    if not 0.0 <= decode.trust_ar <= 1.0:
        raise ConfigError(f"trust_ar must be between 0 and 1, got {decode.trust_ar}")
    if decode.trust_ar < 1.0 and block_length is not None and decode.num_branches not in (None, block_length):
        raise ConfigError("trust_ar below 1 reads every branch: set num_branches to 'all'")
    if decode.draft_temperature is not None and not 0.0 <= decode.draft_temperature <= 2.0:
        raise ConfigError(f"draft_temperature must be between 0 and 2, got {decode.draft_temperature}")
    if not 0.0 <= decode.diffusion_threshold <= 1.0:
        raise ConfigError(f"diffusion_threshold must be between 0 and 1, got {decode.diffusion_threshold}")
