from __future__ import annotations

import dataclasses
import sys
import types

import pytest

from engine import CacheConfig, DecodingMode, EngineConfig, SchedulerConfig
from server import cli, options, serve
from server.flags import Parser, add_flags
from server.options import SERVE_FLAGS, serve_options

FLAGS = """--host --port --served-model-name --api-key --cors-origins --tokenizer --revision --device --dtype --quantization
--max-model-len --max-num-seqs --max-num-batched-tokens --num-pages --page-size --enable-prefix-caching --gpu-memory-utilization
--decoding --block-length --num-branches --draft-temperature --trust-ar --diffusion-threshold
--tool-call-parser --reasoning-parser --async-depth --cost-cache --enforce-eager --max-waiting-requests --max-waiting-tokens
--shutdown-timeout --heartbeat-deadline --num-threads --kernels --batch-invariant --log-level"""


def resolve(*argv, **environ):
    parser = Parser(prog="tidar serve")
    parser.add_argument("model", nargs="?")
    add_flags(parser, SERVE_FLAGS)
    return serve_options(parser, parser.parse_args(argv), environ)


def test_the_flags_are_an_interface():
    assert [f"--{flag.name}" for flag in SERVE_FLAGS] == FLAGS.split()


def test_defaults_are_the_engines(tmp_path):
    resolved = resolve(str(tmp_path))
    expected = EngineConfig(model=str(tmp_path))
    assert resolved.engine == dataclasses.replace(expected, decode=dataclasses.replace(expected.decode, mode=DecodingMode.AUTO))
    assert resolved.server.served_model_names == (tmp_path.name,)
    assert (resolved.host, resolved.port, resolved.tokenizer) == ("127.0.0.1", 8000, str(tmp_path))


def test_every_engine_flag_arrives(tmp_path):
    flags = """--device cpu --dtype bfloat16 --max-model-len 99 --max-num-seqs 3 --max-num-batched-tokens 44 --num-pages 5
    --page-size 6 --no-enable-prefix-caching --gpu-memory-utilization 0.5 --decoding ar --block-length 4 --num-branches all
    --async-depth 1 --cost-cache /c --enforce-eager
    --max-waiting-requests 7 --max-waiting-tokens 88 --num-threads 2 --revision abc --quantization fp8 --batch-invariant"""
    resolved = resolve(str(tmp_path), *flags.split())
    engine = resolved.engine
    assert (engine.device, engine.dtype, engine.max_model_len, engine.num_threads, engine.revision) == (
        *("cpu", "bfloat16", 99, 2),
        "abc",
    )
    assert engine.cache == CacheConfig(page_size=6, num_pages=5, enable_prefix_caching=False, gpu_memory_utilization=0.5)
    limits = SchedulerConfig(
        max_num_seqs=3, max_num_batched_tokens=44, max_waiting_requests=7, max_waiting_tokens=88, async_depth=1
    )
    assert engine.scheduler == limits
    assert (engine.enforce_eager, engine.cost_cache) == (True, "/c")
    assert (engine.quantize_fp8, engine.batch_invariant) == (True, True)
    assert resolved.server.limits == limits
    assert (engine.decode.mode, engine.decode.block_length, engine.decode.num_branches) == (DecodingMode.AR, 4, None)


def test_flags_win_over_the_environment(tmp_path):
    environ = {
        "TIDAR_PORT": "1",
        "TIDAR_HOST": "::",
        "TIDAR_API_KEY": "a, b",
        "TIDAR_ENABLE_PREFIX_CACHING": "0",
        "TIDAR_MODEL": str(tmp_path),
    }
    resolved = resolve("--port", "2", **environ)
    assert (resolved.port, resolved.host, resolved.server.api_keys) == (2, "::", ("a", "b"))
    assert not resolved.engine.cache.enable_prefix_caching
    assert resolved.engine.model == str(tmp_path)
    assert resolve("--api-key", "c", "--enable-prefix-caching", **environ).server.api_keys == ("c",)
    assert "a, b" not in "".join(resolved.lines())


BAD = [
    (("--port", "x"), {}, "--port"),
    (("--port", "65536"), {}, "from 0 to 65535"),
    (("--dtype", "int8"), {}, "expected one of auto"),
    (("--decoding", "fast"), {}, "expected one of auto, ar"),
    (("--num-branches", "none"), {}, "--num-branches"),
    (("--gpu-memory-utilization", "nan"), {}, "from 0.05 to 1"),
    (("--max-num-seqs", "8", "--max-num-batched-tokens", "4"), {}, "must be at least --max-num-seqs 8"),
    (("--nonsense",), {}, "--nonsense"),
    ((), {"TIDAR_MAX_MODEL_LEN": "-1"}, "TIDAR_MAX_MODEL_LEN"),
    ((), {"TIDAR_ENABLE_PREFIX_CACHING": "maybe"}, "expected 1 or 0"),
    ((), {"TIDAR_API_KEY": " , "}, "TIDAR_API_KEY"),
    ((), {"TIDAR_API_KEY": ""}, "TIDAR_API_KEY"),
]


@pytest.mark.parametrize(("argv", "environ", "message"), BAD)
def test_bad_values_are_one_line(capsys, tmp_path, argv, environ, message):
    with pytest.raises(SystemExit) as ended:
        resolve(str(tmp_path), *argv, **environ)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_the_bundled_model_is_the_default(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(options, "BUNDLED_MODEL", tmp_path)
    with pytest.raises(SystemExit):
        resolve()
    assert "bundled model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    resolved = resolve()
    assert resolved.engine.model == str(tmp_path)
    assert resolved.server.served_model_names == (options.BUNDLED_MODEL_NAME,)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("tidar-server ")


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in FLAGS.split())
    assert "TIDAR_PORT" in out
    assert "TIDAR_MODEL" in out


def test_the_variables_of_chat_are_not_those_of_serve():
    assert not {flag.variable for flag in cli.CHAT_FLAGS} & {*(flag.variable for flag in SERVE_FLAGS), options.MODEL_VARIABLE}


def test_a_revision_is_the_models_and_not_that_of_another_tokenizer(monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "load_tokenizer", lambda *arguments: seen.append(arguments))
    for flags in (["--tokenizer", "org/b"], []):
        serve._load_tokenizer(resolve("org/a", "--revision", "abc", *flags))()
    assert seen == [("org/b", None), ("org/a", "abc")]


def test_train_gets_the_rest_of_the_command_line(monkeypatch):
    module = types.ModuleType("training.stdlib")
    seen = []
    module.main = lambda: seen.append(list(sys.argv))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training.stdlib", module)
    monkeypatch.setattr(sys, "argv", ["tidar"])
    assert cli.main(["train", "--minutes", "1"]) == 0
    assert seen == [["tidar train", "--minutes", "1"]]
