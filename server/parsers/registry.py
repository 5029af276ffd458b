"""Which parser an answer needs, and how it is put together."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from server.parsers.events import Content, Event, OutputParser, merge
from server.parsers.reasoning import THINK_BEGIN, THINK_END, ThinkParser
from server.parsers.tools import CallArrayParser, HermesParser, Llama3Parser, MistralParser, NamedFunctionParser, ToolParser


class ToolFormat(enum.Enum):
    """How a model writes tool calls."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"


class ReasoningFormat(enum.Enum):
    """How a model marks its thinking."""

    THINK = "think"


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """A grammar makes the answer the arguments of the function ``name``, or an array of calls if that is None."""

    name: str | None = None


_TOOL_PARSERS: dict[ToolFormat, type[HermesParser | Llama3Parser | MistralParser]] = {
    ToolFormat.HERMES: HermesParser,
    ToolFormat.LLAMA3: Llama3Parser,
    ToolFormat.MISTRAL: MistralParser,
}


def detect_tool_format(chat_template: str | None) -> ToolFormat | None:
    """The format in which the template writes tool calls; None if it writes none, or in a format that is not known."""
    template = chat_template or ""
    if MistralParser.CALLS in template:
        return ToolFormat.MISTRAL
    if HermesParser.BEGIN_TAG in template:
        # Some families put other things than JSON between the same tags.
        is_json = not any(tag in template for tag in ("<function=", "<arg_key>"))
        return ToolFormat.HERMES if is_json else None
    has_llama_headers = "<|start_header_id|>" in template and '"parameters": ' in template
    return ToolFormat.LLAMA3 if Llama3Parser.TAG in template or has_llama_headers else None


def detect_reasoning_format(chat_template: str | None) -> ReasoningFormat | None:
    """The format in which the template knows thinking, None if it does not."""
    template = chat_template or ""
    return ReasoningFormat.THINK if THINK_BEGIN in template or THINK_END in template else None


AUTO, NONE = "auto", "none"
"""What a setting may say instead of a format: what the template shows, or no format."""


def tool_format(setting: str, chat_template: str | None) -> ToolFormat | None:
    """The format of a setting; ``auto`` is what the template shows. Raises ValueError for an unknown one."""
    if setting == AUTO:
        return detect_tool_format(chat_template)
    return None if setting == NONE else ToolFormat(setting)


def reasoning_format(setting: str, chat_template: str | None) -> ReasoningFormat | None:
    """The format of a setting; ``auto`` is what the template shows. Raises ValueError for an unknown one."""
    if setting == AUTO:
        return detect_reasoning_format(chat_template)
    return None if setting == NONE else ReasoningFormat(setting)


def begins_in_reasoning(prompt_text: str) -> bool:
    """Whether a rendered prompt ends by opening the model's thinking."""
    return prompt_text.rstrip().endswith(THINK_BEGIN)


def build_parser(
    tools: ToolFormat | ForcedCall | None = None,
    reasoning: ReasoningFormat | None = None,
    *,
    is_reasoning: bool = False,
    max_calls: int | None = None,
) -> OutputParser:
    """A parser for one choice: thinking, then calls or text.

    ``is_reasoning`` tells that the prompt has begun the thinking. Calls beyond ``max_calls`` are dropped with their text.
    """
    tool_parser = None if tools is None else _tool_parser(tools, max_calls)
    if reasoning is None:
        return tool_parser or ContentParser()
    think_parser = ThinkParser(is_open=is_reasoning)
    return think_parser if tool_parser is None else ChainedParser(think_parser, tool_parser)


def _tool_parser(tools: ToolFormat | ForcedCall, max_calls: int | None) -> ToolParser:
    if isinstance(tools, ToolFormat):
        return _TOOL_PARSERS[tools](max_calls=max_calls)
    if tools.name is None:
        return CallArrayParser(max_calls=max_calls)
    return NamedFunctionParser(tools.name, max_calls=max_calls)


class ContentParser:
    """All text is content."""

    markers: tuple[str, ...] = ()

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class ChainedParser:
    """One parser's content is the other's text."""

    def __init__(self, first: OutputParser, second: OutputParser) -> None:
        self.markers = (*first.markers, *second.markers)
        self._first = first
        self._second = second

    def push(self, text: str) -> list[Event]:
        return merge(self._pass_on(self._first.push(text)))

    def finish(self) -> list[Event]:
        return merge([*self._pass_on(self._first.finish()), *self._second.finish()])

    def _pass_on(self, events: list[Event]) -> list[Event]:
        passed: list[Event] = []
        for event in events:
            passed.extend(self._second.push(event.text) if isinstance(event, Content) else (event,))
        return passed
