"""The tokenizer and chat template of a checkpoint. Text lives in the server; the engine knows token ids only."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.errors import invalid

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "spiece.model")

_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")


def _bytes_by_spelling() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_by_spelling()

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class TokenizerError(Exception):
    """The tokenizer cannot be loaded; the message is one line that says what to do."""


class Tokenizer:
    """Text to token ids and back, around a Transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Transformers warns about prompts longer than this. The context is checked elsewhere, with the engine's length.
        tokenizer.model_max_length = sys.maxsize
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = tokenizer.added_tokens_decoder
        self._added_ids = frozenset(added)
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.num_tokens: int = len(tokenizer)
        self.max_token_chars: int = max(map(len, tokenizer.get_vocab()))
        # What a client's chat_template_kwargs must not reach; a template sees the conversation as ``messages``.
        self._template_arguments = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str | None:
        """The template's text; None without one, or where there are several."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    def id_of(self, text: str) -> int | None:
        """The one token that is spelt like ``text``; None if there is none."""
        found: int | None = self._tokenizer.get_vocab().get(text)
        return found

    def special_id_of(self, text: str) -> int | None:
        """The same for what a grammar takes for special: to llguidance, that is every added token of the form ``<...>`` too."""
        token_id = self.id_of(text)
        is_tag = token_id in self._added_ids and text.startswith("<") and text.endswith(">")
        return token_id if token_id in self.special_ids or is_tag else None

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, which may be a part of a character.

        A byte-level vocabulary spells each byte with a character of its own, one with byte fallback writes ``<0xE2>``, and
        SentencePiece writes a space as U+2581. Added tokens are spelt as they are.
        """
        if token_id >= self.num_tokens:
            return b""
        spelling: str = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._added_ids:
            return spelling.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF.get(character, 63) for character in spelling)
        byte = _BYTE_FALLBACK.fullmatch(spelling)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return spelling.replace("\u2581", " ").encode()

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        # The decoder's description is a few lines, unlike the whole tokenizer's, which has the vocabulary in it.
        return self._backend is not None and "ByteLevel" in str(self._backend.decoder)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` adds what the checkpoint puts around a text, such as BOS.

        Raises a 400 for text that is not Unicode: JSON can spell half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid(
                f"the text holds half of a surrogate pair at character {error.start}; send whole characters"
            ) from None
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Render the conversation with the checkpoint's template and encode it; the template writes BOS where one belongs.

        Raises a 400 when there is no template, or when the template refuses the conversation.
        """
        if not self.has_chat_template:
            raise invalid("this model has no chat template; use /v1/completions", "messages")
        reserved = sorted(self._template_arguments & template_kwargs.keys())
        if reserved:
            raise invalid(f"chat_template_kwargs must not set {reserved[0]}", "chat_template_kwargs")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
        except Exception as error:
            # The template is a program of the checkpoint, and what it is fed comes from the client.
            logger.debug("the chat template failed", exc_info=True)
            raise invalid(f"the chat template refuses this conversation: {str(error)[:200]}", "messages") from error
        return self.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ``token_ids``; bytes that are not UTF-8 come out as U+FFFD, ids past the vocabulary as nothing."""
        known = [i for i in token_ids if i < self.num_tokens]
        if self._backend is not None:
            text: str = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
            return text
        text = self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return text

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's spelling of each token."""
        strings: list[str] = self._tokenizer.convert_ids_to_tokens(list(token_ids))
        return strings


def load_tokenizer(model: str, revision: str | None = None) -> Tokenizer:
    """Load from a checkpoint folder, or by a Hub id. Raises TokenizerError."""
    _check_folder(model)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False))
    except Exception as error:
        if not (Path(model) / "tokenizer.json").is_file():
            raise TokenizerError(f"cannot load the tokenizer of {model}: {_first_line(error)}") from error
    # An architecture that Transformers does not know hides a tokenizer that it can read all the same.
    try:
        return Tokenizer(PreTrainedTokenizerFast.from_pretrained(model))
    except Exception as error:
        raise TokenizerError(f"cannot load the tokenizer of {model}: {_first_line(error)}") from error


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """Let Transformers be imported without torch, which it needs for models only and which takes seconds and memory to load.

    For a process that never runs a model: Transformers remembers what it found. Nothing happens where torch is loaded already.
    """
    if "torch" in sys.modules:
        yield
        return
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # else it advises to install PyTorch
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[quiet]


def _check_folder(model: str) -> None:
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise TokenizerError(f"{model} has no tokenizer files: expected one of {', '.join(TOKENIZER_FILES)}")
    elif not _HUB_ID.fullmatch(model):
        raise TokenizerError(f"there is no folder {model}; give a checkpoint folder or a Hub id such as org/name")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
