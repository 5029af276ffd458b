"""Numbers on their way from the device to the host, which waits for them when it reads them and not before."""

from __future__ import annotations

import torch
from torch import Tensor


class Download:
    """Copies of tensors, made in the order of the stream: the device may write over the tensors at once.

    To read them right away costs a wait for everything that was launched before.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = tuple(_copy(tensor) for tensor in tensors)
        device = tensors[0].device
        self._event = None if device.type == "cpu" else record_event(device)

    def wait(self) -> None:
        """Wait until the copies are made."""
        if self._event is not None:
            self._event.synchronize()

    def read(self) -> tuple[Tensor, ...]:
        """The copies, on the host."""
        self.wait()
        return self._copies


def record_event(device: torch.device) -> torch.cuda.Event:
    """An event that is over when all that was launched so far is."""
    event: torch.cuda.Event = torch.cuda.current_stream(device).record_event()
    return event


def _copy(tensor: Tensor) -> Tensor:
    # Only a copy into pinned memory lets the host go on.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
    return copy.copy_(tensor, non_blocking=True)
