"""A capture that needs no GPU and keeps what a CUDA graph keeps.

A function that saw the host's data only once, whose results appear in the tensors of the first run: so host data that a replay
would not see, or a result that is not where it was, changes an answer. Graphs share one memory, so a replay leaves nothing of
what others have written there. And a graph reads its inputs where they were, so they must not have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeCapture:
    """Runs again and copies the results to where they were; ``num_recorded`` graphs."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self._newest: list[Tensor] = []

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        run()  # as CudaCapture does, for what is made once
        with Reads() as recorded:
            first = run()
        kept = tensors_in(first)
        self.num_recorded += 1
        poison(kept)  # nothing runs while it is recorded

        def replay() -> None:
            with Reads() as replayed:
                fresh = tensors_in(run())
            assert replayed.places == recorded.places, "a replay would read where its inputs were"
            poison(self._newest)
            self._newest = kept
            for old, new in zip(kept, fresh, strict=True):
                old.copy_(new)

        return first, replay


class Reads(TorchDispatchMode):
    """Where the tensors stand that are read or written inside of the context and were not made there."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.places.update(place for place in places_in((args, kwargs)) if place not in self._made)
        result = func(*args, **(kwargs or {}))
        self._made.update(place for place in places_in(result) if place not in self.places)
        return result


def places_in(tree: Any) -> Iterator[int]:
    # Tensors without a dimension are numbers of the code, which a graph holds itself.
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim())
    places = (tensor.untyped_storage().data_ptr() for tensor in tensors)
    return (place for place in places if place)


def tensors_in(result: Any) -> list[Tensor]:
    assert is_dataclass(result)
    return [getattr(result, field.name) for field in fields(result)]


def poison(tensors: list[Tensor]) -> None:
    """What another graph may have left in their memory."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3)
