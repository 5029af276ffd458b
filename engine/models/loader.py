"""Finds a checkpoint and streams its tensors into the model, each straight to its place.

A checkpoint is a Hugging Face folder: ``config.json`` and ``model.safetensors``, or shards named by
``model.safetensors.index.json``. A draft LoRA lies in a folder of its own beside them. Everything that can be wrong with one
ends as a ModelLoadError of one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig, Quantization
from engine.models.places import adapter_tensors, places
from engine.models.transformer import Transformer
from kernels.backend import REFERENCE, Kernels
from kernels.linear.weight import FP8, Weight, quantize

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
"""The element types that a model can run in, by the names that configurations use."""

DRAFT_LORA_FOLDER = "linear_spec_lora"
"""Where a checkpoint keeps the LoRA of its drafter, if it has one."""

ADAPTER_CONFIG = "adapter_config.json"

_SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_DERIVED = "rotary_emb.inv_freq"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MIB = 2**20
_REPORTED_BYTES = 2**30
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# `consolidated` is a second copy of the weights under the maker's own names, and folders hold other formats (`original/`),
# but for the one with the LoRA. A pattern cannot negate a word, so there is one for each letter where a name may leave it.
_NOT_DOWNLOADED = ("consolidated*", *(f"{DRAFT_LORA_FOLDER[:i]}[!{x}]*/*" for i, x in enumerate(DRAFT_LORA_FOLDER + "/")))
_NAMES_IN_ERROR = 3
_ROWS_AT_ONCE = 4096


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
    files, adapter_files = _weight_files(folder), _adapter_files(folder, config)
    stored, head = _read_headers(files), config.tensor_names.head
    with torch.device("meta"):
        model = Transformer(config, kernels).to(dtype).requires_grad_(False).eval()
        if config.quantization is not Quantization.NONE:
            model.make_room_for_fp8()
    _check(stored, places(model), config, folder / "config.json")
    _check(_read_headers(adapter_files), adapter_tensors(model), config, folder / DRAFT_LORA_FOLDER / ADAPTER_CONFIG)
    _allocate(model, device)
    _fill([*files, *adapter_files], places(model) | adapter_tensors(model), progress)
    if config.tie_word_embeddings and head in stored:
        _check_tied_head(stored[head].file, head, model.embedding)
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


def _adapter_files(folder: Path, config: ModelConfig) -> list[Path]:
    """The file of the draft LoRA, or none for a model that has no such."""
    if config.tidar is None or config.tidar.draft_lora is None:
        return []
    file = folder / DRAFT_LORA_FOLDER / _ADAPTER_FILE
    if not file.exists():
        raise ModelLoadError(f"{file.parent} has no {file.name}: download it again, or remove the folder to draft without it")
    return [file]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{file} is truncated or not a safetensors file ({_one_line(error)}): copy or download it again"
        ) from error


def _read_headers(files: list[Path]) -> dict[str, _StoredTensor]:
    """What the files hold together."""
    return {name: tensor for file in files for name, tensor in _read_header(file).items()}


def _read_header(file: Path) -> dict[str, _StoredTensor]:
    """What the file holds. Rotary frequencies, which old checkpoints store, are left out: here they are derived."""
    with _opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.offset_keys() if not name.endswith(_DERIVED)}
        return {name: _StoredTensor(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _stored_types(place: Weight) -> frozenset[str]:
    """The types that a checkpoint's tensor for this place may have."""
    is_stored_fp8 = isinstance(place, Tensor) and place.dtype == FP8
    return frozenset({"F8_E4M3"}) if is_stored_fp8 else _FLOATS


def _check(stored: dict[str, _StoredTensor], places: Mapping[str, Weight], config: ModelConfig, source: Path) -> None:
    """Raise one ModelLoadError that names what is missing, surplus, of another shape or of a type that is not the place's.

    ``source`` is the JSON file that the expected shapes come from; the tensors lie beside it.
    """
    names = config.tensor_names
    # A tied checkpoint may store its head once more; `_check_tied_head` looks at it.
    expected = places.keys() | ({names.head} if config.tie_word_embeddings else set())
    both = [name for name in places if name in stored]
    shapes = [(name, list(stored[name].shape), list(places[name].shape)) for name in both]
    problems = {
        "missing": [name for name in places if name not in stored],
        f"unknown to {config.architecture}": [
            name for name in stored if name not in expected and not name.startswith(names.ignored)
        ],
        "of another shape": [
            f"{name} is {found}, {source.name} says {wanted}" for name, found, wanted in shapes if found != wanted
        ],
        "of an unsupported type": [
            f"{n} is {stored[n].dtype}" for n in both if stored[n].dtype not in _stored_types(places[n])
        ],
    }
    found = [f"{len(tensors)} {problem} ({_some(tensors)})" for problem, tensors in problems.items() if tensors]
    if found:
        raise ModelLoadError(
            f"the tensors in {source.parent} do not fit its {source.name}: {'; '.join(found)}. "
            "Check that both belong to one model"
        )


def _allocate(model: Transformer, device: torch.device) -> None:
    """Move a model from the meta device to ``device``. Its parameters are left uninitialised."""
    try:
        model.to_empty(device=device)
    except RuntimeError as error:
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        raise ModelLoadError(
            f"{size:.1f} GiB of weights cannot be allocated on {device}: free memory there, or use a smaller dtype or model"
        ) from error


def _fill(files: list[Path], places: Mapping[str, Weight], progress: Callable[[str], None]) -> None:
    """Read every tensor to its place, and tell how far it is whenever another GiB was read and when a file ends."""
    loaded = reported = 0
    for number, file in enumerate(files, start=1):
        with _opened(file) as tensors:
            for name in tensors.offset_keys():  # In the file's order, so that it is read from front to back.
                if name in places:
                    tensor = tensors.get_tensor(name)
                    _store(places[name], tensor)
                    loaded += tensor.nbytes
                if loaded - reported >= _REPORTED_BYTES:
                    progress(f"loading weights, {loaded / _MIB:,.0f} MiB, in file {number} of {len(files)}")
                    reported = loaded
        progress(f"loaded {loaded / _MIB:,.1f} MiB of weights, {number} of {len(files)} files")
        reported = loaded


def _store(place: Weight, tensor: Tensor) -> None:
    if isinstance(place, Tensor):
        place.copy_(tensor)
        return
    # Quantised where it is going to lie: the host only reads the file.
    quantized = quantize(tensor.to(place.device))
    place.values.copy_(quantized.values)
    place.scale.copy_(quantized.scale)


def _check_tied_head(file: Path, name: str, embedding: Tensor) -> None:
    """Raise ModelLoadError if the stored head is not the embedding: then the config's word against the weights' is unclear."""
    with _opened(file) as tensors:
        # Piece by piece, since the two may differ in type and together they are a large part of a small model.
        pieces = zip(tensors.get_tensor(name).split(_ROWS_AT_ONCE), embedding.split(_ROWS_AT_ONCE), strict=True)
        is_same = all(torch.equal(stored.to(ours), ours) for stored, ours in pieces)
    if not is_same:
        raise ModelLoadError(
            f"{file.parent}/config.json ties the head to the embedding, but {name} in {file.name} differs from it: "
            "set tie_word_embeddings to false, or remove that tensor"
        )


def _some(names: Collection[str]) -> str:
    """The first few names, and how many follow."""
    shown, rest = list(names)[:_NAMES_IN_ERROR], len(names) - _NAMES_IN_ERROR
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
