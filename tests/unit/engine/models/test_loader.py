import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ModelConfig, TidarConfig
from engine.models import loader
from engine.models.hf_config import read_model_config, read_sampling_defaults
from engine.models.loader import ModelLoadError, load_model, resolve_dtype, resolve_model
from engine.models.transformer import Transformer
from tests.unit.engine.models.checkpoints import multimodal_model, tiny_tensors
from training.export import export, hf_tensors

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # Only named: nothing here runs on it.
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(folder, read_model_config(folder), dtype, CPU)


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ModelLoadError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Replace the single file by two shards and their index."""
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return shards


def test_merged_parameters_are_filled_by_slices(checkpoint: Path):
    tensors, layer = tiny_tensors(), load(checkpoint).layers[1]
    prefix = "model.layers.1."
    qkv = [tensors[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(qkv))
    assert torch.equal(layer.gate_up, torch.cat([tensors[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]))
    assert torch.equal(layer.input_norm, tensors[prefix + "input_layernorm.weight"])


def test_a_loaded_model_is_whole_and_frozen(checkpoint: Path):
    model = load(checkpoint)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {CPU}
    built = dict(Transformer(model.config).named_buffers())
    loaded = dict(model.named_buffers())
    assert built.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], built[name]) for name in built)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_have_the_dtype_that_was_asked_for(checkpoint: Path, dtype: torch.dtype):
    model = load(checkpoint, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.embedding, tiny_tensors()[EMBEDDING].to(dtype))


def test_progress_tells_of_files_and_of_what_was_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    write_shards(checkpoint, tiny_tensors())
    messages: list[str] = []
    monkeypatch.setattr(loader, "_REPORTED_BYTES", 2500)
    monkeypatch.setattr(loader, "_MIB", 1000)
    load_model(checkpoint, read_model_config(checkpoint), torch.float32, CPU, messages.append)
    total = sum(t.nbytes for t in tiny_tensors().values()) / 1000
    assert [m for m in messages if m.startswith("loaded")][1] == f"loaded {total:,.1f} MiB of weights, 2 of 2 files"
    amounts = [float(re.search(r"([\d,.]+) MiB", m).group(1).replace(",", "")) for m in messages]  # type: ignore[union-attr]
    assert amounts == sorted(amounts)
    assert len(amounts) > 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_holds_no_second_copy_in_host_memory(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Beside the model itself, memory of the process's own does not grow by one large tensor. Mapped files do not count."""
    config = replace(ModelConfig("LlamaForCausalLM", 8192, 512, 6, 8, 8, 64, 2048, 64), tie_word_embeddings=True)
    save_file(hf_tensors(Transformer(config)), tmp_path / "model.safetensors")
    peaks: list[int] = []
    allocate, store = loader._allocate, loader._store

    def allocate_and_touch(model: Transformer, device: torch.device) -> None:
        allocate(model, device)
        for parameter in model.parameters():
            parameter.zero_()  # untouched pages are not memory yet
        peaks.append(own_memory())

    def watched(place: Tensor, tensor: Tensor) -> None:
        store(place, tensor)
        peaks.append(own_memory())

    monkeypatch.setattr(loader, "_allocate", allocate_and_touch)
    monkeypatch.setattr(loader, "_store", watched)
    model = load_model(tmp_path, config, dtype, CPU)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 50e6
    assert max(peaks) - peaks[0] < 4e6


