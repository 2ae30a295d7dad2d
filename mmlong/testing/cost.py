"""The declared cost holds: work and memory, counted at L, 2 L and 4 L, grow as the traits say. Counted, not timed.

Three counts of a forward and backward pass:

- arithmetic of matrix products, convolutions, attention and FFTs (:mod:`mmlong.measure.flops`);
- elements written by any operation, so that quadratic work done elementwise is seen too;
- memory: bytes that autograd keeps for the backward pass, and the largest number of bytes alive at once. Both must be linear
  in L for every mixer, whatever its work: a sequence too long to hold is of no use here. ``n log n`` and ``n sqrt n`` mixers may
  also keep that much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmlong.measure.alive import LiveBytes
from mmlong.measure.flops import FlopCounter
from mmlong.testing.subject import Subject

LENGTHS = (1024, 2048, 4096)

WORK = {"n": 2.1, "n log n": 2.3, "n^2": 4.1}
"""Largest growth of the counts. What is compared is the increments, from L to 2 L and from 2 L to 4 L, since fixed costs and the ends
of windows fall out of them: exactly it would be 2, 2.17 and 4, and a quadratic part of a few per cent shows."""
WORK_SQRT = 8.6
"""For ``n sqrt n`` the ratio at 4 L and L, exactly 8: blocks of about sqrt(L) are rounded alike at both."""
MEMORY = {"n": 2.2, "n log n": 2.5, "n sqrt n": 3.0, "n^2": 2.2}
"""Largest ratio at 2 L and L."""


def cost_is_as_declared(s: Subject) -> None:
    """Work and memory grow with the length as declared."""
    measured = [_measure(s, length) for length in LENGTHS]
    declared = s.traits.cost
    for what in ("floating-point operations", "elements written"):
        counts = [m[what] for m in measured]
        first, second = counts[1] - counts[0], counts[2] - counts[1]
        told = f"declared cost {declared!r}, but {what} grow with the length as {_told(counts)}"
        if declared == "n sqrt n":
            if counts[2] > WORK_SQRT * counts[0]:
                s.fail(f"{told}: {counts[2] / counts[0]:.2f} times from L to 4 L, allowed {WORK_SQRT}")
        elif second > WORK[declared] * max(first, 0):
            growth = second / first if first > 0 else float("inf")
            s.fail(f"{told}: the second step is {growth:.2f} times the first, allowed {WORK[declared]}")
    for what in ("bytes kept for the backward pass", "bytes alive at once"):
        counts = [m[what] for m in measured]
        if counts[2] > MEMORY[declared] * counts[1]:
            s.fail(
                f"memory must be linear, but {what} grow with the length as {_told(counts)}: "
                f"{counts[2] / max(counts[1], 1):.2f} times from 2 L to 4 L, allowed {MEMORY[declared]}"
            )


def _told(counts: list[int]) -> str:
    return ", ".join(f"{length:,}: {count:,}" for length, count in zip(LENGTHS, counts, strict=True))


def _measure(s: Subject, length: int) -> dict[str, int]:
    module = s.module(torch.float32, fresh=True)
    x = s.tokens(1, length, dtype=torch.float32).requires_grad_()
    weights = s.tokens(1, length, seed=3, dtype=torch.float32)
    meter, kept = _Meter(), _Kept(module)
    with meter:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            y, _ = s.run(module, x)
        loss = (y * weights).sum()
        with s.running(f"backward at L = {length}"):
            loss.backward()
    return {
        "floating-point operations": meter.total,
        "elements written": meter.written,
        "bytes kept for the backward pass": kept.bytes,
        "bytes alive at once": meter.live.peak,
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


class _Meter(FlopCounter):
    """Counts arithmetic and the elements that operations write, and follows the bytes that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.live = LiveBytes()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self.live.meet(t, made=False)
        out = super().run(func, args, kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (self.live.meet(t, made=True) or func._schema.is_mutable):
                self.written += t.numel()
        return out
