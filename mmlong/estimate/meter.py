"""What operators do to the machine, recorded as they are dispatched: arithmetic, bytes moved, kernels, and the bytes that are alive.

Runs over steps that are computed and steps that are only followed (:mod:`mmlong.estimate.hollow`) alike, so both are measured the same way. Alive is what tensors hold; what a kernel takes for itself while it runs (a product's packed operands) is not seen. Bytes moved are each operator's inputs and outputs once,
as if nothing stayed in a cache between two operators.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmlong.measure.flops import asks_about_form, composed, operator_flops

PRODUCTS, ATTENTION, FFT, ELEMENTWISE = "products", "attention", "fft", "elementwise"
"""Classes of operators; the last is everything that only moves numbers: elementwise, reductions, gathers, copies."""


def operator_class(func: Any, flops: int | None) -> str:
    """The class of a dispatched operator."""
    if flops is None:
        return ELEMENTWISE
    name = func._overloadpacket.__name__
    return ATTENTION if "attention" in name else FFT if "fft" in name else PRODUCTS


class Meter(TorchDispatchMode):
    """Records while it is entered. Tensors that were there before count nothing.

    Attributes:
        flops, moved: by ``(class, dtype)``: floating-point operations, and bytes read and written.
        kernels: operators that did something (a view does nothing).
        alive, peak: bytes of tensors made since, now and at most.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[tuple[str, str]] = Counter()
        self.moved: Counter[tuple[str, str]] = Counter()
        self.kernels = 0
        self.alive = 0
        self.peak = 0
        self._followed: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if asks_about_form(func):
            return NotImplemented
        if composed(func):
            with self:
                return func.decompose(*args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in read:
            storage = t.untyped_storage()
            if storage._cdata not in self._followed:
                self._follow(storage, 0)
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        mutable = schema is not None and schema.is_mutable
        written = []
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            known = storage._cdata in self._followed
            if not known:
                self._follow(storage, storage.nbytes())
            if mutable or not known:
                written.append(t)
        if written and not func.__name__.startswith(("empty", "new_empty")):
            self.kernels += 1
            flops = operator_flops(func, args, kwargs, out)
            key = (operator_class(func, flops), str(written[0].dtype).removeprefix("torch."))
            self.flops[key] += flops or 0
            self.moved[key] += sum(map(_bytes, read)) + sum(map(_bytes, written))
        return out

    def _follow(self, storage: Any, size: int) -> None:
        key = storage._cdata
        self._followed[key] = weakref.ref(storage, self._forget(key, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.alive -= size
            self._followed.pop(key, None)

        return forget


def _bytes(t: Tensor) -> int:
    # A tensor that was expanded is no larger than what it was expanded from.
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages of some tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that an optimiser keeps."""
    return [t for state in optimizer.state.values() for t in tree_leaves(state) if isinstance(t, Tensor)]
