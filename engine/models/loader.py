"""Finds a checkpoint and streams its tensors into the model, each straight to its place.

A checkpoint is a Hugging Face folder: ``config.json`` and ``model.safetensors``, or shards named by
``model.safetensors.index.json``. Everything that can be wrong with one ends as a ModelLoadError of one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig
from engine.models.transformer import DecoderLayer, Transformer
from kernels.backend import REFERENCE, Kernels

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
"""The element types that a model can run in, by the names that configurations use."""

_SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_DERIVED = "rotary_emb.inv_freq"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# Folders hold other formats (`original/`), and `consolidated` is a second copy of the weights under the maker's own names.
_NOT_DOWNLOADED = ("*/*", "consolidated*")
_NAMES_IN_ERROR = 3


class ModelLoadError(Exception):
    """A checkpoint cannot be loaded; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """What a safetensors header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def resolve_model(model: str, revision: str | None) -> Path:
    """Return the checkpoint's folder: ``model`` itself if it is one, else the Hub's files of that id, downloaded or cached.

    Raises ModelLoadError when there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelLoadError(
                f"{model} is a folder, and a revision ({revision}) belongs to a Hub id: leave one of the two out"
            )
        return folder
    if folder.exists():
        raise ModelLoadError(f"{model} is a file: give the folder that holds config.json and the weights")
    if model.startswith(("/", ".", "~")) or not 1 <= len(model.split("/")) <= 2 or "" in model.split("/"):
        raise ModelLoadError(f"there is no folder {model}: check the path, or give a Hub id such as Qwen/Qwen3-0.6B")
    return _download(model, revision)


def resolve_dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """Return the element type by name; ``auto`` is the checkpoint's own on a GPU and float32 on a CPU.

    A CPU computes float32 faster than the half types, unless it has matrix instructions for them. A checkpoint that does
    not say is taken for bfloat16. Raises ModelLoadError for a name that is not in DTYPES.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        config = read_json(folder / "config.json")
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if name not in DTYPES:
        raise ModelLoadError(f"dtype {name!r} is not supported: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None] = lambda message: None,
    kernels: Kernels = REFERENCE,
) -> Transformer:
    """Return the model with the folder's weights, in eval mode and without gradients.

    All names and shapes are checked before memory is taken, and one tensor at a time is read from the mapped file, so the
    host never holds a second copy of the model. The rotary tables are left to ``Transformer.build_rope``: their length is
    the caller's. Raises ModelLoadError.
    """
    files = _weight_files(folder)
    stored = {name: tensor for file in files for name, tensor in _read_header(file).items()}
    with torch.device("meta"):
        model = Transformer(config, kernels).to(dtype).requires_grad_(False).eval()
    _check(stored, named_tensors(model), config, folder)
    _allocate(model, device)
    _fill(files, named_tensors(model), progress)
    if config.tie_word_embeddings and _HEAD in stored:
        _check_tied_head(stored[_HEAD].file, model.embedding)
    return model


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a checkpoint's file. Raises ModelLoadError when there is none."""
    if not file.exists():
        raise ModelLoadError(f"{file.parent} has no {file.name}: give a Hugging Face checkpoint folder or a Hub id")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} is not readable as JSON ({_one_line(error)}): copy or download it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} does not hold a JSON object: copy or download it again")
    return value


def named_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by Hugging Face's name: the model's parameters, or views of those that are merged there."""
    places: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if model.lm_head is not None:
        places[_HEAD] = model.lm_head
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        places |= {f"model.layers.{index}.{name}": place for name, place in _layer_tensors(layer).items()}
    return places


def _download(model: str, revision: str | None) -> Path:
    # Imported here: a folder needs no network client, and start-up from one should not pay for it.
    from huggingface_hub import errors, snapshot_download

    version = f"revision {revision!r} of {model!r}" if revision else repr(model)
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=[*_DOWNLOADED], ignore_patterns=[*_NOT_DOWNLOADED])
        )
    except errors.GatedRepoError as error:
        raise ModelLoadError(f"{model!r} is gated: accept its terms on the Hub, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{model!r} is neither a folder nor a model on the Hub: check the name, and set HF_TOKEN if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelLoadError(f"the Hub has no {version}: check --revision") from error
    except errors.HFValidationError as error:
        raise ModelLoadError(f"{model!r} is neither a folder nor a Hub id such as Qwen/Qwen3-0.6B: check the name") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{version} is no folder and not in the local cache, and the Hub cannot be reached: check the name and the network"
        ) from error
    except Exception as error:  # The client's transport errors have no common base, and change with its version.
        raise ModelLoadError(f"downloading {version} failed ({_one_line(error)}): try again or give a folder") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, every one of which exists."""
    if (folder / _SINGLE_FILE).exists():
        return [folder / _SINGLE_FILE]
    if not (folder / _INDEX).exists():
        if any(folder.glob("*.bin")):
            raise ModelLoadError(
                f"{folder} holds its weights as .bin only: convert them to safetensors (Transformers: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder))"
            )
        raise ModelLoadError(f"{folder} has no {_SINGLE_FILE} and no {_INDEX}: give a folder with safetensors weights")
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{folder / _INDEX} has no weight_map: copy or download it again")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelLoadError(f"{folder} lacks {len(missing)} of {len(names)} shards ({_some(missing)}): download them again")
    return [folder / name for name in names]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{file} is truncated or not a safetensors file ({_one_line(error)}): copy or download it again"
        ) from error


