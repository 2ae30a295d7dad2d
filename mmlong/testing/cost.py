"""The declared cost holds: work and memory, counted at L and at 2 L, grow as the traits say. Counted, not timed.

Three counts of a forward and backward pass:

- arithmetic of matrix products, convolutions and attention (torch's FLOP counter; it does not know FFTs, which are ``n log n``);
- elements written by any operation, so that quadratic work done elementwise is seen too;
- memory: bytes that autograd keeps for the backward pass, and the largest number of bytes alive at once. Both must be linear
  in L for every mixer, whatever its work: a sequence too long to hold is of no use here. ``n log n`` and ``n sqrt n`` mixers may
  also keep that much.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmlong.testing.subject import Subject

SHORT, LONG = 2048, 4096

WORK = {"n": 2.2, "n log n": 2.5, "n sqrt n": 3.0, "n^2": 4.3}
"""Largest ratio of the counts at 2 L and at L. Exactly it would be 2, 2.2, 2.8 and 4 at these lengths; windows that are cut off at
the ends, and chunks, are the rest."""
MEMORY = {"n": 2.2, "n log n": 2.5, "n sqrt n": 3.0, "n^2": 2.2}


def cost_is_as_declared(s: Subject) -> None:
    """Work and memory at 2 L over those at L."""
    short, long = _measure(s, SHORT), _measure(s, LONG)
    declared = s.traits.cost
    counts = {
        "floating-point operations": WORK,
        "elements written": WORK,
        "bytes kept for the backward pass": MEMORY,
        "bytes alive at once": MEMORY,
    }
    for what, allowed in counts.items():
        before, after = short[what], long[what]
        if before and after / before > allowed[declared]:
            kind = "work" if allowed is WORK else "memory"
            s.fail(
                f"declared cost {declared!r}, but {what} grow from {before:,} at L = {SHORT} to {after:,} at {LONG}: "
                f"{after / before:.2f} times, allowed {allowed[declared]} ({kind})"
            )


def _measure(s: Subject, length: int) -> dict[str, int]:
    module = s.module(torch.float32, fresh=True)
    x = s.tokens(1, length, dtype=torch.float32).requires_grad_()
    weights = s.tokens(1, length, seed=3, dtype=torch.float32)
    flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    meter, kept = _Meter(), _Kept(module)
    with flops, meter:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            y, _ = s.run(module, x)
        loss = (y * weights).sum()
        with s.running(f"backward at L = {length}"):
            loss.backward()
    return {
        "floating-point operations": int(flops.get_total_flops()),
        "elements written": meter.written,
        "bytes kept for the backward pass": kept.bytes,
        "bytes alive at once": meter.peak,
    }


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(dy: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(dy, q, k, v)


_aten = torch.ops.aten
# torch's counter knows the GPU kernels of attention only.
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class _Kept:
    """Bytes of distinct storages that autograd saves, parameters aside."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._seen = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self._alive: list[Tensor] = []

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(t.detach())  # so that no later tensor gets this address
            self.bytes += storage.nbytes()
        return t


class _Meter(TorchDispatchMode):
    """Counts elements that operations write, and follows the bytes that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.peak = 0
        self._now = 0
        self._followed: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._follow(t, func)
        return out

    def _follow(self, t: Tensor, func: Any) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        known = key in self._followed
        if known and not func._schema.is_mutable:
            return  # a view
        self.written += t.numel()
        if known:
            return
        size = storage.nbytes()
        self._followed[key] = weakref.ref(storage, self._forget(key, size))
        self._now += size
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._now -= size
            self._followed.pop(key, None)

        return forget
