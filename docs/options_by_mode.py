"""The matrix of request options and decode modes, found by sending every request to the real API on the bundled model.

The model runs in float64, where the logits of two batch shapes never tie, so that equal means equal on every machine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from engine import AsyncEngine, DecodeConfig, DecodingMode, EngineConfig
from server.app import create_app
from server.config import ServerConfig
from server.options import BUNDLED_MODEL
from server.tokenizer import load_tokenizer

EXACT = ("ar", "linear", "tidar", "auto")
MODES = (*EXACT, "diffusion")
AT_ONCE = 8
"""Options that are in the engine together, each in all modes."""

MAX_VALUE_CHARS = 44
"""Of a value in the table."""

PARSER = "hermes"
"""How calls are read: the bundled model has no format of its own."""

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

QUESTION = {"messages": [{"role": "user", "content": "Tell me about numbers"}]}
PROMPT = {"prompt": "The module"}
PLAIN = {"temperature": 1.9, "seed": 7, "max_tokens": 32, "return_token_ids": True}

POINT = {
    "type": "object",
    "properties": {"x": {"enum": [1, 2]}, "y": {"type": "boolean"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "plot", "parameters": POINT}},
    {"type": "function", "function": {"name": "clear"}},
]
NAMED = {"type": "function", "function": {"name": "plot"}}


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One row: what is sent beside the plain request, and whether that must change the answer."""

    fields: Mapping[str, Any]
    route: str = CHAT
    has_effect: bool = True

    @property
    def name(self) -> str:
        """As the page shows it."""
        sent = ", ".join(f"{name} {_short(value)}" for name, value in self.fields.items())
        return sent or "nothing else"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`" if len(text) <= MAX_VALUE_CHARS else f"`{text[: MAX_VALUE_CHARS - 1]}…`"


SAMPLING = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"top_p": 0.5},
    {"top_k": 2},
    {"min_p": 0.3},
    {"seed": 8},
    {"n": 3},
    {"max_tokens": 5},
    {"max_completion_tokens": 5},
    {"stop": "e"},
    {"stop_token_ids": list(range(300, 800))[:256]},
    {"ignore_eos": True, "temperature": 0.2, "max_tokens": 64},
    {"min_tokens": 64, "temperature": 0.2, "max_tokens": 64},
    {"frequency_penalty": 1.5},
    {"presence_penalty": 1.5},
    {"repetition_penalty": 1.5},
    {"logit_bias": {"300": 20}},
)

REPORTS = (
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 20},
    {"prompt_logprobs": 2},
    {"logprobs": True, "return_tokens_as_token_ids": True},
    {"skip_special_tokens": False, "stop": None, "temperature": 0, "ignore_eos": True, "max_tokens": 64},
)

STRUCTURE = (
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}},
    {"structured_outputs": {"json": POINT}},
    {"structured_outputs": {"regex": "[a-d]{9}"}},
    {"guided_json": POINT},
    {"guided_regex": "[a-d]{9}"},
    {"guided_choice": ["yes", "no", "perhaps"]},
    {"guided_grammar": 'start: "<" /[0-9]+/ ">"'},
    {"tools": TOOLS, "tool_choice": "required"},
    {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": TOOLS, "tool_choice": NAMED},
    {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}},
    {"tools": TOOLS, "tool_choice": "auto", "response_format": {"type": "json_object"}},
)

NO_EFFECT = (
    {"response_format": {"type": "text"}},
    {"tools": TOOLS, "tool_choice": "none"},
    {"tools": TOOLS, "tool_choice": "auto"},
    {"stream": True},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"cache_salt": "mine"},
    {"reasoning_effort": "low"},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k", "verbosity": "low"},
)

TEXTS = (
    {"echo": True},
    {"logprobs": 5},
    {"echo": True, "logprobs": 1},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"prompt_logprobs": 2},
    {"prompt": ["The module", "json.dumps turns"]},
    {"prompt": [300, 301, 302]},
    {"prompt": [[300, 301, 302], [300]]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}},
)

OPTIONS = (
    Option({}, has_effect=False),
    *(Option(fields) for fields in (*SAMPLING, *REPORTS, *STRUCTURE)),
    *(Option(fields, has_effect=False) for fields in NO_EFFECT),
    Option({}, TEXT, has_effect=False),
    *(Option(fields, TEXT) for fields in TEXTS),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What came back: the status, the tokens, and all of the answer that must not depend on the mode."""

    status: int
    tokens: str = ""
    answer: str = ""


async def ask(client: httpx.AsyncClient, option: Option, mode: str) -> Seen:
    """Send one request in one mode."""
    body = {**(QUESTION if option.route == CHAT else PROMPT), **PLAIN, **option.fields, "decoding": mode}
    answer = await client.post(option.route, json=body)
    if answer.status_code != 200:
        return Seen(answer.status_code)
    parts = [answer.json()] if not body.get("stream") else [json.loads(line[6:]) for line in _events(answer.text)]
    choices = _joined([choice for part in parts for choice in part["choices"]])
    reports = [part["prompt_logprobs"] for part in parts if "prompt_logprobs" in part]
    tokens = json.dumps({index: choice["ids"] for index, choice in choices.items()})
    return Seen(200, tokens, json.dumps(_rounded([choices, reports]), sort_keys=True))


def _events(stream: str) -> list[str]:
    lines = [line for line in stream.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", "the stream broke off"
    return lines[:-1]


def _joined(choices: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """By index: text, calls, tokens, ends and log-probabilities, of one piece or of chunks."""
    joined: dict[int, dict[str, Any]] = {}
    for choice in choices:
        whole = joined.setdefault(choice["index"], {"text": "", "calls": "", "ids": [], "logprobs": [], "end": None})
        message = choice.get("message") or choice.get("delta") or {}
        whole["text"] += choice.get("text") or message.get("content") or ""
        for call in message.get("tool_calls") or ():
            whole["calls"] += (call["function"].get("name") or "") + call["function"]["arguments"]
        whole["ids"] += choice.get("token_ids") or ()
        for report in ("logprobs", "prompt_logprobs"):
            if choice.get(report):
                whole["logprobs"].append(choice[report])
        if choice["finish_reason"]:
            whole["end"] = (choice["finish_reason"], choice["stop_reason"])
    return joined


def _rounded(value: Any) -> Any:
    """Six digits after the point: sums in another order differ in the last of sixteen."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


async def observe(options: Sequence[Option]) -> dict[Option, dict[str, Seen]]:
    """Every option in every mode, several options and all modes side by side in the engine."""
    config = EngineConfig(
        str(BUNDLED_MODEL), dtype="float64", device="cpu", num_threads=1, decode=DecodeConfig(DecodingMode.TIDAR)
    )
    engine = AsyncEngine(config)
    await engine.start()
    turn = asyncio.Semaphore(AT_ONCE)
    try:
        app = create_app(engine, ServerConfig(tool_call_parser=PARSER), load_tokenizer(str(BUNDLED_MODEL)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://matrix", timeout=None) as client:

            async def in_all_modes(option: Option) -> dict[str, Seen]:
                async with turn:
                    answers = await asyncio.gather(*(ask(client, option, mode) for mode in MODES))
                return dict(zip(MODES, answers, strict=True))

            return dict(zip(options, await asyncio.gather(*map(in_all_modes, options)), strict=True))
    finally:
        await engine.shutdown()


def row(option: Option, seen: Mapping[str, Seen], plain: Seen) -> str:
    """A row of the table. Raises ValueError where the observation breaks a promise: such a page must not be written."""
    ar = seen["ar"]
    if ar.status != 200 or (ar.answer != plain.answer) is not option.has_effect:
        raise ValueError(f"{option.name}: in ar, {ar.status} and {'no' if ar.answer == plain.answer else 'an'} effect")
    for mode in EXACT:
        if seen[mode] != ar:
            raise ValueError(f"{option.name}: {mode} answered {seen[mode]}, but ar {ar}")
    effect = "other tokens" if ar.tokens != plain.tokens else "more is reported" if option.has_effect else "none"
    cells = [_cell(seen[mode], ar, is_exact=mode in EXACT) for mode in MODES]
    return f"| {option.name} | {effect} | {' | '.join(cells)} |"


def _cell(seen: Seen, ar: Seen, *, is_exact: bool) -> str:
    if seen.status != 200:
        return f"refused ({seen.status})"
    if is_exact:
        return "same"
    return "lossy" if seen.tokens != ar.tokens else "lossy (same here)"


def rows(options: Sequence[Option]) -> dict[Option, str]:
    """The rows of these options, by running them."""
    plain = {route: Option({}, route, has_effect=False) for route in (CHAT, TEXT)}
    seen = asyncio.run(observe([*plain.values(), *options]))
    return {option: row(option, seen[option], seen[plain[option.route]]["ar"]) for option in options}


HEADER = """# Options by decode mode

Generated by `make docs`, which sends every request below to the API of the bundled model in float64, in all modes side by side.
The plain request has temperature 1.9, seed 7 and 32 tokens. *Against it* tells what an option changed in `ar`.
The server runs with `--tool-call-parser hermes`; without, it refuses `tool_choice` `"auto"`, as the bundled model has no calls.

* **same**: text, calls, token ids, finish reasons and log-probabilities (to six digits) are those of `ar`.
* **lossy**: `diffusion` takes the option, and its tokens are its own: nothing verifies them. Where they happen to be the same
  on this request, the cell says so.
* **refused (400)**: an error that names the option, before any work.

What is not in this table is an unknown field, which the log names once, or a known one that is refused (`server/fields.py`).
"""


def page() -> str:
    """The whole page."""
    found = rows(OPTIONS)
    parts = [HEADER]
    for route in (CHAT, TEXT):
        head = f"| option | against the plain request | {' | '.join(f'`{mode}`' for mode in MODES)} |"
        table = [head, "| --- | --- |" + " --- |" * len(MODES), *(found[option] for option in OPTIONS if option.route == route)]
        parts.append(f"## `POST {route}`\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)
