"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine import MAX_LOGPROBS, GrammarSpec, Thinking
from server.call_grammar import answer_or_calls, forced_grammar
from server.chat_writer import ChatWriter
from server.conversation import conversation_texts, encode_conversation, template_kwargs
from server.errors import invalid
from server.fields import refuse_unsupported
from server.generation import Generation
from server.grammar import follows_json, requested_grammar
from server.logprobs import LogprobsWriter
from server.parsers import ForcedCall, OutputParser, ToolFormat, begins_in_reasoning, build_parser
from server.planning import Logprobs, answer_options, cache_salt, num_choices, plan_generation
from server.protocol import ChatCompletionRequest
from server.services import Services
from server.streaming import EventStream, JsonAnswer
from server.tools import ToolChoice, Tools, requested_tools

PROMPT_TAIL = 32
"""Tokens at the end of a prompt that tell whether it has opened the model's thinking."""

THINK_BEGIN, THINK_END = "<think>", "</think>"


def chat_routes(services: Services) -> APIRouter:
    """The route, bound to its services."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation, in one piece or as a stream."""
        options = answer_options(body, services.resolve_model(body.model))
        refuse_unsupported(body.extra, body.n or 1)
        services.unknown_fields.note(body.extra)
        logprobs, tools = requested_logprobs(body), requested_tools(body)
        services.admit(num_choices(body, 1, services.config), conversation_texts(body.messages))
        prompt = await encode_conversation(services, body.messages, template_kwargs(body), tools=tools.offered)
        reading = await read_answer(services, body, tools, prompt)
        plan = plan_generation(
            body,
            [prompt],
            services.engine.info,
            services.config,
            cache_salt(request, body),
            logprobs,
            grammar=reading.grammar,
            kept_tokens=reading.make_parser().markers,
        )
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        generation = Generation(plan, services.engine, services.tokenizer, services.metrics, response_id)
        logprobs_writer = LogprobsWriter(services.tokenizer, as_ids=options.return_tokens_as_token_ids)
        is_mistral = services.tool_format is ToolFormat.MISTRAL
        writer = ChatWriter(
            options, response_id, reading.make_parser, tools.choice, logprobs_writer, has_short_call_ids=is_mistral
        )
        answer = EventStream if options.stream else JsonAnswer
        return answer(services, generation, writer)

    return router


def requested_logprobs(body: ChatCompletionRequest) -> Logprobs:
    """How many alternatives to report. Raises a 400."""
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if not 0 <= (body.top_logprobs or 0) <= MAX_LOGPROBS:
        raise invalid(f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {body.top_logprobs}", "top_logprobs")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs cannot be streamed; leave stream out", "prompt_logprobs")
    return Logprobs((body.top_logprobs or 0) if body.logprobs else None, body.prompt_logprobs)


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is read: the grammar that it follows, and what parses it, a new one for each choice."""

    grammar: GrammarSpec | None
    make_parser: Callable[[], OutputParser]


async def read_answer(services: Services, body: ChatCompletionRequest, tools: Tools, prompt: list[int]) -> Reading:
    """Settle the grammar and the parser. Raises a 400 for a schema that is wrong, and for calls that nobody could read."""
    source, call_format = await requested_grammar(body), _call_format(services, tools)
    if isinstance(call_format, ForcedCall):
        source = await forced_grammar(tools)  # a demanded call has no content that response_format could speak of
    elif source is not None and call_format is not None:
        if not follows_json(source):
            raise invalid("only a JSON answer can be told from the calls that the model may make: send tool_choice 'none', "
                          "'required' or a function, or leave the constraint out", "tool_choice")  # fmt: skip
        source = await answer_or_calls(source, tools, call_format, services.tokenizer.special_id_of)
    tail = services.tokenizer.decode(prompt[-PROMPT_TAIL:], skip_special_tokens=False)
    is_reasoning = services.reasoning_format is not None and begins_in_reasoning(tail)
    thinking = thinking_of(services, tail, is_reasoning=is_reasoning)
    if source is not None and is_reasoning and thinking is None:
        raise invalid(f"the prompt opens the model's thinking, and a constraint can only begin where {THINK_END} is one token: "
                      "leave it out, or switch thinking off by chat_template_kwargs", "response_format")  # fmt: skip

    def make_parser() -> OutputParser:
        return build_parser(call_format, services.reasoning_format, is_reasoning=is_reasoning, max_calls=tools.max_calls)

    spec = None if source is None else GrammarSpec(source, thinking)
    return Reading(spec, make_parser)


def _call_format(services: Services, tools: Tools) -> ToolFormat | ForcedCall | None:
    match tools.choice:
        case ToolChoice.NONE:
            return None
        case ToolChoice.NAMED | ToolChoice.REQUIRED:
            return ForcedCall(tools.name)
    if services.tool_format is None:
        raise invalid(
            "this server does not know how its model writes tool calls: start it with --tool-call-parser, or send "
            "tool_choice 'required' or a named function",
            "tools",
        )
    return services.tool_format


def thinking_of(services: Services, prompt_tail: str, *, is_reasoning: bool) -> Thinking | None:
    """Where the model's thinking ends; None if it does not think, or if the prompt has closed its thinking already."""
    end, begin = services.tokenizer.id_of(THINK_END), services.tokenizer.id_of(THINK_BEGIN)
    if services.reasoning_format is None or end is None or prompt_tail.rstrip().endswith(THINK_END):
        return None
    return Thinking(end, begin, is_reasoning)
