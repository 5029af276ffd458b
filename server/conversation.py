"""Conversations on their way into the chat template."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.errors import invalid, unsupported
from server.protocol import ChatCompletionRequest, ChatMessage, TokenizeRequest
from server.services import Services
from server.tools import parsed_calls

LONG_TEXT = 20_000
"""Characters from which encoding leaves the event loop, so that one long prompt does not stop everybody's streams."""


def template_kwargs(body: ChatCompletionRequest | TokenizeRequest) -> dict[str, Any]:
    """What the template gets besides the messages."""
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return kwargs


def conversation_texts(messages: Sequence[ChatMessage]) -> Iterator[str]:
    """The texts that the messages are made of; what is no text is refused elsewhere."""
    for message in messages:
        if isinstance(message.content, str):
            yield message.content
        for part in message.content if isinstance(message.content, list) else ():
            if isinstance(part.get("text"), str):
                yield part["text"]


async def encode_conversation(
    services: Services,
    messages: Sequence[ChatMessage],
    kwargs: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
) -> list[int]:
    """Token ids of the conversation, if asked for with the beginning of the answer. Raises a 400."""
    rendered = [template_message(message, index) for index, message in enumerate(messages)]
    encode = functools.partial(
        services.tokenizer.encode_chat,
        rendered,
        kwargs,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        add_special_tokens=add_special_tokens,
    )
    if _num_characters([*rendered, *tools]) < LONG_TEXT:
        return encode()
    return await asyncio.to_thread(encode)


def _num_characters(value: Any) -> int:
    """Of all texts in a JSON value: what a template may write. Counted without recursion, since a client sets the depth."""
    count, open_values = 0, [value]
    while open_values:
        match open_values.pop():
            case str(text):
                count += len(text)
            case dict(mapping):
                open_values += [*mapping, *mapping.values()]
            case list(items):
                open_values += items
    return count


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """The message as templates know it: ``developer`` is ``system``, and the content is one text."""
    extra = dict(message.model_extra or {})
    where = f"messages.{index}"
    for name in ("function_call", "audio"):
        if extra.pop(name, None):
            raise unsupported(f"{where}.{name} is not supported by this server", "messages")
    if extra.get("reasoning") is not None:  # answers carry it under both names, templates know this one
        extra.setdefault("reasoning_content", extra["reasoning"])
    calls = extra.pop("tool_calls", None)
    if calls:
        extra["tool_calls"] = parsed_calls(calls, where)
    role = "system" if message.role == "developer" else message.role
    return {**extra, "role": role, "content": _content_text(message.content, where)}


def _content_text(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if not isinstance(content, list):
        return content or ""
    texts: list[str] = []
    for part in content:
        if part.get("type") != "text":
            raise unsupported(
                f"{where}.content has a part of type {str(part.get('type'))[:50]!r}; only text is supported",
                "messages",
            )
        if not isinstance(part.get("text"), str):
            raise invalid(f"{where}.content has a text part whose text is not a string", "messages")
        texts.append(part["text"])
    return "\n".join(texts)
