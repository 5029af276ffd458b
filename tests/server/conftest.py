from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer, load_tokenizer
from tests.server.fake_engine import FakeEngine, Script

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|bos|>", "<|reserved|>", "<|mask|>")
BOS = 5

CHAT_TEMPLATE = (
    "<|bos|>{%- for message in messages -%}"
    "{%- if message.role == 'function' -%}{{ raise_exception('no functions here') }}{%- endif -%}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{%- endfor -%}<|assistant|>{{ mood }}"
)


TOOL_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

TOOL_TEMPLATE = (
    "<|bos|>{%- for tool in tools or [] -%}<|system|>{{ tool.function.name }}<|end|>{%- endfor -%}"
    "{%- for message in messages -%}<|{{ 'user' if message.role == 'tool' else message.role }}|>"
    "{%- if message.reasoning_content -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}{{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{%- endfor -%}<|end|>"
    "{%- endfor -%}<|assistant|>{%- if thinks -%}<think>{%- endif -%}"
)
"""Hermes' calls, and thinking that the prompt opens where ``thinks`` is set."""


def save_tiny_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE, extra_tokens: Sequence[str] = ()) -> None:
    """Byte-level BPE in which most bytes are tokens of their own, that puts BOS before a text."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*SPECIAL_TOKENS, *extra_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, the cat and the hat"] * 3, trainer)
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<|bos|> $A", pair=None, special_tokens=[("<|bos|>", BOS)])
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "mask_token": "<|mask|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="session")
def tool_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One with thinking and tool calls, whose tags are special tokens."""
    folder = tmp_path_factory.mktemp("tool_tokenizer")
    save_tiny_tokenizer(folder, TOOL_TEMPLATE, TOOL_TOKENS)
    return load_tokenizer(str(folder))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def make_app(tokenizer: Tokenizer) -> Callable[..., FastAPI]:
    def make(engine: FakeEngine, lifecycle: Any = None, words: Tokenizer = tokenizer, **settings: Any) -> FastAPI:
        return create_app(engine, ServerConfig(**settings), words, lifecycle=lifecycle)

    return make


@pytest.fixture
def make_client(make_app: Callable[..., FastAPI]) -> Callable[..., httpx.AsyncClient]:
    def make(engine: FakeEngine, **settings: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(make_app(engine, **settings))
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    return make


@contextlib.asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The app behind a real socket; yields its URL."""
    import asyncio

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5))
    task = asyncio.create_task(server._serve([sock]))
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def message_of(events: Sequence[Any], index: int = 0) -> dict[str, Any]:
    """The message that a stream's deltas join to, and how its chunks end, as the OpenAI clients put it together."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "logprobs": [], "finish_reason": None}
    for choice in (c for e in events if e != "[DONE]" for c in e["choices"] if c["index"] == index):
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for part in delta.get("tool_calls") or ():
            if part.get("id"):
                assert part["index"] == len(message["calls"]), "calls come one after the other"
                assert part["type"] == "function"
                message["calls"][part["index"]] = [part["function"]["name"], ""]
            message["calls"][part["index"]][1] += part["function"]["arguments"]
        message["logprobs"] += (choice.get("logprobs") or {}).get("content") or ()
        message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
    return {**message, "calls": [tuple(call) for call in message["calls"].values()]}


def message_of_whole(choice: dict[str, Any]) -> dict[str, Any]:
    """The same of an answer in one piece."""
    message = choice["message"]
    assert message.get("reasoning") == message.get("reasoning_content")
    return {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning") or "",
        "calls": [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()],
        "logprobs": (choice["logprobs"] or {}).get("content") or [],
        "finish_reason": choice["finish_reason"],
    }


def text_script(tokenizer: Tokenizer, text: str, step: int = 1, **kwargs: Any) -> Script:
    """The tokens of ``text``, ``step`` of them at a time."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Script([ids[i : i + step] for i in range(0, len(ids), step)], **kwargs)


def sse_data(body: str) -> list[Any]:
    """The events of a stream, parsed; ``[DONE]`` stays text. Raises on anything that is no event or comment."""
    events: list[Any] = []
    assert body.endswith("\n\n")
    for block in body[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        match = re.fullmatch(r"data: (.*)", block)
        assert match, block
        events.append("[DONE]" if match[1] == "[DONE]" else json.loads(match[1]))
    return events


def chat(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def stream_text(events: Sequence[Any], index: int = 0) -> str:
    parts = []
    for event in events:
        for choice in event["choices"] if event != "[DONE]" else ():
            if choice["index"] == index:
                parts.append(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])
    return "".join(parts)
