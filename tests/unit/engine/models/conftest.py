import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.engine.models.checkpoints import TINY, tiny_tensors


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny checkpoint's ``config.json`` with some keys replaced, or removed where the value is ``...``."""

    def write(**changes: Any) -> Path:
        values = {key: value for key, value in (TINY | changes).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.fixture
def checkpoint(write_config: Callable[..., Path]) -> Path:
    """A whole tiny Llama checkpoint of one file."""
    folder = write_config()
    save_file(tiny_tensors(), folder / "model.safetensors")
    return folder
