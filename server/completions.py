"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine import GrammarSpec, TokenLogprobs
from server.conversation import LONG_TEXT
from server.errors import invalid
from server.fields import refuse_unsupported
from server.generation import Delta, Generation
from server.grammar import requested_grammar
from server.logprobs import LogprobsWriter, TextPlace
from server.planning import (
    AnswerOptions,
    ChoicePlan,
    Logprobs,
    answer_options,
    cache_salt,
    num_choices,
    plan_generation,
    wanted_tokens,
)
from server.protocol import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
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
        grammar = await requested_grammar(body)
        plan = plan_generation(
            body,
            prompts,
            services.engine.info,
            services.config,
            cache_salt(request, body),
            requested_logprobs(body),
            grammar=None if grammar is None else GrammarSpec(grammar),
            is_prompt_only=bool(body.echo) and wanted_tokens(body) == 0,
        )
        response_id = f"cmpl-{uuid.uuid4().hex}"
        generation = Generation(plan, services.engine, services.tokenizer, services.metrics, response_id)
        answer = EventStream if options.stream else JsonAnswer
        echoed = echoed_texts(services.tokenizer, parts) if body.echo else None
        logprobs_writer = LogprobsWriter(services.tokenizer, as_ids=options.return_tokens_as_token_ids)
        return answer(services, generation, CompletionWriter(options, response_id, echoed, logprobs_writer))

    return router


def requested_logprobs(body: CompletionRequest) -> Logprobs:
    """How many alternatives to report; an echoed prompt gets as many as the answer. Raises a 400."""
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs cannot be streamed; leave stream out", "prompt_logprobs")
    of_echo = body.logprobs if body.echo else None
    if of_echo is not None and body.prompt_logprobs not in (None, of_echo):
        raise invalid("prompt_logprobs must equal logprobs where the prompt is echoed", "prompt_logprobs")
    return Logprobs(body.logprobs, body.prompt_logprobs if of_echo is None else of_echo)


def echoed_texts(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[str]:
    """The prompts as texts: what was sent, or what its token ids say."""
    return [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in prompts]


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
    """Text answers and chunks. ``echoed`` are the prompts' texts, where they are to come first."""

    def __init__(
        self, options: AnswerOptions, response_id: str, echoed: Sequence[str] | None, logprobs: LogprobsWriter
    ) -> None:
        self.options = options
        self._id = response_id
        self._created = int(time.time())
        self._echoed, self._logprobs = echoed, logprobs
        self._opened: set[int] = set()
        self._places: dict[int, TextPlace] = {}
        self._held: dict[int, list[TokenLogprobs]] = {}

    def opening(self, generation: Generation) -> Sequence[Completion]:
        """Nothing: text completions have no role."""
        return ()

    def chunks(self, delta: Delta, generation: Generation) -> Sequence[Completion]:
        """A text chunk if there is text, then a finish chunk if this is the end. An echoed prompt is in the first chunk."""
        plan = generation.choices[delta.index].plan
        self._held.setdefault(delta.index, []).extend(delta.prompt_logprobs)
        is_first, is_end = delta.index not in self._opened, delta.finish_reason is not None
        if is_first and not (delta.token_ids or delta.text or is_end):
            return ()  # a part of the prompt's log-probabilities
        self._opened.add(delta.index)
        text = (self._echo(plan) if is_first else "") + delta.text
        logprobs = self._completion_logprobs(generation, delta.index, [delta])
        ids = list(delta.token_ids) if self.options.return_token_ids else None
        choices: list[CompletionChoice] = []
        if text or ((ids or (logprobs and logprobs.tokens)) and not is_end):
            choices.append(CompletionChoice(index=delta.index, text=text, logprobs=None, finish_reason=None))
        if is_end:
            end = CompletionChoice(index=delta.index, text="", logprobs=None, finish_reason=delta.finish_reason)
            end.stop_reason = delta.stop_reason
            choices.append(end)
        if choices:
            choices[0].logprobs = logprobs if logprobs and logprobs.tokens else None
        if ids is not None and choices:
            choices[0].token_ids = ids
            if is_first:
                choices[0].prompt_token_ids = list(plan.prompt_token_ids)
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
            self._held[choice.index] = [entry for delta in parts for entry in delta.prompt_logprobs]
            text = self._echo(choice.plan) + "".join(delta.text for delta in parts)
            answer = CompletionChoice(index=choice.index, text=text, finish_reason=choice.finish_reason)
            if choice.plan.sampling.prompt_logprobs is not None and self._echoed is None:
                answer.prompt_logprobs = self._logprobs.prompt(choice.plan.prompt_token_ids, self._held[choice.index])
            answer.logprobs = self._completion_logprobs(generation, choice.index, parts)
            answer.stop_reason = choice.stop_reason
            if self.options.return_token_ids:
                answer.token_ids = [i for delta in parts for i in delta.token_ids]
                answer.prompt_token_ids = list(choice.plan.prompt_token_ids)
            choices.append(answer)
        return self._frame(choices)

    def _echo(self, plan: ChoicePlan) -> str:
        return "" if self._echoed is None else self._echoed[plan.prompt_index]

    def _completion_logprobs(self, generation: Generation, index: int, deltas: Sequence[Delta]) -> CompletionLogprobs | None:
        """Of the tokens in these deltas, behind those of the echoed prompt if they are the choice's first."""
        plan = generation.choices[index].plan
        if plan.sampling.logprobs is None:
            return None
        entries, first_token_id = [entry for delta in deltas for entry in delta.logprobs], None
        place = self._places.get(index)
        if place is None:
            place = TextPlace(self._echo(plan), keeps_special=not generation.plan.skip_special_tokens)
            self._places[index] = place
            if self._echoed is not None:
                entries, first_token_id = [*self._held.pop(index, ()), *entries], plan.prompt_token_ids[0]
        return self._logprobs.completion(entries, place, first_token_id)

    def _frame(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id, object="text_completion", created=self._created, model=self.options.model, choices=choices
        )
