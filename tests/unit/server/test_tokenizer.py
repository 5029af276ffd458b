from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models

from server.errors import ApiError
from server.tokenizer import TokenizerError, load_tokenizer
from tests.server.conftest import BOS, save_tiny_tokenizer

ROOT = Path(__file__).parents[3]


def test_bos_comes_with_a_text_and_not_with_a_template(tokenizer):
    assert tokenizer.encode("a", add_special_tokens=True)[0] == BOS
    ids = tokenizer.encode_chat([{"role": "user", "content": "a"}], {})
    assert ids.count(BOS) == 1


def test_what_a_template_refuses_is_a_400(tokenizer):
    with pytest.raises(ApiError, match="no functions here"):
        tokenizer.encode_chat([{"role": "function", "content": "a"}], {})
    with pytest.raises(ApiError, match="must not set tokenize"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}], {"tokenize": True})


def test_any_failure_of_a_template_is_a_400(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer._tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(ApiError, match="refuses this conversation"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}], {})


@pytest.mark.parametrize("name", ["messages", "conversation", "tools", "continue_final_message", "return_tensors"])
def test_what_the_tokenizer_sets_itself_is_no_template_argument(tokenizer, name):
    with pytest.raises(ApiError, match=f"must not set {name}"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}], {name: None})


def test_without_a_template_there_are_no_chats(tmp_path):
    save_tiny_tokenizer(tmp_path, chat_template=None)
    tokenizer = load_tokenizer(str(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(ApiError, match="/v1/completions"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}], {})


def test_an_unknown_architecture_does_not_hide_the_tokenizer(tmp_path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of", "auto_map": {"AutoConfig": "x.Y"}}')
    assert load_tokenizer(str(tmp_path)).encode("a", add_special_tokens=False)


def test_missing_and_broken_files_are_one_line(tmp_path):
    with pytest.raises(TokenizerError, match="has no tokenizer files") as missing:
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="there is no folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot load the tokenizer") as broken:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(missing.value) + str(broken.value)


def test_loading_needs_no_torch_and_leaves_it_importable(tokenizer_folder):
    code = (
        "import sys; from server.tokenizer import *\n"
        f"with torch_hidden(): t = load_tokenizer({str(tokenizer_folder)!r})\n"
        "assert t.encode_chat([{'role': 'user', 'content': 'a'}], {}) and 'torch' not in sys.modules\n"
        "import importlib.util; assert importlib.util.find_spec('torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_bytes_of_byte_level_tokens_join_to_the_text(tokenizer):
    text = "naïve 🙂\n\x00 cat"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(BOS) == b"<|bos|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_the_bytes_of_tokens_with_byte_fallback(tmp_path):
    vocabulary = {"<unk>": 0, "\u2581cat": 1, "<0xF0>": 2, "<0x9F>": 3, "<0x99>": 4, "<0x82>": 5, "<0x2>": 6}
    backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert b"".join(map(tokenizer.token_bytes, [1, 2, 3, 4, 5])) == " cat🙂".encode()
    assert tokenizer.token_bytes(6) == b"<0x2>"


def test_the_id_of_a_tag(tokenizer):
    assert tokenizer.id_of("<|bos|>") == BOS
    assert tokenizer.id_of("<think>") is None
