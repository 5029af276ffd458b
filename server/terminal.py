"""``tidar chat``: a conversation in the terminal that shows how fast it is answered."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import httpx

from engine import DecodingMode

MODES = tuple(mode.value for mode in DecodingMode)
HELP = f"/reset forgets the conversation, /mode {'|'.join(MODES)} changes the decoding, /exit ends"


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What ``tidar chat`` was told. None leaves a field to the server."""

    url: str
    api_key: str | None = None
    model: str | None = None
    decoding: str | None = None
    temperature: float | None = None
    system: str | None = None
    max_tokens: int | None = None


class ChatError(Exception):
    """The server cannot be used; the message is one line."""


@dataclass(slots=True)
class Answer:
    """What came of one answer, whole or stopped. ``tokens_per_forward`` is None where the server does not say."""

    text: str = ""
    completion_tokens: int = 0
    tokens_per_forward: float | None = None
    seconds: float = 0.0

    def summary(self) -> str:
        """One line about the speed."""
        rate = f"{self.completion_tokens / self.seconds:.1f}" if self.seconds else "-"
        per_forward = "-" if self.tokens_per_forward is None else f"{self.tokens_per_forward:.2f}"
        return f"{self.completion_tokens} tokens, {self.seconds:.2f} s, {rate} tokens/s, {per_forward} tokens/forward"


@dataclass(slots=True)
class Conversation:
    """The messages so far, and how the next one is asked."""

    options: ChatOptions
    model: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system message."""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def request(self) -> dict[str, Any]:
        """The body of the next request."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        for name in ("decoding", "temperature", "max_tokens"):
            value = getattr(self.options, name)
            if value is not None:
                body[name] = value
        return body


def chat(options: ChatOptions) -> int:
    """Read lines and answer them until the input ends: the exit status."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    # A proxy of the environment is not meant for a server on this machine.
    is_local = urlsplit(options.url).hostname in ("127.0.0.1", "localhost", "::1")
    timeout = httpx.Timeout(10.0, read=None)
    try:
        with httpx.Client(base_url=options.url, headers=headers, timeout=timeout, trust_env=not is_local) as client:
            conversation = Conversation(options, options.model or _first_model(client))
            conversation.reset()
            _converse(client, conversation)
    except (ChatError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        print(f"tidar chat: {error}", file=sys.stderr)
        return 1
    return 0


def _first_model(client: httpx.Client) -> str:
    try:
        answer = client.get("/v1/models")
    except httpx.TransportError as error:
        raise ChatError(f"no server answers at {client.base_url}: {error}; start one with: tidar serve") from error
    if answer.status_code != 200:
        raise ChatError(_error_message(answer))
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ChatError(f"what answers at {client.base_url} is no OpenAI-compatible server") from error


def _converse(client: httpx.Client, conversation: Conversation) -> None:
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing and history
        print(f"{conversation.model} at {client.base_url}. {HELP}")
    for line in _lines():
        if line.startswith("/"):
            if _command(line, conversation):
                return
        elif line.strip():
            _exchange(client, conversation, line)


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return


def _command(line: str, conversation: Conversation) -> bool:
    """Carry out a command; whether it ends the conversation."""
    match line.split():
        case ["/exit"]:
            return True
        case ["/reset"]:
            conversation.reset()
        case ["/mode", mode] if mode in MODES:
            conversation.options = replace(conversation.options, decoding=mode)
        case _:
            print(HELP)
    return False


def _exchange(client: httpx.Client, conversation: Conversation, line: str) -> None:
    conversation.messages.append({"role": "user", "content": line})
    answer = Answer()
    begun = time.monotonic()
    try:
        for text in _stream(client, conversation.request(), answer):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")  # leaving the stream closed the connection, which aborts the request
    except (ChatError, httpx.TransportError) as error:
        conversation.messages.pop()
        print(f"\n[{error}]", file=sys.stderr)
        return
    answer.seconds = time.monotonic() - begun
    conversation.messages.append({"role": "assistant", "content": answer.text})
    print(f"\n[{answer.summary()}]")


def _stream(client: httpx.Client, body: dict[str, Any], answer: Answer) -> Iterator[str]:
    """The deltas of one answer as they come; ``answer`` is filled on the way. Raises ChatError."""
    is_complete = False
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise ChatError(_error_message(response))
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_complete = True
                break
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ChatError(event["error"]["message"])
            text = _take_event(event, answer)
            if text:
                yield text
    if not is_complete:
        raise ChatError("the server closed the connection before the answer was complete")


def _take_event(event: dict[str, Any], answer: Answer) -> str:
    usage, metrics = event.get("usage"), event.get("metrics")
    if usage:
        answer.completion_tokens = usage["completion_tokens"]
    if metrics:
        answer.tokens_per_forward = metrics["speculative_decoding"]["tokens_per_forward"]
    text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    answer.text += text
    return text


def _error_message(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(response.json()["error"]["message"])
    return f"the server answered with status {response.status_code}"
