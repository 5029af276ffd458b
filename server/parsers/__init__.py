"""Parsers of a model's answer: thinking, content and tool calls, out of text that is still growing."""

from server.parsers.events import Content, Event, OutputParser, Reasoning, ToolCallArguments, ToolCallBegin, merge
from server.parsers.registry import (
    ForcedCall,
    ReasoningFormat,
    ToolFormat,
    begins_in_reasoning,
    build_parser,
    detect_reasoning_format,
    detect_tool_format,
    reasoning_format,
    tool_format,
)

__all__ = [
    "Content",
    "Event",
    "ForcedCall",
    "OutputParser",
    "Reasoning",
    "ReasoningFormat",
    "ToolCallArguments",
    "ToolCallBegin",
    "ToolFormat",
    "begins_in_reasoning",
    "build_parser",
    "detect_reasoning_format",
    "detect_tool_format",
    "merge",
    "reasoning_format",
    "tool_format",
]
