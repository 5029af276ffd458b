"""Grammars of tool calls: of those that a client demands, and of those that a model may make instead of a constrained answer.

Each function's parameters are a grammar of their own, so the references in a schema start where its author meant them to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from server.grammar import JSON_OPTIONS, checked_grammar, combined, json_grammar
from server.parsers import ToolFormat
from server.parsers.tools import HermesParser, Llama3Parser, MistralParser
from server.tools import Function, ToolChoice, Tools

COLON, COMMA = f"/{JSON_OPTIONS['key_separator']}/", f"/{JSON_OPTIONS['item_separator']}/"
SEMICOLON, NEWLINE = r"/;\x20?/", r'"\n"?'
"""Terms of lark."""

TokenIdOf = Callable[[str], int | None]
"""The special token that is spelt like a text, if there is one."""


async def forced_grammar(tools: Tools) -> str | None:
    """The grammar of a call that the client demands; None where the model decides. Raises a 400 for a wrong schema.

    A named function is answered by its arguments alone, ``required`` by an array of ``{"name", "parameters"}``.
    """
    if tools.choice is ToolChoice.NAMED:
        [named] = (function for function in tools.functions if function.name == tools.name)
        return await _parameters_grammar(named)
    if tools.choice is not ToolChoice.REQUIRED:
        return None
    calls = [_call_object(i, function, "parameters") for i, function in enumerate(tools.functions)]
    return await _with_parameters(f"start: {_array(tools)}\n{_rule('call', calls)}", tools)


async def answer_or_calls(answer: str, tools: Tools, written: ToolFormat, id_of: TokenIdOf) -> str:
    """Either the ``answer`` of another grammar, or calls as the model writes them. Raises a 400 for a wrong schema."""
    rules = {ToolFormat.HERMES: _hermes, ToolFormat.LLAMA3: _llama3, ToolFormat.MISTRAL: _mistral}[written](tools, id_of)
    return await _with_parameters(f"start: @answer | calls\n{rules}", tools, answer=answer)


def _hermes(tools: Tools, id_of: TokenIdOf) -> str:
    begin, end = _marker(HermesParser.BEGIN_TAG, id_of), _marker(HermesParser.END_TAG, id_of)
    calls = [
        f"{begin} {NEWLINE} {_call_object(i, function, 'arguments')} {NEWLINE} {end}"
        for i, function in enumerate(tools.functions)
    ]
    return f"calls: {_several(tools, NEWLINE)}\n{_rule('call', calls)}"


def _llama3(tools: Tools, id_of: TokenIdOf) -> str:
    calls = [_call_object(i, function, "parameters") for i, function in enumerate(tools.functions)]
    return f"calls: {_marker(Llama3Parser.TAG, id_of)}? {_several(tools, SEMICOLON)}\n{_rule('call', calls)}"


def _mistral(tools: Tools, id_of: TokenIdOf) -> str:
    """An array, or where the vocabulary has the tokens for it, one call after the other."""
    begin = _marker(MistralParser.CALLS, id_of)
    calls = [_call_object(i, function, "arguments") for i, function in enumerate(tools.functions)]
    array = f"{begin} {_array(tools)}"
    rules = _rule("call", calls)
    if id_of(MistralParser.ARGS) is None:
        return f"calls: {array}\n{rules}"
    has_call_id = id_of(MistralParser.CALL_ID) is not None
    call_id = f"({_marker(MistralParser.CALL_ID, id_of)} /[A-Za-z0-9]{{9}}/)?" if has_call_id else ""
    args = _marker(MistralParser.ARGS, id_of)
    named = [f"{begin} {_text(function.name)} {call_id} {args} @parameters_{i}" for i, function in enumerate(tools.functions)]
    several = "named" if tools.max_calls == 1 else "named+"
    return f"calls: {array} | {several}\n{rules}\n{_rule('named', named)}"


def _call_object(index: int, function: Function, key: str) -> str:
    """In the lexemes of JSON, so that an answer that begins like a call is still told apart."""
    name, own, arguments = (_text(json.dumps(text)) for text in ("name", function.name, key))
    return f'"{{" {name} {COLON} {own} {COMMA} {arguments} {COLON} @parameters_{index} "}}"'


def _array(tools: Tools) -> str:
    return f'"[" {_several(tools, COMMA)} "]"'


def _several(tools: Tools, separator: str) -> str:
    return "call" if tools.max_calls == 1 else f"call ({separator} call)*"


def _rule(name: str, alternatives: Sequence[str]) -> str:
    """A rule for each alternative, so that the one of many tools stays short."""
    names = [f"{name}_{i}" for i in range(len(alternatives))]
    rules = (f"{own}: {alternative}" for own, alternative in zip(names, alternatives, strict=True))
    return "\n".join([f"{name}: {' | '.join(names)}", *rules])


def _marker(text: str, id_of: TokenIdOf) -> str:
    """A marker that is a special token is named by it, since no text can match one."""
    token_id = id_of(text)
    return _text(text) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return json.dumps(text)


async def _with_parameters(start: str, tools: Tools, **others: str) -> str:
    """The grammar of ``start`` and of everything that it refers to."""
    parameters = [await _parameters_grammar(function) for function in tools.functions]
    parts = {f"parameters_{i}": grammar for i, grammar in enumerate(parameters)}
    return await checked_grammar(combined(start, {**parts, **others}), "tools")


async def _parameters_grammar(function: Function) -> str:
    return await json_grammar(function.parameters, "tools", f"{function.place}.function.parameters")
