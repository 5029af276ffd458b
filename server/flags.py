"""Command-line flags that are environment variables too: ``--max-model-len`` is ``TIDAR_MAX_MODEL_LEN``. Flags win."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

ENV_PREFIX = "TIDAR_"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` with where to read more."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. ``parse`` raises ArgumentTypeError with what was expected.

    ``is_list``: may be given several times; its variable holds values with commas between them.
    ``is_switch``: ``--name`` and ``--no-name``; its variable holds 1 or 0. ``prefix``: how its variable begins.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    is_list: bool = False
    is_switch: bool = False
    prefix: str = ENV_PREFIX

    @property
    def variable(self) -> str:
        """The environment variable."""
        return self.prefix + self.name.upper().replace("-", "_")

    @property
    def destination(self) -> str:
        """The attribute of the parsed arguments."""
        return self.name.replace("-", "_")


def add_flags(parser: argparse.ArgumentParser, flags: Sequence[Flag]) -> None:
    """Add ``flags`` without defaults; ``resolve`` fills those in."""
    for flag in flags:
        shown = "" if flag.default in (None, ()) else f", default {flag.default}"
        text = f"{flag.help} ({flag.variable}{shown})".replace("%", "%%")
        if flag.is_switch:
            parser.add_argument(f"--{flag.name}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            action = "append" if flag.is_list else "store"
            metavar = flag.name.rpartition("-")[2].upper()
            parser.add_argument(
                f"--{flag.name}", action=action, type=flag.parse, default=argparse.SUPPRESS, metavar=metavar, help=text
            )


def resolve(
    parser: argparse.ArgumentParser, flags: Sequence[Flag], arguments: argparse.Namespace, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The value of each flag: given, else from the environment, else its default. A bad variable ends the program."""
    values: dict[str, Any] = {}
    for flag in flags:
        is_given = hasattr(arguments, flag.destination)
        value = getattr(arguments, flag.destination) if is_given else _from_environment(parser, flag, environ)
        values[flag.destination] = tuple(value) if flag.is_list else value
    return values


def _from_environment(parser: argparse.ArgumentParser, flag: Flag, environ: Mapping[str, str]) -> Any:
    text = environ.get(flag.variable)
    if text is None or not (text or flag.is_list):
        return flag.default
    try:
        if flag.is_list:
            return [flag.parse(part) for part in _list_parts(text)]
        return flag.parse(text)
    except argparse.ArgumentTypeError as error:
        parser.error(f"environment variable {flag.variable}: {error}")


def _list_parts(text: str) -> list[str]:
    """What stands between the commas. A list that is set but empty is a mistake: it could switch authentication off."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("it is set but holds no value; unset it, or give one")
    return parts


def text(value: str) -> str:
    """Any text but the empty one."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def switch(value: str) -> bool:
    """A yes or a no, as environment variables spell it."""
    match value.lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise argparse.ArgumentTypeError(f"expected 1 or 0, got {value!r}")


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A whole number between two bounds."""

    def parse(value: str) -> int:
        bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {value!r}") from None
        if number < minimum or (maximum is not None and number > maximum):
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {number}")
        return number

    return parse


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """A number between two bounds."""

    def parse(value: str) -> float:
        message = f"expected a number from {minimum:g} to {maximum:g}, got {value!r}"
        try:
            result = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(message) from None
        if not minimum <= result <= maximum:
            raise argparse.ArgumentTypeError(message)
        return result

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """One of some words."""

    def parse(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}; got {value!r}")
        return value

    return parse


def branches(value: str) -> int | None:
    """A number of branches; ``all`` is None."""
    return None if value == "all" else integer(1)(value)
