"""Numbers on their way from the host to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(numbers: NDArray[Any] | Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """A new tensor on ``device``, of the array's own type.

    The copy to a GPU goes through pinned memory, ordered on the stream, and the host goes on.
    """
    host = numbers if isinstance(numbers, Tensor) else torch.from_numpy(np.array(numbers, order="C"))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
