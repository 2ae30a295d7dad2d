"""What operators do to the machine, recorded as they are dispatched: arithmetic, bytes moved, kernels, and the bytes that are alive.

Runs over steps that are computed and steps that are only followed (:mod:`mmlong.estimate.hollow`) alike, so both are measured the same way. Alive is what tensors hold; what a kernel takes for itself while it runs (a product's packed operands) is not seen. Bytes moved are each operator's inputs and outputs once,
as if nothing stayed in a cache between two operators.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmlong.measure.alive import LiveBytes
from mmlong.measure.flops import Operators, operator_flops

PRODUCTS, ATTENTION, FFT, ELEMENTWISE = "products", "attention", "fft", "elementwise"
"""Classes of operators; the last is everything that only moves numbers: elementwise, reductions, gathers, copies."""


def operator_class(func: Any, flops: int | None) -> str:
    """The class of a dispatched operator."""
    if flops is None:
        return ELEMENTWISE
    name = func._overloadpacket.__name__
    return ATTENTION if "attention" in name else FFT if "fft" in name else PRODUCTS


class Meter(Operators):
    """Records while it is entered. Tensors that were there before count nothing.

    Attributes:
        flops, moved: by ``(class, dtype)``: floating-point operations, and bytes read and written.
        kernels: operators that did something (a view does nothing).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[tuple[str, str]] = Counter()
        self.moved: Counter[tuple[str, str]] = Counter()
        self.kernels = 0
        self._live = LiveBytes()

    @property
    def alive(self) -> int:
        """Bytes of tensors made since, now."""
        return self._live.now

    @property
    def peak(self) -> int:
        """The same at most."""
        return self._live.peak

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in read:
            self._live.meet(t, made=False)
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        mutable = schema is not None and schema.is_mutable
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        written = [t for t in made if self._live.meet(t, made=True) or mutable]
        if written and not func.__name__.startswith(("empty", "new_empty")):
            self.kernels += 1
            flops = operator_flops(func, args, kwargs, out)
            key = (operator_class(func, flops), str(written[0].dtype).removeprefix("torch."))
            self.flops[key] += flops or 0
            self.moved[key] += sum(map(_bytes, read)) + sum(map(_bytes, written))
        return out


def _bytes(t: Tensor) -> int:
    # A tensor that was expanded is no larger than what it was expanded from.
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages of some tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that an optimiser keeps."""
    return [t for state in optimizer.state.values() for t in tree_leaves(state) if isinstance(t, Tensor)]
