"""Whether code may look at what tensors hold, to do less work: not while it is traced, nor while a step is followed without being computed (:mod:`mmlong.estimate.hollow`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_UNKNOWN: ContextVar[bool] = ContextVar("mmlong_unknown_values", default=False)


def values_known() -> bool:
    """False where a tensor may be a placeholder; what holds for all values is done then."""
    return not (torch.compiler.is_compiling() or _UNKNOWN.get())


def followed() -> bool:
    """Whether a step is followed without being computed, so that how many tokens go where must be supposed. Not while it is traced: what is traced is computed later."""
    return not torch.compiler.is_compiling() and _UNKNOWN.get()


@contextmanager
def unknown_values() -> Iterator[None]:
    """While it is entered, no value is known."""
    before = _UNKNOWN.set(True)
    try:
        yield
    finally:
        _UNKNOWN.reset(before)
