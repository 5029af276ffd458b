"""A GPU that is this CPU: device tensors are told apart from the host's, and what would wait for a GPU is an error.

Tensors of the device are wrappers, on the one device that torch has on every machine and that holds no numbers (``meta``). They
meet host tensors in copies alone. A copy to the host that does not wait arrives when an event behind it is waited for, and
until then there is rubbish in its place, so that whoever reads too early gives a wrong answer.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import engine.download

DEVICE = torch.device("meta")

READS = ("tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__")
"""Methods that read a tensor on the host."""

HOST_SIZED = (
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "_local_scalar_dense",
    "equal",
    "bincount",
)
"""Operations whose result the host has to know, be it a number or a shape."""

UNEVEN_ROWS = ("kernels/paged_attention/reference.py", "_group")
"""The one place that may wait: the reference attention, in steps of uneven rows. On a GPU the Triton kernels serve."""


class WouldWaitError(AssertionError):
    """The host would wait for the device."""


class DeviceTensor(Tensor):
    """A tensor of the device; its numbers are in ``kept``."""

    kept: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, kept: Tensor) -> DeviceTensor:
        shape = {"strides": kept.stride(), "storage_offset": kept.storage_offset(), "dtype": kept.dtype, "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, kept.size(), **shape)

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the pretended GPU")


class PretendedGpu(TorchDispatchMode):
    """Runs the operations of both sides. While it ``is_strict``, whatever would wait raises WouldWaitError.

    ``waits``: the functions that waited for all that was launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_strict = self.is_draining = False
        self.waits: list[tuple[str, ...]] = []
        self._num_launched = self._num_downloads = 0
        self._pinned: dict[int, Tensor] = {}
        self._downloads: deque[tuple[int, Tensor, Tensor]] = deque()
        self._uploads: list[tuple[Tensor, Tensor]] = []

    # -- what the engine does ------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        if name in ("_pin_memory", "pin_memory"):
            return self._pin(args[0].clone())
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        tensors = list(_tensors((args, kwargs)))
        on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        if not on_device and kwargs.get("device") != DEVICE and DEVICE not in args:
            return func(*args, **kwargs)
        self._num_launched += 1
        if name == "copy_" and self._is_copy_between(args[0], args[1]):
            return self._copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
        if name in ("to", "_to_copy") and kwargs.get("device", next((a for a in args if isinstance(a, torch.device)), None)):
            return self._move(func, args, kwargs)
        self._check(name, args, kwargs, tensors)
        return _run(func, args, kwargs)

    def record_event(self, device: torch.device) -> _Event:
        """Takes the place of ``engine.download.record_event``."""
        assert device == DEVICE
        return _Event(self, self._num_launched, self._num_downloads)

    def reach(self, event: _Event) -> None:
        """The host waits for an event: copies before it arrive."""
        if self.is_strict and event.num_launched == self._num_launched and not self.is_draining:
            self.waits.append(tuple(_functions()))
        while self._downloads and self._downloads[0][0] <= event.num_downloads:
            _, copy, numbers = self._downloads.popleft()
            copy.copy_(numbers)
        for source, numbers in self._uploads:
            assert torch.equal(source, numbers), "the host wrote over what was on its way to the device"
        self._uploads.clear()

    # -- copies --------------------------------------------------------------------------------------------------------

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # which keeps its place
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in self._pinned

    def _is_copy_between(self, one: Tensor, other: Tensor) -> bool:
        return isinstance(one, DeviceTensor) != isinstance(other, DeviceTensor)

    def _copy(self, target: Tensor, source: Tensor, is_async: bool) -> Tensor:
        if isinstance(target, DeviceTensor):
            self._expect(is_async and self._is_pinned(source), "a copy from pageable memory, or one that waits")
            self._uploads.append((source, source.clone()))
            target.kept.copy_(source)
            return target
        assert isinstance(source, DeviceTensor)
        self._expect(is_async and self._is_pinned(target), "a copy into pageable memory, or one that waits")
        if not is_async:
            return target.copy_(source.kept)
        self._num_downloads += 1
        self._downloads.append((self._num_downloads, target, source.kept.clone()))
        return target.fill_(float("nan") if target.is_floating_point() else torch.iinfo(target.dtype).max // 3)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """``to`` another device, or the same with another type."""
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        source, is_async = named["self"], bool(named.get("non_blocking"))
        is_upload = torch.device(named["device"]) == DEVICE and not isinstance(source, DeviceTensor)
        if is_upload:
            self._expect(is_async and self._is_pinned(source), "an upload from pageable memory, or one that waits")
            self._uploads.append((source, source.clone()))
        elif torch.device(named["device"]) != DEVICE:
            self._expect(False, "a download that waits")
        moved = func(*_unwrap(args), **_unwrap(kwargs))
        return DeviceTensor(moved.clone()) if torch.device(named["device"]) == DEVICE else moved

    # -- the lint ------------------------------------------------------------------------------------------------------

    def _check(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        self._expect(name not in HOST_SIZED, name)
        if name == "repeat_interleave":
            counts = args[1] if len(args) > 1 else args[0]
            self._expect(not isinstance(counts, Tensor) or kwargs.get("output_size") is not None, "counts without their sum")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            self._expect(all(index.dtype not in (torch.bool, torch.uint8) for index in indices), "a boolean index")
        hosts = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
        self._expect(not hosts, f"host tensors in {name}")

    def _expect(self, is_fine: bool, what: str) -> None:
        if self.is_strict and not is_fine and UNEVEN_ROWS not in list(_frames()):
            raise WouldWaitError(f"the host would wait for the device: {what}")

    def check_python(self, func: Any, args: Any, kwargs: Any) -> None:
        """What is decided above the dispatcher: numbers of Python that become tensors, and tensors that become numbers."""
        name = getattr(func, "__name__", "")
        on_device = bool(args) and isinstance(args[0], DeviceTensor)
        if name == "__setitem__" and on_device and isinstance(args[2], (bool, int, float)):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            is_gathered = any(isinstance(part, Tensor) for part in index)
            self._expect(not is_gathered and args[0].kept[args[1]].dim() > 0, "a number is copied into an element")
        self._expect(name not in READS or not on_device, name)
        self._expect(kwargs.get("device") != DEVICE or name not in ("tensor", "as_tensor", "asarray"), name)


class _Event:
    """An event of the pretended stream: copies and operations before it."""

    def __init__(self, gpu: PretendedGpu, num_launched: int, num_downloads: int) -> None:
        self._gpu, self.num_launched, self.num_downloads = gpu, num_launched, num_downloads

    def synchronize(self) -> None:
        self._gpu.reach(self)


class _PythonSide(TorchFunctionMode):
    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        self._gpu.check_python(func, args, kwargs)
        if name in READS and args and isinstance(args[0], DeviceTensor):
            return func(args[0].kept, *args[1:], **kwargs)
        if name in ("tensor", "as_tensor", "asarray") and kwargs.get("device") == DEVICE:
            return DeviceTensor(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Everything inside runs on it; ``is_strict`` has to be set for the lint."""
    with ExitStack() as stack:
        gpu = PretendedGpu()
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(engine.download, "record_event", gpu.record_event)
        # From the start: a wrapper that was made outside cannot be written to inside.
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_PythonSide(gpu))
        yield stack.enter_context(gpu)


def to_device(module: torch.nn.Module) -> None:
    """Put the parameters and other tensors of a module and its children on the pretended GPU, in place."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            child._parameters[name] = None if parameter is None else DeviceTensor(parameter.detach())  # type: ignore[assignment]
        for name, value in vars(child).items():
            if isinstance(value, Tensor):
                setattr(child, name, DeviceTensor(value))


def _run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """On the CPU, with wrappers around what comes out; what was changed in place keeps its own."""
    wrappers = {id(tensor.kept): tensor for tensor in _tensors((args, kwargs)) if isinstance(tensor, DeviceTensor)}

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return wrappers[id(leaf)] if id(leaf) in wrappers else DeviceTensor(leaf)

    return _mapped(of, func(*_unwrap(args), **_unwrap(kwargs)))


def _unwrap(tree: Any) -> Any:
    def of(leaf: Any) -> Any:
        if isinstance(leaf, DeviceTensor):
            return leaf.kept
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    return _mapped(of, tree)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """torch's own, for every kind of tree, takes most of the time of a test."""
    if isinstance(tree, dict):
        return {name: _mapped(function, part) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_mapped(function, part) for part in tree)
    return function(tree)


def _frames() -> Iterator[tuple[str, str]]:
    """File (its last three parts) and function of all callers."""
    frame = sys._getframe(1)
    while frame is not None:
        yield "/".join(frame.f_code.co_filename.split("/")[-3:]), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


def _functions() -> Iterator[str]:
    return (name for _, name in _frames())
