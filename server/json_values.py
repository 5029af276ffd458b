"""What a JSON value from a client must not hold, wherever it stands: endless nesting, and halves of characters.

Both are legal JSON, and what would trip over them (templates, grammars, the answer's encoding) names the wrong thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

from server.errors import ApiError, invalid

MAX_DEPTH = 100
"""Levels of brackets. Schemas take two for each object in an object; llguidance's own limit, a little higher, has no name."""

MAX_VALUES = 500_000
"""Of lists and objects that are more than numbers: looking at as many as a large body can hold would take seconds."""

_WORTH_A_LOOK = {str, dict, list}


def check_body(body: Mapping[str, Any]) -> None:
    """Raise a 400 that names the field, and the place in it where that is a list."""
    for name, value in body.items():
        if not _is_unicode(name):
            raise _half_a_character("the name of a field", None)
        try:
            _check_value(value, name, name)
        except ApiError:
            for index, item in enumerate(value if isinstance(value, list) else ()):
                _check_value(item, f"{name}.{index}", name)
            raise


def _check_value(value: Any, where: str, param: str) -> None:
    """Raise a 400 that says ``where``. Level by level: recursion would meet the depth that it is to find."""
    level: list[Any] = [value]
    num_values = 0
    for _ in range(MAX_DEPTH + 1):
        num_values += len(level)
        if num_values > MAX_VALUES:
            raise invalid(f"{where} has more than {MAX_VALUES} values; send less in one request", param)
        mappings = [item for item in level if isinstance(item, dict)]
        lists = [item for item in level if isinstance(item, list)]
        texts = [item for item in level if isinstance(item, str)]
        if not all(map(_is_unicode, chain(texts, chain.from_iterable(mappings)))):
            raise _half_a_character(where, param)
        if not mappings and not lists:
            return
        children = chain((mapping.values() for mapping in mappings), lists)
        # Of millions of token ids, only their types are looked at.
        level = [child for some in children if not _WORTH_A_LOOK.isdisjoint(map(type, some)) for child in some]
    raise _too_deep(where, param)


def parse_json(text: str, where: str, param: str) -> Any:
    """JSON that came inside a string. Raises a 400."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep(where, param) from None
    except ValueError as error:
        raise invalid(f"{where} is not JSON: {error}", param) from error
    _check_value(value, where, param)
    return value


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _half_a_character(where: str, param: str | None) -> ApiError:
    return invalid(f"{where} holds half of a surrogate pair (such as \\ud83d alone), which is no character", param)


def _too_deep(where: str, param: str) -> ApiError:
    return invalid(f"{where} is nested more than {MAX_DEPTH} levels deep; simplify it", param, code="nested_too_deeply")
