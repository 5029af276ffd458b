"""Counts what a step launches around the model's layers, in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

_LAUNCHES_NOTHING = "alias as_strided empty empty_like expand new_empty select slice squeeze t transpose unbind unsqueeze view"
"""Operators of ``aten`` that only make views or take memory."""


class OpCounts(TorchDispatchMode):
    """``torch`` operators and ``triton`` kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: Counter[str] = Counter()
        self.triton: Counter[str] = Counter()
        self._is_counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self._is_counting and name not in _LAUNCHES_NOTHING.split():
            self.torch[name] += 1
        return func(*args, **kwargs or {})

    @contextmanager
    def outside(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Count what is run meanwhile, but for what these modules do."""
        run = InterpretedFunction.run

        def counted(kernel: Any, *args: Any, **options: Any) -> Any:
            was_counting, self._is_counting = self._is_counting, False
            self.triton[kernel.__name__] += was_counting
            try:
                return run(kernel, *args, **options)
            finally:
                self._is_counting = was_counting

        def pause(*_: Any) -> None:
            self._is_counting = False

        def resume(*_: Any) -> None:
            self._is_counting = True

        hooks = [h for m in modules for h in (m.register_forward_pre_hook(pause), m.register_forward_hook(resume))]
        InterpretedFunction.run = counted
        try:
            with self:
                yield
        finally:
            InterpretedFunction.run = run
            for hook in hooks:
                hook.remove()
