"""What a start measures, kept for the next one: a JSON file for each machine, checkpoint, configuration and kind.

The time of a step depends on the device and the code as well, so that both are part of the key: another GPU, another version
of torch or another source of the engine or its kernels is measured anew. A file that cannot be read or written costs a
measurement, never a start.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

import kernels
from engine.config import EngineConfig
from engine.models.transformer import Transformer

T = TypeVar("T")


class MeasurementCache:
    """The measurements that belong to a key. ``folder`` None: nothing is kept. ``progress`` is told when it cannot be."""

    def __init__(
        self, folder: Path | None, key: Mapping[str, str], progress: Callable[[str], None] = lambda message: None
    ) -> None:
        self._folder, self._key, self._progress = folder, dict(key), progress

    @staticmethod
    def of_device(
        config: EngineConfig,
        device: torch.device,
        kernels_name: str,
        progress: Callable[[str], None] = lambda message: None,
    ) -> MeasurementCache:
        """What depends on nothing but device and code.

        A CPU is shared with whatever else runs, so that nothing is kept there unless it is asked for.
        """
        folder = _folder(config, device)
        if folder is None:
            return MeasurementCache(None, {}, progress)
        if device.type == "cuda":
            driver = Path("/proc/driver/nvidia/version")
            name = f"{torch.cuda.get_device_name(device)}, {driver.read_text() if driver.exists() else 'unknown driver'}"
        else:
            name = f"{processor_name()}, {torch.get_num_threads()} threads"
        versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {_version('triton')}"
        code = f"{versions}, {_source_hash()}, kernels {kernels_name}"
        return MeasurementCache(folder, {"device": name, "code": code}, progress)

    def of_engine(self, config: EngineConfig, model: Transformer) -> MeasurementCache:
        """What depends on checkpoint and configuration as well."""
        limits = config.scheduler
        numbers = (limits.max_num_seqs, limits.max_num_batched_tokens, config.max_model_len, config.cache.page_size)
        more = {"model": f"{model.config} {model.embedding.dtype}", "limits": str(numbers), "plan": str(config.decode)}
        return MeasurementCache(self._folder, {**self._key, **more}, self._progress)

    def get(
        self,
        kind: str,
        measure: Callable[[], T],
        to_plain: Callable[[T], Any | None],
        of_plain: Callable[[Any], T],
        **more: str,
    ) -> T:
        """What is kept of this ``kind``, or else measured and kept. ``more``: what else it depends on.

        ``to_plain`` and ``of_plain`` turn it into what JSON can hold, and back. The former may return None for what should not
        be kept, the latter raise ValueError, KeyError or TypeError for what it does not understand.
        """
        if self._folder is None:
            return measure()
        key = {**self._key, **more}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        file = self._folder / f"{kind}-{name}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["key"] == key:
                return of_plain(content[kind])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        value = measure()
        plain = to_plain(value)
        if plain is not None:
            try:
                _write(file, {"key": key, kind: plain})
            except OSError as error:
                self._progress(f"what was measured cannot be kept in {self._folder}: {error.strerror}")
        return value


def _folder(config: EngineConfig, device: torch.device) -> Path | None:
    if config.cost_cache is None and device.type != "cuda":
        return None
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tidar-server"
    try:
        return (user if config.cost_cache is None else Path(config.cost_cache)).expanduser()
    except RuntimeError:  # nobody's home is known
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and moved: two servers that start at once never read half a file.
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as aside:
        json.dump(content, aside)
    os.replace(aside.name, file)


def processor_name() -> str:
    """That of the CPU, as its maker calls it where that is known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@functools.cache
def _source_hash() -> str:
    """Of the engine's and the kernels' source: what a step costs changes with them."""
    folders = (Path(__file__).parent, Path(kernels.__file__).parent)
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
