"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat import LONG_TEXT
from server.errors import invalid
from server.fields import refuse_unsupported
from server.generation import Delta, Generation
from server.planning import AnswerOptions, answer_options, cache_salt, num_choices, plan_generation
from server.protocol import Completion, CompletionChoice, CompletionRequest
from server.services import Services
from server.streaming import EventStream, JsonAnswer
from server.tokenizer import Tokenizer
from server.usage import usage_of


def completion_routes(services: Services) -> APIRouter:
    """The route, bound to its services."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several texts, in one piece or as a stream."""
        options = answer_options(body, services.resolve_model(body.model))
        refuse_unsupported(body.extra, body.n or 1)
        services.unknown_fields.note(body.extra)
        parts = prompt_list(body.prompt)
        n = num_choices(body, len(parts), services.config)
        services.admit(n * len(parts), (part for part in parts if isinstance(part, str)))
        prompts = await encode_prompts(services.tokenizer, parts, add_special_tokens=body.add_special_tokens is not False)
        plan = plan_generation(body, prompts, services.engine.info, services.config, cache_salt(request, body))
        response_id = f"cmpl-{uuid.uuid4().hex}"
        generation = Generation(plan, services.engine, services.tokenizer, services.metrics, response_id)
        answer = EventStream if options.stream else JsonAnswer
        return answer(services, generation, CompletionWriter(options, response_id))

    return router


def prompt_list(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str] | list[list[int]]:
    """The four forms of a prompt as a list of prompts. Raises a 400 for an empty list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt must not be an empty list", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


async def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each prompt; ``add_special_tokens`` gives texts what the checkpoint puts around one, ids stay the same."""

    def encode() -> list[list[int]]:
        return [tokenizer.encode(p, add_special_tokens=add_special_tokens) if isinstance(p, str) else p for p in prompts]

    if sum(len(p) for p in prompts if isinstance(p, str)) < LONG_TEXT:
        return encode()
    return await asyncio.to_thread(encode)


class CompletionWriter:
    """Text answers and chunks."""

    def __init__(self, options: AnswerOptions, response_id: str) -> None:
        self.options = options
        self._id = response_id
        self._created = int(time.time())
        self._opened: set[int] = set()

    def opening(self, generation: Generation) -> Sequence[Completion]:
        """Nothing: text completions have no role."""
        return ()

    def chunks(self, delta: Delta, generation: Generation) -> Sequence[Completion]:
        """A text chunk if there is text, then a finish chunk if this is the end."""
        ids = list(delta.token_ids) if self.options.return_token_ids else None
        choices: list[CompletionChoice] = []
        if delta.text or (ids and delta.finish_reason is None):
            choices.append(CompletionChoice(index=delta.index, text=delta.text, logprobs=None, finish_reason=None))
        if delta.finish_reason is not None:
            end = CompletionChoice(index=delta.index, text="", logprobs=None, finish_reason=delta.finish_reason)
            end.stop_reason = delta.stop_reason
            choices.append(end)
        if ids is not None and choices:
            choices[0].token_ids = ids
            if delta.index not in self._opened:
                self._opened.add(delta.index)
                choices[0].prompt_token_ids = list(generation.choices[delta.index].plan.prompt_token_ids)
        chunks = [self._frame([choice]) for choice in choices]
        for chunk in chunks:
            if self.options.include_usage:
                chunk.usage = usage_of(generation) if self.options.continuous_usage else None
        return chunks

    def last(self) -> Completion:
        """The chunk that carries the usage."""
        return self._frame([])

    def whole(self, generation: Generation, deltas: Sequence[Sequence[Delta]]) -> Completion:
        """The answer in one piece."""
        choices: list[CompletionChoice] = []
        for choice, parts in zip(generation.choices, deltas, strict=True):
            text = "".join(delta.text for delta in parts)
            answer = CompletionChoice(index=choice.index, text=text, logprobs=None, finish_reason=choice.finish_reason)
            answer.stop_reason = choice.stop_reason
            if self.options.return_token_ids:
                answer.token_ids = [i for delta in parts for i in delta.token_ids]
                answer.prompt_token_ids = list(choice.plan.prompt_token_ids)
            choices.append(answer)
        return self._frame(choices)

    def _frame(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id, object="text_completion", created=self._created, model=self.options.model, choices=choices
        )