def own_memory() -> int:
    """Bytes of memory that belong to this process alone, files that it maps left out."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1))  # type: ignore[union-attr]


def test_stored_rotary_frequencies_are_ignored(checkpoint: Path):
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(2) for i in range(2)}
    save_file(tiny_tensors() | frequencies, checkpoint / "model.safetensors")
    load(checkpoint)


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_may_be_stored_or_not(checkpoint: Path, write_config: Callable[..., Path], stored: bool):
    write_config(tie_word_embeddings=True)
    tensors = tiny_tensors()
    del tensors[HEAD]
    if stored:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, checkpoint / "model.safetensors")
    assert load(checkpoint).lm_head is None


def test_a_tied_head_that_differs_is_refused(checkpoint: Path, write_config: Callable[..., Path]):
    write_config(tie_word_embeddings=True)
    message = error_of(lambda: load(checkpoint))
    assert "lm_head.weight in model.safetensors differs from it: set tie_word_embeddings to false" in message


def test_missing_surplus_and_wrong_tensors_are_one_error(checkpoint: Path):
    tensors = tiny_tensors()
    for name in ("q", "k", "v", "o"):
        del tensors[f"model.layers.0.self_attn.{name}_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    tensors["model.norm.weight"] = torch.zeros(8)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros((24, 16), dtype=torch.int8)
    save_file(tensors, checkpoint / "model.safetensors")
    message = error_of(lambda: load(checkpoint))
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in ("o", "q", "k")]
    assert f"4 missing ({', '.join(names)} and 1 more)" in message
    assert "1 unknown to LlamaForCausalLM (model.layers.0.self_attn.q_proj.bias)" in message
    assert "1 of another shape (model.norm.weight is [8], config.json says [16])" in message
    assert "1 of an unsupported type (model.layers.1.mlp.up_proj.weight is I8)" in message
    assert message.endswith("Check that both belong to one model")


def test_a_multimodal_checkpoint_s_tensors_are_named_as_they_are_stored(tmp_path: Path):
    multimodal_model("Ministral3ForCausalLM", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith("vision_tower.") for name in tensors)
    assert any(name.startswith("multi_modal_projector.") for name in tensors)
    tensors["audio_tower.weight"] = tensors.pop("language_model.lm_head.weight")
    tensors["language_model.model.norm.weight"] = torch.zeros(8)
    save_file(tensors, file)
    message = error_of(lambda: load(tmp_path))
    assert "1 missing (language_model.lm_head.weight)" in message
    assert "1 unknown to Mistral3ForConditionalGeneration (audio_tower.weight)" in message
    assert "1 of another shape (language_model.model.norm.weight is [8], config.json says [16])" in message


def test_an_untied_head_must_be_there(checkpoint: Path):
    tensors = tiny_tensors()
    del tensors[HEAD]
    save_file(tensors, checkpoint / "model.safetensors")
    assert "1 missing (lm_head.weight)" in error_of(lambda: load(checkpoint))


@pytest.mark.parametrize("content", ["cut in the data", "cut in the header", "empty", "pointer"])
def test_broken_safetensors(checkpoint: Path, content: str):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1234\n"
    file.write_bytes(
        {"cut in the data": whole[:-100], "cut in the header": whole[:50], "empty": b"", "pointer": pointer}[content]
    )
    message = error_of(lambda: load(checkpoint))
    assert f"{file} is truncated or not a safetensors file (" in message
    assert message.endswith("copy or download it again")


def test_missing_weights(checkpoint: Path):
    (checkpoint / "model.safetensors").unlink()
    assert "has no model.safetensors and no model.safetensors.index.json" in error_of(lambda: load(checkpoint))
    (checkpoint / "pytorch_model.bin").touch()
    message = error_of(lambda: load(checkpoint))
    assert "holds its weights as .bin only: convert them to safetensors" in message


def test_broken_shards(checkpoint: Path):
    shards = write_shards(checkpoint, tiny_tensors())
    (checkpoint / shards[1]).unlink()
    assert f"lacks 1 of 2 shards ({shards[1]}): download them again" in error_of(lambda: load(checkpoint))
    index = checkpoint / "model.safetensors.index.json"
    index.write_text("{}")
    assert f"{index} has no weight_map" in error_of(lambda: load(checkpoint))
    index.write_text("{")
    assert f"{index} is not readable as JSON" in error_of(lambda: load(checkpoint))


def test_memory_that_runs_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Transformer, device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Transformer, "to_empty", refuse)
    message = error_of(lambda: load(checkpoint))
    assert message == "0.0 GiB of weights cannot be allocated on cpu: free memory there, or use a smaller dtype or model"


def test_dtype_by_name_and_auto(write_config: Callable[..., Path]):
    folder = write_config(dtype="float16")
    assert resolve_dtype("auto", folder, CPU) is torch.float32
    assert resolve_dtype("auto", folder, CUDA) is torch.float16
    assert resolve_dtype("float64", folder, CPU) is torch.float64
    assert resolve_dtype("bfloat16", folder, CUDA) is torch.bfloat16
    assert resolve_dtype("auto", write_config(torch_dtype="float32"), CUDA) is torch.float32
    assert resolve_dtype("auto", write_config(), CUDA) is torch.bfloat16


def test_an_unknown_dtype(write_config: Callable[..., Path]):
    expected = "dtype 'int8' is not supported: use auto, float32, float16, bfloat16, float64"
    assert error_of(lambda: resolve_dtype("int8", write_config(), CPU)) == expected
    assert error_of(lambda: resolve_dtype("auto", write_config(dtype="int8"), CUDA)) == expected


def test_a_folder_is_its_own_answer(checkpoint: Path):
    assert resolve_model(str(checkpoint), None) == checkpoint
    assert "leave one of the two out" in error_of(lambda: resolve_model(str(checkpoint), "main"))
    message = error_of(lambda: resolve_model(str(checkpoint / "config.json"), None))
    assert "is a file: give the folder that holds config.json" in message


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "nowhere/"])
def test_a_path_that_does_not_exist_never_asks_the_hub(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "_download", lambda *arguments: pytest.fail("the Hub was asked"))
    assert f"there is no folder {path}: check the path, or give a Hub id" in error_of(lambda: resolve_model(path, None))


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, str | None]] = []

    def snapshot_download(model: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append((model, revision))
        adapter = ["linear_spec_lora/adapter_config.json", "linear_spec_lora/adapter_model.safetensors"]
        others = ["original/x.json", "linear_spec_lora2/x.json", "onnx/model/x.json", "lora/x.json"]
        files = ["config.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin", *adapter, *others]
        wanted = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(wanted) == ["config.json", "model.safetensors", *adapter]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("maker/model", "v2") == tmp_path
    assert calls == [("maker/model", "v2")]


def hub_error(kind: type[Exception]) -> Exception:
    """An instance without the HTTP response that its constructor asks for."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.GatedRepoError), "'maker/model' is gated: accept its terms on the Hub, then set HF_TOKEN"),
        (hub_error(errors.RepositoryNotFoundError), "'maker/model' is neither a folder nor a model on the Hub: check the name"),
        (hub_error(errors.RevisionNotFoundError), "the Hub has no revision 'v2' of 'maker/model': check --revision"),
        (errors.HFValidationError("bad"), "'maker/model' is neither a folder nor a Hub id such as"),
        (errors.LocalEntryNotFoundError("offline"), "is no folder and not in the local cache, and the Hub cannot be reached"),
        (OSError("disk\nfull"), "downloading revision 'v2' of 'maker/model' failed (disk full): try again"),
        (RuntimeError(), "failed (RuntimeError): try again"),
    ],
)
def test_downloads_that_fail(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert message in error_of(lambda: resolve_model("maker/model", "v2"))


def test_an_uncached_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real client, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = error_of(lambda: resolve_model("maker/model", None))
    assert message.startswith("'maker/model' is no folder and not in the local cache, and the Hub cannot be reached")


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_comes_back(tmp_path: Path, tied: bool):
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=32,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
        max_position=64,
        qk_norm=True,
        tie_word_embeddings=tied,
        tidar=TidarConfig(block_length=4, mask_token_id=7),
        eos_token_ids=(4,),
    )
    trained = Transformer(config)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    export(trained, tmp_path)
    assert read_model_config(tmp_path) == config
    assert read_sampling_defaults(tmp_path).temperature == 0.0
    loaded = load(tmp_path, torch.bfloat16)
    expected = {name: parameter.to(torch.bfloat16) for name, parameter in trained.named_parameters()}
    assert all(torch.equal(parameter, expected.pop(name)) for name, parameter in loaded.named_parameters())
    assert not expected
    assert (HEAD in load_file(tmp_path / "model.safetensors")) != tied
