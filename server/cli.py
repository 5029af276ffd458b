"""The command ``tidar``. Each subcommand loads what it needs when it runs, so that ``--help`` and ``--version`` are quick."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

from engine import DecodingMode
from server.flags import Flag, Parser, add_flags, integer, number, one_of, resolve, text
from server.options import MODEL_VARIABLE, SERVE_FLAGS, serve_options
from server.version import version

_CHAT_FLAGS = (
    Flag("url", text, "http://127.0.0.1:8000", "where the server is"),
    Flag("api-key", text, (), "key to send", is_list=True),
    Flag("model", text, None, "model to ask for; the server's first if not given"),
    Flag("decoding", one_of(*(mode.value for mode in DecodingMode)), None, "how to decode"),
    Flag("temperature", number(0, 2), None, "0 is greedy"),
    Flag("system", text, None, "system message"),
    Flag("max-tokens", integer(1), None, "longest answer, in tokens"),
)
CHAT_FLAGS = tuple(dataclasses.replace(flag, prefix="TIDAR_CHAT_") for flag in _CHAT_FLAGS)
"""A prefix of their own: what ``TIDAR_MODEL`` tells the server is no name to ask it for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])  # its options are its own
    parser = Parser(prog="tidar", description="Serve language models that think in diffusion and talk in autoregression.")
    parser.add_argument("--version", action="version", version=f"tidar-server {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve_parser = commands.add_parser("serve", help="serve a model over HTTP", description="Serve a model over HTTP.")
    model_help = f"checkpoint folder or Hub id ({MODEL_VARIABLE}, default: the bundled model)"
    serve_parser.add_argument("model", nargs="?", metavar="MODEL", help=model_help)
    add_flags(serve_parser, SERVE_FLAGS)
    chat_parser = commands.add_parser("chat", help="talk to a server", description="Talk to a server from the terminal.")
    add_flags(chat_parser, CHAT_FLAGS)
    commands.add_parser("train", help="train the bundled model", add_help=False)

    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "serve":
            options = serve_options(serve_parser, parsed, os.environ)
            from server.serve import serve

            return serve(options)
        from server.terminal import ChatOptions, chat

        values = resolve(chat_parser, CHAT_FLAGS, parsed, os.environ)
        values["api_key"] = next(iter(values["api_key"]), None)
        return chat(ChatOptions(**values))
    except KeyboardInterrupt:
        return 130


def _train(arguments: Sequence[str]) -> int:
    module = importlib.import_module("training.stdlib")
    sys.argv = ["tidar train", *arguments]
    cast(Callable[[], None], module.main)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