def _read_header(file: Path) -> dict[str, _StoredTensor]:
    """What the file holds. Rotary frequencies, which old checkpoints store, are left out: here they are derived."""
    with _opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.offset_keys() if not name.endswith(_DERIVED)}
        return {name: _StoredTensor(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _layer_tensors(layer: DecoderLayer) -> dict[str, Tensor]:
    places: dict[str, Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "post_attention_layernorm.weight": layer.post_attention_norm,
        "self_attn.o_proj.weight": layer.output,
        "self_attn.o_proj.bias": layer.output_bias,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    heads = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
    for kind, qkv, gate_up in (("weight", layer.qkv, layer.gate_up), ("bias", layer.qkv_bias, layer.gate_up_bias)):
        if qkv is not None:
            parts = qkv.split([count * layer.head_dim for count in heads])
            places |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        if gate_up is not None:
            places |= {f"mlp.{name}_proj.{kind}": part for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True)}
    if layer.qk_norm is not None:
        places |= {f"self_attn.{name}_norm.weight": row for name, row in zip("qk", layer.qk_norm, strict=True)}
    return {name: place for name, place in places.items() if place is not None}


def _check(stored: dict[str, _StoredTensor], places: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Raise one ModelLoadError that names what is missing, surplus, of another shape or of a type that is not a float."""
    # A tied checkpoint may store its head once more; `_check_tied_head` looks at it.
    ignored = {_HEAD} if config.tie_word_embeddings else set()
    both = [name for name in places if name in stored]
    shapes = [(name, list(stored[name].shape), list(places[name].shape)) for name in both]
    problems = {
        "missing": [name for name in places if name not in stored],
        f"unknown to {config.architecture}": [name for name in stored if name not in places and name not in ignored],
        "of another shape": [
            f"{name} is {found}, config.json says {wanted}" for name, found, wanted in shapes if found != wanted
        ],
        "of an unsupported type": [f"{n} is {stored[n].dtype}" for n in both if stored[n].dtype not in _FLOATS],
    }
    found = [f"{len(names)} {problem} ({_some(names)})" for problem, names in problems.items() if names]
    if found:
        raise ModelLoadError(
            f"the tensors in {folder} do not fit its config.json: {'; '.join(found)}. Check that both belong to one model"
        )


def _allocate(model: Transformer, device: torch.device) -> None:
    """Move a model from the meta device to ``device``. Parameters are left uninitialised; buffers get their values."""
    try:
        model.to_empty(device=device)
    except RuntimeError as error:
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        raise ModelLoadError(
            f"{size:.1f} GiB of weights cannot be allocated on {device}: free memory there, or use a smaller dtype or model"
        ) from error
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        # The only values that the meta device forgot: which of the normalised heads are queries (0) and which keys (1).
        layer.head_kind[: layer.num_heads], layer.head_kind[layer.num_heads :] = 0, 1


def _fill(files: list[Path], places: dict[str, Tensor], progress: Callable[[str], None]) -> None:
    for number, file in enumerate(files, start=1):
        progress(f"loading weights, file {number} of {len(files)}")
        with _opened(file) as tensors:
            for name in tensors.offset_keys():  # In the file's order, so that it is read from front to back.
                if name in places:
                    places[name].copy_(tensors.get_tensor(name))


def _check_tied_head(file: Path, embedding: Tensor) -> None:
    """Raise ModelLoadError if the stored head is not the embedding: then the config's word against the weights' is unclear."""
    with _opened(file) as tensors:
        head = tensors.get_tensor(_HEAD).to(embedding)
    if not torch.equal(head, embedding):
        raise ModelLoadError(
            f"{file.parent}/config.json ties the head to the embedding, but {_HEAD} in {file.name} differs from it: "
            "set tie_word_embeddings to false, or remove that tensor"
        )


def _some(names: Collection[str]) -> str:
    """The first few names, and how many follow."""
    shown, rest = list(names)[:_NAMES_IN_ERROR], len(names) - _NAMES_IN_ERROR
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
