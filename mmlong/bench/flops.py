"""Counted work of a run: all that was done, and what of it was useful.

Counted is what :mod:`mmlong.measure.flops` counts as it is dispatched: products, convolutions, attention and Fourier transforms, inside hand-written autograd functions and their backward passes too; no elementwise
work. Kernels that torch does not see (Triton's, compiled code) cannot be counted.

**Useful** is the work of the forward pass, three times where there is a backward: a product has two of the same size in its backward. What a backward computes again is work done, and
not useful work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmlong.measure.flops import FlopCounter

BACKWARD_FACTOR = 3
"""Forward and backward over the forward alone."""


def count(forward: Callable[[], Any], backward: Callable[[Any], Any] | None = None) -> dict[str, int]:
    """Run once under the counter.

    Args:
        forward: gives the outputs or the loss.
        backward: takes them; ``None`` for a forward alone.

    Returns:
        ``done`` and ``useful``, in floating-point operations.
    """
    with FlopCounter() as counter:
        y = forward()
        first = counter.total
        if backward is not None:
            backward(y)
        done = counter.total
    return {"done": done, "useful": first if backward is None else BACKWARD_FACTOR * first}
