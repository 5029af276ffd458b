"""Chat answers and chunks: text, thinking and tool calls out of what a choice gained."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence

from server.generation import Delta, Generation
from server.logprobs import LogprobsWriter
from server.parsers import Content, Event, OutputParser, Reasoning, ToolCallArguments, ToolCallBegin, merge
from server.planning import AnswerOptions
from server.protocol import AssistantMessage, ChatChoice, ChatChunkChoice, ChatLogprobs, Completion, FunctionCall, ToolCall
from server.tools import ToolChoice
from server.usage import usage_of


class ChatWriter:
    """Writes one request's answer. Each choice has a parser of its own, made when its first text comes."""

    def __init__(
        self,
        options: AnswerOptions,
        response_id: str,
        make_parser: Callable[[], OutputParser],
        tool_choice: ToolChoice,
        logprobs: LogprobsWriter,
        *,
        has_short_call_ids: bool = False,
    ) -> None:
        self.options = options
        self._id = response_id
        self._created = int(time.time())
        self._make_parser, self._tool_choice, self._logprobs = make_parser, tool_choice, logprobs
        self._has_short_call_ids = has_short_call_ids
        self._parsers: dict[int, OutputParser] = {}
        self._last_call: dict[int, list[str]] = {}  # the arguments of each choice's newest call, in pieces

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
        """A chunk for each event in the text, then a finish chunk if this is the end."""
        messages = [self._delta_message(event) for event in self._events(delta)]
        ids = list(delta.token_ids) if self.options.return_token_ids else None
        logprobs = self._chat_logprobs(generation, delta)
        is_end = delta.finish_reason is not None
        if not messages and not is_end and (ids or (logprobs and logprobs.content)):
            messages.append(AssistantMessage(content=""))
        choices = [ChatChunkChoice(index=delta.index, delta=message, logprobs=None, finish_reason=None) for message in messages]
        if is_end:
            reason = self._finish_reason(delta)
            end = ChatChunkChoice(index=delta.index, delta=AssistantMessage(), logprobs=None, finish_reason=reason)
            end.stop_reason = delta.stop_reason
            choices.append(end)
        if choices:
            choices[0].logprobs = logprobs if logprobs and logprobs.content else None
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
            message = self._whole_message(merge(event for delta in parts for event in self._events(delta)))
            reason = self._finish_reason(parts[-1])
            answer = ChatChoice(index=choice.index, message=message, finish_reason=reason)
            answer.logprobs = self._chat_logprobs(generation, *parts)
            answer.stop_reason = choice.stop_reason
            if self.options.return_token_ids:
                answer.token_ids = [i for delta in parts for i in delta.token_ids]
            choices.append(answer)
        completion = Completion(
            id=self._id, object="chat.completion", created=self._created, model=self.options.model, choices=choices
        )
        plan = generation.choices[0].plan
        if self.options.return_token_ids:
            completion.prompt_token_ids = list(plan.prompt_token_ids)
        if plan.sampling.prompt_logprobs is not None:
            entries = [entry for delta in deltas[0] for entry in delta.prompt_logprobs]
            completion.prompt_logprobs = self._logprobs.prompt(plan.prompt_token_ids, entries)
        return completion

    def _events(self, delta: Delta) -> list[Event]:
        parser = self._parsers.get(delta.index)
        if parser is None:
            parser = self._parsers[delta.index] = self._make_parser()
        events = parser.push(delta.text)
        if delta.finish_reason is not None:
            events = merge([*events, *parser.finish()])
        for event in events:
            if isinstance(event, ToolCallBegin):
                self._last_call[delta.index] = []
            elif isinstance(event, ToolCallArguments):
                self._last_call[delta.index].append(event.text)
        return events

    def _finish_reason(self, end: Delta) -> str | None:
        """``tool_calls`` for a call that came to its end; one that the client named ends with ``stop``, as OpenAI's does.

        A stop string or token of the client's may cut a call anywhere, and behind one that was cut it is ``stop`` as well.
        """
        call = self._last_call.get(end.index)
        if end.finish_reason != "stop" or call is None or self._tool_choice is ToolChoice.NAMED:
            return end.finish_reason
        return "tool_calls" if end.stop_reason is None or _is_json("".join(call)) else "stop"

    def _chat_logprobs(self, generation: Generation, *deltas: Delta) -> ChatLogprobs | None:
        if generation.choices[0].plan.sampling.logprobs is None:
            return None
        return self._logprobs.chat([entry for delta in deltas for entry in delta.logprobs])

    def _delta_message(self, event: Event) -> AssistantMessage:
        match event:
            case Content(text):
                return AssistantMessage(content=text)
            case Reasoning(text):
                return AssistantMessage(reasoning=text, reasoning_content=text)
            case ToolCallBegin(index, name):
                function = FunctionCall(name=name, arguments="")
                return AssistantMessage(
                    tool_calls=[ToolCall(index=index, id=self._call_id(), type="function", function=function)]
                )
            case ToolCallArguments(index, text):
                return AssistantMessage(tool_calls=[ToolCall(index=index, function=FunctionCall(arguments=text))])

    def _whole_message(self, events: Sequence[Event]) -> AssistantMessage:
        """The events of a whole answer. Content is null where there are calls and no text beside them."""
        content = "".join(event.text for event in events if isinstance(event, Content))
        reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
        names = {event.index: event.name for event in events if isinstance(event, ToolCallBegin)}
        arguments = dict.fromkeys(names, "")
        for event in events:
            if isinstance(event, ToolCallArguments):
                arguments[event.index] += event.text
        message = AssistantMessage(role="assistant", content=content if content or not names else None)
        if reasoning:
            message.reasoning = message.reasoning_content = reasoning
        if names:
            message.tool_calls = [
                ToolCall(id=self._call_id(), type="function", function=FunctionCall(name=name, arguments=arguments[index]))
                for index, name in names.items()
            ]
        return message

    def _call_id(self) -> str:
        """Mistral's templates take ids of nine letters and digits only, when the call comes back with its result."""
        random = uuid.uuid4().hex
        return random[:9] if self._has_short_call_ids else f"call_{random[:24]}"

    def _chunk(self, choices: list[ChatChunkChoice]) -> Completion:
        chunk = Completion(
            id=self._id, object="chat.completion.chunk", created=self._created, model=self.options.model, choices=choices
        )
        if self.options.include_usage:
            chunk.usage = None  # said with a null on every chunk but the one that has it
        return chunk


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
