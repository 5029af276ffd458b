"""From a request's fields to what the engine is asked: one choice after the other, checked before anything is sent."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request

from engine import DecodingMode, EngineInfo, SamplingParams, choice_seed
from server.config import ServerConfig
from server.errors import invalid, unsupported
from server.protocol import GenerationFields

MAX_STOP_CHARS = 1000


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One choice to generate; ``prompt_index`` tells which prompt of the request it answers."""

    prompt_index: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Everything that one client request asks of the engine."""

    choices: tuple[ChoicePlan, ...]
    decoding: DecodingMode
    stop: tuple[str, ...]
    skip_special_tokens: bool
    cache_salt: str


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How the answer is written."""

    model: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool


def answer_options(fields: GenerationFields, model: str) -> AnswerOptions:
    """Read the fields about the answer's form. Raises a 400 for stream options without a stream."""
    options = fields.stream_options
    if options is not None and not fields.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    include_usage = bool(options and options.include_usage)
    return AnswerOptions(
        model=model,
        stream=bool(fields.stream),
        include_usage=include_usage,
        continuous_usage=include_usage and bool(options and options.continuous_usage_stats),
        return_token_ids=bool(fields.return_token_ids),
    )


def num_choices(fields: GenerationFields, num_prompts: int, config: ServerConfig) -> int:
    """``n``, checked. Raises a 400 when prompts times choices are more than a request may have, or than fit an empty queue."""
    limit = min(config.max_choices, config.limits.max_num_seqs + config.limits.max_waiting_requests)
    n = 1 if fields.n is None else fields.n
    if n < 1:
        raise invalid(f"n must be at least 1, got {n}", "n")
    if n * num_prompts > limit:
        raise invalid(f"{n * num_prompts} choices are more than the {limit} that one request may ask for; send several", "n")
    return n


def plan_generation(
    fields: GenerationFields,
    prompts: Sequence[Sequence[int]],
    info: EngineInfo,
    config: ServerConfig,
    cache_salt: str,
) -> GenerationPlan:
    """Check everything and lay out the choices, those of the first prompt first. Raises a 400."""
    n = num_choices(fields, len(prompts), config)
    # Python's remainder is never negative, so -1 becomes 2**64 - 1.
    seed = secrets.randbits(64) if fields.seed is None else fields.seed % 2**64
    sampling = sampling_params(fields, info)
    choices: list[ChoicePlan] = []
    for prompt_index, prompt in enumerate(prompts):
        check_prompt(prompt, info)
        max_tokens = min(sampling.max_tokens, info.max_model_len - len(prompt))
        token_ids = tuple(prompt)
        for index in range(n):
            own = replace(sampling, max_tokens=max_tokens, seed=choice_seed(seed, index))
            choices.append(ChoicePlan(prompt_index, token_ids, own))
    check_queue_tokens(choices, config.limits.max_waiting_tokens)
    return GenerationPlan(
        choices=tuple(choices),
        decoding=decoding_mode(fields.decoding, info),
        stop=stop_strings(fields),
        skip_special_tokens=fields.skip_special_tokens is not False,
        cache_salt=cache_salt,
    )


def check_prompt(prompt: Sequence[int], info: EngineInfo) -> None:
    """Raise a 400 for a prompt that the engine cannot take."""
    if not prompt:
        raise invalid("the prompt is empty: send at least one token", "prompt")
    if len(prompt) >= info.max_model_len:
        raise invalid(
            f"the prompt has {len(prompt)} tokens, but the context of {info.max_model_len} tokens must hold it and one "
            "token of the answer at least; shorten it",
            code="context_length_exceeded",
        )
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        bad = next(i for i in prompt if not 0 <= i < info.vocab_size)
        raise invalid(f"the prompt has the token id {bad}, but ids go from 0 to {info.vocab_size - 1}", "prompt")
    if info.mask_token_id in prompt:
        raise invalid(f"the prompt has the mask token (id {info.mask_token_id}), which no text may use", "prompt")


def check_queue_tokens(choices: Sequence[ChoicePlan], limit: int) -> None:
    """Raise a 400 for choices that fill even an empty queue: as a 503, clients would retry it for ever.

    A choice alone is let in by the engine whatever its length.
    """
    num_tokens = sum(len(choice.prompt_token_ids) for choice in choices)
    if len(choices) > 1 and num_tokens > limit:
        raise invalid(
            f"{len(choices)} choices with {num_tokens} prompt tokens together are more than the {limit} tokens that may "
            "wait; send several requests",
            "n",
        )


def sampling_params(fields: GenerationFields, info: EngineInfo) -> SamplingParams:
    """The sampling of every choice, without its seed. Raises a 400.

    ``max_tokens`` is cut to each prompt's room later, since clients send one number for all models.
    """
    defaults = info.sampling_defaults
    wanted = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    top_k = defaults.top_k if fields.top_k is None else fields.top_k
    stop_token_ids = tuple(dict.fromkeys(fields.stop_token_ids or ()))
    if any(not 0 <= i < info.vocab_size for i in stop_token_ids):
        raise invalid(f"stop_token_ids must be from 0 to {info.vocab_size - 1}", "stop_token_ids")
    try:
        return SamplingParams(
            max_tokens=info.max_model_len if wanted is None else wanted,
            temperature=defaults.temperature if fields.temperature is None else fields.temperature,
            top_p=defaults.top_p if fields.top_p is None else fields.top_p,
            top_k=0 if top_k == -1 else top_k,
            min_p=defaults.min_p if fields.min_p is None else fields.min_p,
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(fields.ignore_eos),
        )
    except ValueError as error:
        raise invalid(str(error), str(error).partition(" ")[0]) from error  # the message begins with the field


def stop_strings(fields: GenerationFields) -> tuple[str, ...]:
    """The stop strings. Raises a 400 for a very long one, and for an empty one, which every text contains."""
    stop = fields.stop
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in strings:
        raise invalid("stop must not hold an empty string", "stop")
    if any(len(string) > MAX_STOP_CHARS for string in strings):
        raise invalid(f"stop must not hold a string of more than {MAX_STOP_CHARS} characters", "stop")
    return strings


def decoding_mode(name: str | None, info: EngineInfo) -> DecodingMode:
    """The mode of ``decoding``. Raises a 400 for one that does not exist or that the checkpoint cannot do."""
    if name is None:
        return DecodingMode.AUTO
    if name == "diffusion":
        raise unsupported("decoding 'diffusion' is not supported by this server yet; use 'tidar' or leave it out", "decoding")
    try:
        mode = DecodingMode(name)
    except ValueError:
        names = ", ".join(mode.value for mode in DecodingMode)
        raise invalid(f"decoding must be one of {names}; got {name[:50]!r}", "decoding") from None
    if mode is not DecodingMode.AUTO and mode not in info.supported_modes:
        names = ", ".join(mode.value for mode in info.supported_modes)
        raise invalid(
            f"decoding {name!r} needs a TiDAR checkpoint and the served one is not a TiDAR model; it can do: {names}",
            "decoding",
        )
    return mode


def cache_salt(request: Request, fields: GenerationFields) -> str:
    """What separates this client's prefix cache from that of others: by its API key, and by the salt it may send itself."""
    api_key: str = getattr(request.state, "api_key", "")
    own = fields.cache_salt or ""
    if not api_key and not own:
        return ""
    # The key's length keeps (key, salt) pairs apart that would join to the same text.
    return hashlib.sha256(f"{len(api_key)}:{api_key}{own}".encode("utf-8", "surrogatepass")).hexdigest()
