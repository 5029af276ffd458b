"""One tool call, as the text of its JSON comes in."""

from __future__ import annotations

from typing import Protocol

from server.parsers.json_scanner import JsonScanner, StringDecoder

ARGUMENT_KEYS = ("arguments", "parameters")


class CallReader(Protocol):
    """Reads one call. ``name`` is known from the first text of the arguments on."""

    @property
    def name(self) -> str: ...

    @property
    def is_complete(self) -> bool:
        """Whether the call's last character was read."""
        ...

    def push(self, character: str) -> str | None:
        """More of the arguments' JSON text, None if the character cannot be part of a call. A last character gives some."""
        ...


class ArgumentsReader:
    """The arguments of a call whose name came otherwise: one JSON value."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._scanner = JsonScanner()
        self._object = _ArgumentsObject()

    @property
    def is_complete(self) -> bool:
        return self._scanner.is_complete

    def push(self, character: str) -> str | None:
        text = self._scanner.push(character)
        return None if text is None else self._object.push(text)


class CallObjectReader:
    """``{"name": ..., "arguments": {...}}``, in any order and with any other keys; ``parameters`` is the same as ``arguments``.

    Arguments wait for the name. A call without any has ``{}``, unless ``requires_arguments``: without a marker in front, an
    object that merely has a name is no call.
    """

    def __init__(self, *, requires_arguments: bool = False) -> None:
        self.name = ""
        self._requires_arguments = requires_arguments
        self._scanner = JsonScanner()
        self._name_decoder = StringDecoder()
        self._name_texts: list[str] = []
        self._object = _ArgumentsObject()
        self._has_arguments = False
        self._unsent: list[str] = []

    @property
    def is_complete(self) -> bool:
        return self._scanner.is_complete

    def push(self, character: str) -> str | None:
        if not self._scanner.depth and character != "{":
            return None
        text = self._scanner.push(character)
        if text is None or not self._take(text):
            return None
        if not self.name:
            return ""
        arguments = "".join(self._unsent)
        self._unsent.clear()
        return arguments

    def _take(self, text: str) -> bool:
        """Take JSON text; whether it can be part of a call."""
        if self._scanner.key == "name" and not self.name:
            return self._take_name(text)
        if self._scanner.key in ARGUMENT_KEYS and not self._has_arguments:
            arguments = self._object.push(text)
            self._has_arguments = self._scanner.value_is_complete
            self._unsent.append(arguments or "")
            return arguments is not None
        if self.is_complete and not self._has_arguments:
            self._unsent.append("{}")
            return bool(self.name) and not self._requires_arguments
        return bool(self.name) or not self.is_complete

    def _take_name(self, text: str) -> bool:
        if not self._name_texts and text != '"':
            return False
        self._name_texts.append(self._name_decoder.push(text))
        if self._name_decoder.is_complete:
            self.name = "".join(self._name_texts)
            return bool(self.name)
        return True


class _ArgumentsObject:
    """The object that a JSON value is, or that it contains as a string."""

    def __init__(self) -> None:
        self._decoder: StringDecoder | None = None
        self._scanner = JsonScanner()
        self._has_begun = False

    def push(self, text: str) -> str | None:
        """The object's JSON text in more of the value's, None if it is no such value."""
        if not self._has_begun and text not in ("{", '"'):
            return None
        if not self._has_begun and text == '"':
            self._decoder = StringDecoder()
        self._has_begun = True
        return text if self._decoder is None else self._unwrap(self._decoder, text)

    def _unwrap(self, decoder: StringDecoder, text: str) -> str | None:
        texts: list[str] = []
        for character in decoder.push(text):
            if not self._scanner.depth and character.isspace():
                continue
            scanned = self._scanner.push(character) if self._scanner.depth or character == "{" else None
            if scanned is None:
                return None
            texts.append(scanned)
        if decoder.is_complete and not self._scanner.is_complete:
            return None
        return "".join(texts)
