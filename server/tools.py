"""Tools that a model may call: what the client offers and demands, checked; the grammar of a call that is forced."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import invalid, unsupported
from server.grammar import ANY_OBJECT, json_grammar
from server.json_values import parse_json
from server.protocol import ChatCompletionRequest

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ToolChoice(enum.Enum):
    """Whether the model calls: never, as it likes, at least once, or one function that the client names."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class Tools:
    """``offered`` are handed to the chat template as they came; ``parameters`` are the functions' schemas by name."""

    offered: tuple[Mapping[str, Any], ...] = ()
    parameters: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    choice: ToolChoice = ToolChoice.NONE
    name: str | None = None
    max_calls: int | None = None


def requested_tools(body: ChatCompletionRequest) -> Tools:
    """The tools of a request. Raises a 400 for what is wrong with them."""
    offered = body.tools or []
    functions = tuple(_function(tool, f"tools.{index}") for index, tool in enumerate(offered))
    names = [name for name, _ in functions]
    if len(set(names)) < len(names):
        raise invalid("tools has two functions of one name", "tools")
    choice, name = _choice(body.tool_choice, names)
    if choice is ToolChoice.NONE:
        return Tools()
    return Tools(tuple(offered), functions, choice, name, 1 if body.parallel_tool_calls is False else None)


def _function(tool: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
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
    return name, parameters


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
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid("tool_choice must be none, auto, required or a function such as "
                      '{"type": "function", "function": {"name": "..."}}', "tool_choice")  # fmt: skip
    if name not in names:
        raise invalid(f"tool_choice names {name[:64]!r}, which is not among the tools", "tool_choice")
    return ToolChoice.NAMED, name


async def forced_grammar(tools: Tools) -> str | None:
    """The grammar of a call that the client demands; None where the model decides. Raises a 400 for a wrong schema.

    A named function is answered by its arguments alone, ``required`` by an array of ``{"name", "parameters"}``.
    """
    if tools.choice not in (ToolChoice.NAMED, ToolChoice.REQUIRED):
        return None
    for index, (name, parameters) in enumerate(tools.parameters):
        if tools.choice is ToolChoice.REQUIRED or name == tools.name:
            grammar = await json_grammar(parameters, "tools", f"tools.{index}.function.parameters")
    if tools.choice is ToolChoice.NAMED:
        return grammar
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "parameters": _moved(parameters, f"#/items/anyOf/{i}/properties/parameters"),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, (name, parameters) in enumerate(tools.parameters)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if tools.max_calls is not None:
        schema["maxItems"] = tools.max_calls
    return await json_grammar(schema, "tools", "the schema of the calls")


def _moved(schema: Any, place: str) -> Any:
    """A schema that has become a part of another: its references start from its new place."""
    if isinstance(schema, list):
        return [_moved(child, place) for child in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(child, place) for key, child in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


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
