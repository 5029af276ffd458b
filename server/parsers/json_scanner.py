"""JSON character by character: what comes next is known without looking back, in constant time and any depth."""

from __future__ import annotations

import json

SPACE = frozenset(" \t\n\r")
HEX = frozenset("0123456789abcdefABCDEF")
ESCAPES = frozenset('"\\/bfnrt')


def _scalar_table() -> dict[str, dict[str, str]]:
    """The states of a number or a literal: state, character, next state."""
    first = {"0": "zero", **dict.fromkeys("123456789", "integer")}
    exponent = {"e": "exponent", "E": "exponent"}
    integer, fraction, power = (dict.fromkeys("0123456789", state) for state in ("integer", "fraction", "power"))
    table = {
        "": {"-": "minus", **first},
        "minus": first,
        "zero": {".": "point", **exponent},
        "integer": {".": "point", **exponent, **integer},
        "point": fraction,
        "fraction": {**exponent, **fraction},
        "exponent": {"+": "sign", "-": "sign", **power},
        "sign": power,
        "power": power,
    }
    for word in ("true", "false", "null"):
        for end, character in enumerate(word):
            table.setdefault(word[:end], {})[character] = word[: end + 1]
        table[word] = {}
    return table


SCALARS = _scalar_table()
SCALAR_ENDS = frozenset({"zero", "integer", "fraction", "power", "true", "false", "null"})


class JsonScanner:
    """Follows one JSON value and says which top-level key the characters belong to.

    Outside strings it is strict. Strings are taken as models write them: raw control characters and backslashes that escape
    nothing are let in, and come back as JSON wants them. So the joined results of ``push`` are JSON whenever ``is_complete``.

    ``key`` is the key of the outermost object whose value the last character was part of, None between values.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.is_complete = False
        self._closers: list[str] = []
        self._state = self._value
        self._scalar = ""
        self._escape = ""
        self._is_key = False
        self._key_texts: list[str] = []
        self._next_key: str | None = None

    @property
    def depth(self) -> int:
        """Brackets that are open."""
        return len(self._closers)

    @property
    def value_is_complete(self) -> bool:
        """Whether the value of ``key`` ended with the last character. A number's end shows only behind it."""
        return self.key is not None and self.depth == 1 and self._state == self._after_value

    def push(self, character: str) -> str | None:
        """The JSON text that the character completes, None if it cannot come here. An escape comes as one text, at its end."""
        return self._state(character)

    def _value(self, character: str) -> str | None:
        if character in SPACE:
            return character
        if self.depth == 1:
            self.key = self._next_key
        if character == '"':
            self._state = self._string
        elif character == "{":
            self._closers.append("}")
            self._state = self._first_key
        elif character == "[":
            self._closers.append("]")
            self._state = self._first_item
        elif character in SCALARS[""]:
            self._scalar = SCALARS[""][character]
            self._state = self._in_scalar
        else:
            return None
        return character

    def _first_item(self, character: str) -> str | None:
        return self._close() if character == "]" else self._value(character)

    def _first_key(self, character: str) -> str | None:
        return self._close() if character == "}" else self._before_key(character)

    def _before_key(self, character: str) -> str | None:
        if character == '"':
            self._is_key = True
            self._key_texts.clear()
            self._state = self._string
            return character
        return character if character in SPACE else None

    def _before_colon(self, character: str) -> str | None:
        if character == ":":
            self._state = self._value
            return character
        return character if character in SPACE else None

    def _after_value(self, character: str) -> str | None:
        if self.depth <= 1:
            self.key = None
        if character in SPACE:
            return character
        if not self._closers:
            return None
        if character == self._closers[-1]:
            return self._close()
        if character == ",":
            self._state = self._before_key if self._closers[-1] == "}" else self._value
            return character
        return None

    def _in_scalar(self, character: str) -> str | None:
        state = SCALARS[self._scalar].get(character)
        if state is not None:
            self._scalar = state
            return character
        if self._scalar not in SCALAR_ENDS:
            return None
        self._end_value()
        return self._after_value(character)

    def _string(self, character: str) -> str:
        if character == '"':
            self._end_string()
            return character
        if character == "\\":
            self._escape = character
            self._state = self._in_escape
            return ""
        return self._in_string(json.dumps(character)[1:-1] if character < " " else character)

    def _in_escape(self, character: str) -> str:
        if self._escape == "\\" and character in ESCAPES:
            self._state = self._string
            return self._in_string(self._escape + character)
        if character in HEX if self._escape.startswith("\\u") else character == "u":
            self._escape += character
            if len(self._escape) < 6:
                return ""
            self._state = self._string
            return self._in_string(self._escape)
        self._state = self._string
        return self._in_string("\\" + self._escape) + self._string(character)

    def _in_string(self, text: str) -> str:
        if self._is_key:
            self._key_texts.append(text)
        return text

    def _end_string(self) -> None:
        if not self._is_key:
            self._end_value()
            return
        self._is_key = False
        self._state = self._before_colon
        if self.depth == 1:
            self._next_key = json.loads(f'"{"".join(self._key_texts)}"')

    def _close(self) -> str:
        closer = self._closers.pop()
        self._end_value()
        return closer

    def _end_value(self) -> None:
        self._state = self._after_value
        self.is_complete = not self._closers


class StringDecoder:
    """The characters of a JSON string, from its JSON text with the quotes. Halves of a surrogate pair become one character."""

    def __init__(self) -> None:
        self.is_complete = False
        self._is_open = False
        self._escape = ""
        self._high_surrogate = ""

    def push(self, text: str) -> str:
        """The characters that more JSON text gives."""
        decoded = self._high_surrogate + "".join(map(self._decode, text))
        self._high_surrogate = decoded[-1] if "\ud800" <= decoded[-1:] <= "\udbff" else ""
        decoded = decoded[: len(decoded) - len(self._high_surrogate)]
        return decoded.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def _decode(self, character: str) -> str:
        if self._escape:
            self._escape += character
            if len(self._escape) < (6 if self._escape[1] == "u" else 2):
                return ""
            escape, self._escape = self._escape, ""
            return str(json.loads(f'"{escape}"'))
        if character == "\\":
            self._escape = character
            return ""
        if character == '"':
            self.is_complete = self._is_open
            self._is_open = not self._is_open
            return ""
        return character
