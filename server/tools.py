"""Tools that a model may call: what the client offers and demands, checked."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import invalid, unsupported
from server.grammar import ANY_OBJECT
from server.json_values import parse_json
from server.protocol import ChatCompletionRequest

FUNCTION_EXAMPLE = '{"type": "function", "function": {"name": "..."}}'

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ToolChoice(enum.Enum):
    """Whether the model calls: never, as it likes, at least once, or one function that the client names."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class Function:
    """One that may be called. ``place`` is that of its tool in the request, for messages; ``parameters`` is a JSON schema."""

    place: str
    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tools:
    """``offered`` are handed to the chat template as they came; ``functions`` are those in them."""

    offered: tuple[Mapping[str, Any], ...] = ()
    functions: tuple[Function, ...] = ()
    choice: ToolChoice = ToolChoice.NONE
    name: str | None = None
    max_calls: int | None = None


def requested_tools(body: ChatCompletionRequest) -> Tools:
    """The tools of a request. Raises a 400 for what is wrong with them."""
    functions = [_function(tool, f"tools.{index}") for index, tool in enumerate(body.tools or ())]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise invalid("tools has two functions of one name", "tools")
    allowed, mode = _allowed(body.tool_choice, names)
    choice, name = _choice(mode, names)
    if choice is ToolChoice.NONE:
        return Tools()
    # What must not be called is not shown either: nothing else would keep a model that decides from calling it.
    kept = [(tool, function) for tool, function in zip(body.tools or (), functions, strict=True) if function.name in allowed]
    max_calls = 1 if body.parallel_tool_calls is False else None
    return Tools(tuple(tool for tool, _ in kept), tuple(function for _, function in kept), choice, name, max_calls)


def _function(tool: Mapping[str, Any], where: str) -> Function:
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type must be 'function'; other kinds of tools are not supported", "tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function must be an object", "tools")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"{where}.function.name must have 1 to 64 letters, digits, dots, dashes or underscores", "tools")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{where}.function.parameters must be a JSON schema", "tools")
    parameters = {**ANY_OBJECT, **(parameters or {})}
    if parameters["type"] != "object":
        raise invalid(f"{where}.function.parameters.type must be 'object': a call's arguments have names", "tools")
    return Function(where, name, parameters)


def _allowed(value: Any, names: Sequence[str]) -> tuple[Sequence[str], Any]:
    """The functions that a ``tool_choice`` leaves, and the choice among them."""
    if not isinstance(value, dict) or value.get("type") != "allowed_tools":
        return names, value
    where, allowed = "tool_choice.allowed_tools", value.get("allowed_tools")
    if not isinstance(allowed, dict):
        # The Responses API has mode and tools beside the type.
        form = '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
        raise invalid(f"{where} must be an object with mode and tools, as in {form}", "tool_choice")
    if allowed.get("mode") not in ("auto", "required"):
        raise invalid(f"{where}.mode must be auto or required", "tool_choice")
    listed = allowed.get("tools")
    if not isinstance(listed, list) or not listed:
        raise invalid(f"{where}.tools must be a list of functions that is not empty", "tool_choice")
    return [_named_function(tool, f"{where}.tools.{i}", names) for i, tool in enumerate(listed)], allowed["mode"]


def _named_function(value: Any, where: str, names: Sequence[str], others: str = "") -> str:
    """The name in FUNCTION_EXAMPLE's form. Raises a 400 for one that is not among the tools; ``others`` may stand there too."""
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid(f"{where} must be {others}a function such as {FUNCTION_EXAMPLE}", "tool_choice")
    if name not in names:
        raise invalid(f"{where} names {name[:64]!r}, which is not among the tools", "tool_choice")
    return name


def _choice(value: Any, names: Sequence[str]) -> tuple[ToolChoice, str | None]:
    if value is None:
        return (ToolChoice.AUTO if names else ToolChoice.NONE), None
    if value == "none":
        return ToolChoice.NONE, None
    if value == "auto" and not names:
        return ToolChoice.NONE, None
    if not names:
        raise invalid("tool_choice needs tools to choose from", "tool_choice")
    if value in ("auto", "required"):
        return ToolChoice(value), None
    others = "none, auto, required, allowed_tools or "
    return ToolChoice.NAMED, _named_function(value, "tool_choice", names, others)


def parsed_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """An assistant message's ``tool_calls`` as templates expect them: with the arguments as an object. Raises a 400."""
    if not isinstance(calls, list):
        raise invalid(f"{where}.tool_calls must be a list", "messages")
    parsed = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{where}.tool_calls.{index} must be a function call with a name", "messages")
        value = function.get("arguments") or {}
        if isinstance(value, str):
            value = parse_json(value, f"{where}.tool_calls.{index}.function.arguments", "messages")
        parsed.append({**call, "function": {**function, "arguments": value}})
    return parsed
