"""Tool calls in an answer's text, as model families write them.

A call begins, and its arguments stream, as soon as its name is known and its arguments have begun: what turns out earlier to be
no call becomes content, from its marker on. A call that breaks off later keeps the arguments it has, and the text that broke it
is content. A call that the end of the text cuts off keeps what it has. Where a grammar forces calls that can be its name alone,
and what comes before a name is dropped.

Whitespace between a call and what stands before and behind it is layout and dropped: chat templates put it back.
"""

from __future__ import annotations

from abc import abstractmethod

from server.parsers.calls import ArgumentsReader, CallObjectReader, CallReader
from server.parsers.characters import END, CharacterParser, Routine
from server.parsers.events import Content, ToolCallArguments, ToolCallBegin


class ToolParser(CharacterParser):
    """Text with calls. Calls beyond ``max_calls`` are read and dropped.

    ``_is_forced``: a grammar makes the text calls and nothing else, so a beginning that the end cuts off is that of a call.
    """

    _is_forced = False

    def __init__(self, *, max_calls: int | None = None) -> None:
        super().__init__()
        self._max_calls = max_calls
        self._num_calls = 0
        self._space: list[str] = []
        self._follows_call = False

    @abstractmethod
    def _answer(self) -> Routine[None]:
        """Read the whole text."""

    def _run(self) -> Routine[None]:
        yield from self._answer()
        if self._space:
            self._events.append(Content("".join(self._space)))

    def _write(self, text: str) -> None:
        """Text is content; whitespace waits until it is known not to stand before a call."""
        if self._follows_call:
            text = text.lstrip()
        if not text:
            return
        self._follows_call = False
        body = text.rstrip()
        if body:
            self._events.append(Content("".join((*self._space, body))))
            self._space.clear()
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def _give_back(self) -> None:
        """What was held is content."""
        self._write(self._take_held())

    def _leave_calls(self) -> None:
        """No further call follows: what was held behind the last one is content, but the beginning of a separator is not."""
        if self._at == END:
            self._held.clear()
        self._give_back()

    def _text(self, marker: str = "") -> Routine[bool]:
        """Read content up to the marker, which is held; whether there was one."""
        while self._at != END:
            if self._at == marker[:1] and (yield from self._match(marker)):
                return True
            self._write(self._at)
            yield
        self._give_back()
        return False

    def _call(self, reader: CallReader) -> Routine[bool]:
        """Read a call; whether it was complete. If it did not even begin, its text and all that was held is given back."""
        has_begun = False
        while not reader.is_complete:
            text = None if self._at == END else reader.push(self._at)
            if text is None:
                break
            self._held.append(self._at)
            if text:
                if not has_begun:
                    self._begin_call(reader.name)
                    has_begun = True
                self._continue_call(text)
            yield
        if has_begun and (reader.is_complete or self._at == END):
            self._held.clear()
        elif self._is_forced and self._at == END:
            self._cut_call(reader)
        self._give_back()
        return reader.is_complete and has_begun

    def _cut_call(self, reader: CallReader) -> None:
        """The text ended before the arguments began: a call whose name is known has none, and no other text is content."""
        if self._take_held().strip() and reader.name:
            self._begin_call(reader.name)

    def _begin_call(self, name: str) -> None:
        self._space.clear()
        self._follows_call = True
        if self._max_calls is None or self._num_calls < self._max_calls:
            self._events.append(ToolCallBegin(self._num_calls, name))
        self._num_calls += 1

    def _continue_call(self, text: str) -> None:
        self._held.clear()
        if self._max_calls is None or self._num_calls <= self._max_calls:
            self._events.append(ToolCallArguments(self._num_calls - 1, text))

    def _array(self) -> Routine[None]:
        """Read ``[call, ...]``, the bracket being at hand."""
        yield from self._hold()
        yield from self._hold_space()
        while (yield from self._call(CallObjectReader())):
            yield from self._hold_space()
            if self._at == "]":
                self._held.clear()
                yield
                return
            if self._at == ",":
                yield from self._hold()
                yield from self._hold_space()
            if self._at != "{":
                self._leave_calls()
                return


class HermesParser(ToolParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere in the text: Hermes, Qwen2.5, Qwen3."""

    BEGIN_TAG = "<tool_call>"
    END_TAG = "</tool_call>"
    markers = (BEGIN_TAG, END_TAG)

    def _answer(self) -> Routine[None]:
        while (yield from self._text(self.BEGIN_TAG)):
            yield from self._hold_space()
            yield from self._call(CallObjectReader())
            if self._follows_call:  # also one that lacks its last bracket
                yield from self._hold_space()
                if (yield from self._match(self.END_TAG)):
                    self._held.clear()
                self._leave_calls()


class Llama3Parser(ToolParser):
    """``{"name": ..., "parameters": {...}}`` as the whole answer or behind ``<|python_tag|>``: Llama 3.1 to 3.3.

    Further calls follow behind ``;``, whitespace or another tag. An object that is no call is held up to its end.
    """

    TAG = "<|python_tag|>"
    markers = (TAG,)

    def _answer(self) -> Routine[None]:
        yield from self._hold_space()
        if self._at == "{":
            yield from self._calls()
        self._give_back()
        while (yield from self._text(self.TAG)):
            yield from self._calls()

    def _calls(self) -> Routine[None]:
        yield from self._hold_space()
        while (yield from self._call(CallObjectReader(requires_arguments=True))):
            yield from self._hold_while(lambda character: character.isspace() or character == ";")
            yield from self._match(self.TAG)
            yield from self._hold_space()
            if self._at != "{":
                self._leave_calls()
                return


class MistralParser(ToolParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`` or ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}``.

    The call's id is optional, and not the one that clients get.
    """

    CALLS = "[TOOL_CALLS]"
    CALL_ID = "[CALL_ID]"
    ARGS = "[ARGS]"
    markers = (CALLS, CALL_ID, ARGS)

    def _answer(self) -> Routine[None]:
        while (yield from self._text(self.CALLS)):
            yield from self._hold_space()
            if self._at == "[":
                yield from self._array()
            else:
                yield from self._named_call()

    def _named_call(self) -> Routine[None]:
        name = yield from self._hold_while(_is_name_character)
        if (yield from self._match(self.CALL_ID)):
            yield from self._hold_while(_is_name_character)
        has_arguments = yield from self._match(self.ARGS)
        if not name or not has_arguments:
            self._give_back()
            return
        yield from self._hold_space()
        yield from self._call(ArgumentsReader(name))


def _is_name_character(character: str) -> bool:
    return character.isalnum() or character in "_-.:/"


class NamedFunctionParser(ToolParser):
    """An answer that a grammar makes the arguments of one function."""

    _is_forced = True

    def __init__(self, name: str, *, max_calls: int | None = None) -> None:
        super().__init__(max_calls=max_calls)
        self._name = name

    def _answer(self) -> Routine[None]:
        yield from self._hold_space()
        yield from self._call(ArgumentsReader(self._name))
        yield from self._text()


class CallArrayParser(ToolParser):
    """An answer that a grammar makes an array of calls, ``[{"name": ..., "parameters": {...}}, ...]``."""

    _is_forced = True

    def _answer(self) -> Routine[None]:
        yield from self._hold_space()
        if self._at == "[":
            yield from self._array()
        self._give_back()
        yield from self._text()
