"""Floating-point operations of anything that runs on tensors, counted as it runs: matrix products, convolutions, attention and FFTs.

The formulas are torch's (``torch.utils.flop_counter``: ``2 m n k`` for a product, dense attention whatever its mask), and two kinds that it lacks: attention's CPU
kernel, and FFTs at the customary ``5 N log2 N`` (half of that from or to real numbers). Elementwise work is not arithmetic that anything waits for; it is counted in
bytes (:mod:`mmlong.estimate.count`). Nothing here looks at values, so it counts meta tensors as well.

Operations inside a compiled region or a Triton kernel are not seen: count the model uncompiled, on the portable path.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten: Any = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(dy: Any, q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(dy.shape, q.shape, k.shape, v.shape))


def _fft(x: Tensor, dim: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    # Of the longer side: a real transform has half as many complex numbers on its other side.
    sides = x if x.numel() >= out_val.numel() else out_val
    points = math.prod(sides.shape[d] for d in dim)
    both = x.is_complex() and out_val.is_complex()
    return round((5 if both else 2.5) * sides.numel() * math.log2(max(points, 1)))


def _lstm(x: Tensor, into: Tensor, back: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * (x.numel() // x.shape[-1]) * (into.numel() + back.numel())


def _lstm_backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * _lstm(*args)


_RAW: dict[Any, Callable[..., int]] = {
    _aten.mkldnn_rnn_layer: _lstm,
    _aten.mkldnn_rnn_layer_backward: _lstm_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._fft_r2c: _fft,
    _aten._fft_c2r: _fft,
    _aten._fft_c2c: _fft,
}
"""Formulas for what torch's counter does not know: CPU kernels of attention and of a layer of LSTM, and FFTs."""


def operator_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Floating-point operations of one dispatched operator, or ``None`` where it has no formula (elementwise, views, copies)."""
    packet: Any = getattr(func, "_overloadpacket", None)
    if packet in _RAW:
        return _RAW[packet](*args, **kwargs, out_val=out)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return None


_FORM = frozenset(
    getattr(_aten, name).default
    for name in (
        "sym_is_contiguous", "is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "size", "sym_size", "stride",
        "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim",
    )
) | {_aten.is_contiguous.memory_format, torch.ops.prim.layout.default}  # fmt: skip


def asks_about_form(func: Any) -> bool:
    """Whether a dispatched operator only asks a tensor for its sizes and strides (fake tensors answer such questions themselves)."""
    return func in _FORM


@cache
def composed(func: Any) -> bool:
    """Whether an operator is to be looked at by its parts. Inference mode hands over whole compositions (a matmul, a linear); otherwise autograd has taken them apart."""
    packet = getattr(func, "_overloadpacket", None)
    if (
        packet in _RAW
        or packet in flop_registry
        or not isinstance(func, torch._ops.OpOverload)
        or func.namespace == "prim"
    ):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


class Operators(TorchDispatchMode):
    """While it is entered, :meth:`run` gets every operator that is dispatched, backward passes and recomputation included; compositions by their parts."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if asks_about_form(func):
            return NotImplemented
        if composed(func):
            with self:
                return func.decompose(*args, **kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call the operator, and look."""
        return func(*args, **kwargs)


class FlopCounter(Operators):
    """Counts while it is entered.

    Attributes:
        counts: operator's name -> floating-point operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Of all operators."""
        return sum(self.counts.values())

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if flops := operator_flops(func, args, kwargs, out):
            self.counts[func._overloadpacket.__name__] += flops
        return out


def count_flops(fn: Callable[[], Any]) -> int:
    """Floating-point operations of a call.

    Args:
        fn: called once; a training step, say: ``lambda: task.training_step(batch, 0).backward()``.

    Returns:
        Operations of products, convolutions, attention and FFTs; a multiplication and an addition are two.
    """
    with FlopCounter() as counter:
        fn()
    return counter.total
