"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import invalid, unsupported
from server.fields import refuse_unsupported
from server.generation import Delta, Generation
from server.planning import AnswerOptions, answer_options, cache_salt, num_choices, plan_generation
from server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionRequest,
    ChatMessage,
    Completion,
    TokenizeRequest,
)
from server.services import Services
from server.streaming import EventStream, JsonAnswer
from server.usage import usage_of

LONG_TEXT = 20_000
"""Characters from which encoding leaves the event loop, so that one long prompt does not stop everybody's streams."""


def chat_routes(services: Services) -> APIRouter:
    """The route, bound to its services."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation, in one piece or as a stream."""
        options = answer_options(body, services.resolve_model(body.model))
        refuse_unsupported(body.extra, body.n or 1)
        services.unknown_fields.note(body.extra)
        services.admit(num_choices(body, 1, services.config), conversation_texts(body.messages))
        prompt = await encode_conversation(services, body.messages, template_kwargs(body))
        plan = plan_generation(body, [prompt], services.engine.info, services.config, cache_salt(request, body))
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        generation = Generation(plan, services.engine, services.tokenizer, services.metrics, response_id)
        answer = EventStream if options.stream else JsonAnswer
        return answer(services, generation, ChatWriter(options, response_id))

    return router


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
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
) -> list[int]:
    """Token ids of the conversation, if asked for with the beginning of the answer. Raises a 400."""
    rendered = [template_message(message, index) for index, message in enumerate(messages)]
    encode = functools.partial(
        services.tokenizer.encode_chat,
        rendered,
        kwargs,
        add_generation_prompt=add_generation_prompt,
        add_special_tokens=add_special_tokens,
    )
    if sum(len(message["content"]) for message in rendered) < LONG_TEXT:
        return encode()
    return await asyncio.to_thread(encode)


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """The message as templates know it: ``developer`` is ``system``, and the content is one text."""
    extra = dict(message.model_extra or {})
    where = f"messages.{index}"
    for name in ("tool_calls", "function_call", "audio"):
        if extra.pop(name, None):
            raise unsupported(f"{where}.{name} is not supported by this server", "messages")
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


class ChatWriter:
    """Chat answers and chunks."""

    def __init__(self, options: AnswerOptions, response_id: str) -> None:
        self.options = options
        self._id = response_id
        self._created = int(time.time())

    def opening(self, generation: Generation) -> Sequence[Completion]:
        """One role chunk per choice."""
        chunks = []
        for choice in generation.choices:
            delta = AssistantMessage(role="assistant", content="")
            chunks.append(self._chunk([ChatChunkChoice(index=choice.index, delta=delta, logprobs=None, finish_reason=None)]))
        if self.options.return_token_ids:
            chunks[0].prompt_token_ids = list(generation.choices[0].plan.prompt_token_ids)
        if self.options.continuous_usage:
            for chunk in chunks:
                chunk.usage = usage_of(generation)
        return chunks

    def chunks(self, delta: Delta, generation: Generation) -> Sequence[Completion]:
        """A text chunk if there is text, then a finish chunk if this is the end."""
        ids = list(delta.token_ids) if self.options.return_token_ids else None
        choices: list[ChatChunkChoice] = []
        if delta.text or (ids and delta.finish_reason is None):
            text = AssistantMessage(content=delta.text)
            choices.append(ChatChunkChoice(index=delta.index, delta=text, logprobs=None, finish_reason=None))
        if delta.finish_reason is not None:
            end = ChatChunkChoice(index=delta.index, delta=AssistantMessage(), logprobs=None, finish_reason=delta.finish_reason)
            end.stop_reason = delta.stop_reason
            choices.append(end)
        if ids is not None and choices:
            choices[0].token_ids = ids
        chunks = [self._chunk([choice]) for choice in choices]
        if self.options.continuous_usage:
            for chunk in chunks:
                chunk.usage = usage_of(generation)
        return chunks

    def last(self) -> Completion:
        """The chunk that carries the usage."""
        return self._chunk([])

    def whole(self, generation: Generation, deltas: Sequence[Sequence[Delta]]) -> Completion:
        """The answer in one piece."""
        choices: list[ChatChoice] = []
        for choice, parts in zip(generation.choices, deltas, strict=True):
            message = AssistantMessage(role="assistant", content="".join(delta.text for delta in parts))
            answer = ChatChoice(index=choice.index, message=message, logprobs=None, finish_reason=choice.finish_reason)
            answer.stop_reason = choice.stop_reason
            if self.options.return_token_ids:
                answer.token_ids = [i for delta in parts for i in delta.token_ids]
            choices.append(answer)
        completion = Completion(
            id=self._id, object="chat.completion", created=self._created, model=self.options.model, choices=choices
        )
        if self.options.return_token_ids:
            completion.prompt_token_ids = list(generation.choices[0].plan.prompt_token_ids)
        return completion

    def _chunk(self, choices: list[ChatChunkChoice]) -> Completion:
        chunk = Completion(
            id=self._id, object="chat.completion.chunk", created=self._created, model=self.options.model, choices=choices
        )
        if self.options.include_usage:
            chunk.usage = None  # said with a null on every chunk but the one that has it
        return chunk
