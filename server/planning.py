"""From a request's fields to what the engine is asked: one choice after the other, checked before anything is sent."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request

from engine import DecodingMode, EngineInfo, GrammarSpec, SamplingParams, choice_seed
from server.config import ServerConfig
from server.errors import invalid
from server.protocol import GenerationFields

MAX_STOP_CHARS = 1000


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One choice to generate; ``prompt_index`` tells which prompt of the request it answers.

    ``is_prompt_only``: the client wants the prompt's log-probabilities and no token. The engine gives one, which is dropped.
    """

    prompt_index: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    is_prompt_only: bool = False


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How many alternatives a request wants beside each token's log-probability; None: no log-probabilities."""

    output: int | None = None
    prompt: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Everything that one client request asks of the engine.

    ``kept_tokens`` are special tokens that stay in the text though ``skip_special_tokens`` is set.
    """

    choices: tuple[ChoicePlan, ...]
    decoding: DecodingMode
    stop: tuple[str, ...]
    skip_special_tokens: bool
    cache_salt: str
    grammar: GrammarSpec | None = None
    kept_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How the answer is written."""

    model: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    return_tokens_as_token_ids: bool


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
        return_tokens_as_token_ids=bool(fields.return_tokens_as_token_ids),
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
    logprobs: Logprobs,
    *,
    grammar: GrammarSpec | None = None,
    kept_tokens: tuple[str, ...] = (),
    is_prompt_only: bool = False,
) -> GenerationPlan:
    """Check everything and lay out the choices, those of the first prompt first. Raises a 400."""
    n = num_choices(fields, len(prompts), config)
    # Python's remainder is never negative, so -1 becomes 2**64 - 1.
    seed = secrets.randbits(64) if fields.seed is None else fields.seed % 2**64
    sampling = sampling_params(fields, info, logprobs, is_prompt_only=is_prompt_only)
    decoding = decoding_mode(fields.decoding, info)
    if DecodingMode.DIFFUSION in (decoding, info.default_mode if decoding is DecodingMode.AUTO else None):
        sampling = for_diffusion(fields, sampling, grammar)
    choices: list[ChoicePlan] = []
    for prompt_index, prompt in enumerate(prompts):
        check_prompt(prompt, info)
        max_tokens = min(sampling.max_tokens, info.max_model_len - len(prompt))
        token_ids = tuple(prompt)
        for index in range(n):
            min_tokens = min(sampling.min_tokens, max_tokens)
            own = replace(sampling, max_tokens=max_tokens, min_tokens=min_tokens, seed=choice_seed(seed, index))
            choices.append(ChoicePlan(prompt_index, token_ids, own, is_prompt_only))
    check_queue_tokens(choices, config.limits.max_waiting_tokens)
    return GenerationPlan(
        choices=tuple(choices),
        decoding=decoding,
        stop=stop_strings(fields),
        skip_special_tokens=fields.skip_special_tokens is not False,
        cache_salt=cache_salt,
        grammar=grammar,
        kept_tokens=kept_tokens,
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


def sampling_params(
    fields: GenerationFields, info: EngineInfo, logprobs: Logprobs, *, is_prompt_only: bool = False
) -> SamplingParams:
    """The sampling of every choice, without its seed. Raises a 400.

    ``max_tokens`` is cut to each prompt's room later, since clients send one number for all models.
    """
    defaults = info.sampling_defaults
    wanted = wanted_tokens(fields)
    top_k = defaults.top_k if fields.top_k is None else fields.top_k
    stop_token_ids = tuple(dict.fromkeys(fields.stop_token_ids or ()))
    if any(not 0 <= i < info.vocab_size for i in stop_token_ids):
        raise invalid(f"stop_token_ids must be from 0 to {info.vocab_size - 1}", "stop_token_ids")
    try:
        return SamplingParams(
            max_tokens=1 if is_prompt_only else info.max_model_len if wanted is None else wanted,
            temperature=_given(fields.temperature, defaults.temperature),
            top_p=_given(fields.top_p, defaults.top_p),
            top_k=0 if top_k == -1 else top_k,
            min_p=_given(fields.min_p, defaults.min_p),
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(fields.ignore_eos),
            min_tokens=0 if is_prompt_only else fields.min_tokens or 0,
            frequency_penalty=_given(fields.frequency_penalty, 0.0),
            presence_penalty=_given(fields.presence_penalty, 0.0),
            repetition_penalty=_given(fields.repetition_penalty, defaults.repetition_penalty),
            logit_bias=logit_bias(fields, info),
            logprobs=logprobs.output,
            prompt_logprobs=logprobs.prompt,
        )
    except ValueError as error:
        raise invalid(str(error), str(error).partition(" ")[0]) from error  # the message begins with the field


def wanted_tokens(fields: GenerationFields) -> int | None:
    """How many tokens the client wants at most; None where it does not say."""
    return fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def logit_bias(fields: GenerationFields, info: EngineInfo) -> tuple[tuple[int, float], ...]:
    """The biases by token id, whose keys are texts in JSON. Raises a 400 for what is no id of the vocabulary."""
    biases: dict[int, float] = {}
    for key, bias in (fields.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= info.vocab_size:
            raise invalid(
                f"logit_bias has the key {key[:20]!r}, but keys must be token ids from 0 to {info.vocab_size - 1}", "logit_bias"
            )
        biases[int(key)] = bias
    return tuple(biases.items())


def for_diffusion(fields: GenerationFields, sampling: SamplingParams, grammar: GrammarSpec | None) -> SamplingParams:
    """Raise a 400 for what diffusion cannot do, since nothing verifies its tokens; defaults that it cannot do are left out."""
    if fields.repetition_penalty is None:
        sampling = replace(sampling, repetition_penalty=1.0)
    for param, is_asked in (
        (_constraint(fields), grammar is not None),
        ("repetition_penalty", sampling.repetition_penalty != 1.0),
        ("frequency_penalty", sampling.frequency_penalty != 0.0),
        ("presence_penalty", sampling.presence_penalty != 0.0),
        ("min_tokens", sampling.min_tokens > 0),
        ("logprobs", sampling.logprobs is not None),
    ):
        if is_asked:
            raise invalid(f"{param} cannot be combined with decoding 'diffusion'; leave it out, or decode by 'tidar'", param)
    return sampling


def _constraint(fields: GenerationFields) -> str:
    """The field that constrains the output."""
    if fields.response_format is not None and fields.response_format.get("type") != "text":
        return "response_format"
    names = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
    return next((name for name in names if getattr(fields, name) is not None), "tool_choice")


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
