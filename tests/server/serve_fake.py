"""``tidar serve`` with a scripted engine, for tests of the process: ``python -m tests.server.serve_fake TOKENIZER [FLAGS]``.

A request whose ``max_tokens`` is 1000 or more never ends by itself; one whose seed is 13 kills the engine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from engine import EngineDeadError, GenerateRequest
from server.flags import Parser, add_flags
from server.options import SERVE_FLAGS, serve_options
from server.serve import StartError, bind, configure_logging, run
from server.tokenizer import load_tokenizer, torch_hidden
from tests.server.fake_engine import End, FakeEngine, Script, tidar_info


class Engine(FakeEngine):
    """Fails to start where the environment says so."""

    async def start(self) -> None:
        if os.environ.get("FAKE_START_FAILURE"):
            raise EngineDeadError(os.environ["FAKE_START_FAILURE"])


def make_engine() -> Engine:
    def script(request: GenerateRequest) -> Script:
        if request.sampling.seed == 13:
            engine.die("the engine process was killed by SIGKILL")
        return Script([[70]], end=End.HANG if request.sampling.max_tokens >= 1000 else End.EOS)

    engine = Engine(script, info=tidar_info(max_model_len=10_000))
    return engine


def main() -> int:
    parser = Parser(prog="serve_fake")
    parser.add_argument("model")
    add_flags(parser, SERVE_FLAGS)
    arguments: argparse.Namespace = parser.parse_args()
    options = serve_options(parser, arguments, os.environ)
    configure_logging(options.log_level)
    try:
        sock = bind(options.host, options.port)
    except StartError as error:
        print(error, file=sys.stderr)
        return 1

    def load():
        if os.environ.get("FAKE_SLOW_TOKENIZER"):
            print("loading the tokenizer", flush=True)
            time.sleep(600)
        with torch_hidden():
            return load_tokenizer(options.tokenizer)

    status = run(options, make_engine, load, sock)
    print("torch was imported" if "torch" in sys.modules else "torch was not imported", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
