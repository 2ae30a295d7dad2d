"""The words for what went wrong: every check compares and fails by these, so that a failure names the property, where results first part, and by how much."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}
"""Allowed difference, relative to a value and to the rms of all values. In float64 only rounding passes; float32 leaves room for
other orders of summation, since a wrong formula is found in float64 and float32 is run for what only it does (overflow, lost digits)."""

CRASHES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError, AssertionError)
"""What a module under test may throw at an input that it must take."""


class ConformanceError(AssertionError):
    """A part breaks the contract.

    Attributes:
        property: name of the property that does not hold, e.g. ``"causality"``.
        subject: what was checked, e.g. ``"mamba2 (dim 16)"``.
    """

    def __init__(self, prop: str, subject: str, what: str) -> None:
        super().__init__(f"{subject} breaks the contract: {prop}: {what}")
        self.property = prop
        self.subject = subject


class Verdicts:
    """Base of what is checked.

    Attributes:
        checking: name of the property being checked, for messages.
    """

    checking: str = "construction"

    @contextlib.contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Turn what the module throws inside into a failure of the property, keeping the original as its cause."""
        try:
            yield
        except ConformanceError:
            raise
        except CRASHES as error:
            text = str(error).strip().splitlines() or [""]
            self.fail(f"{what}: raised {type(error).__name__}: {text[0]}", error)

    def fail(self, what: str, cause: BaseException | None = None) -> None:
        """Raise the failure of the current property."""
        raise ConformanceError(self.checking, str(self), what) from cause

    def refuses(
        self,
        errors: type[Exception] | tuple[type[Exception], ...],
        call: Callable[[], Any],
        what: str,
        says: str | None = None,
    ) -> None:
        """Fail unless the call raises one of ``errors``, and with ``says`` in its message."""
        kinds = errors if isinstance(errors, tuple) else (errors,)
        names = " or ".join(e.__name__ for e in kinds)
        with self.running(f"given {what}, which must raise {names}"):
            try:
                with torch.no_grad():
                    call()
            except kinds as error:
                if says is not None and says not in str(error):
                    self.fail(
                        f"given {what}: the {type(error).__name__} must say {says!r}, what was expected; it says: {error}"
                    )
                return
        self.fail(f"accepted {what}; must raise {names}")

    def agree(self, found: Tensor, expected: Tensor, what: str, *, tol: float | None = None, start: int = 0) -> None:
        """Fail unless two results are equal up to rounding, naming the first position at which they are not.

        Args:
            found, expected: ``(B, L, ...)`` or any equal shapes.
            what: of what, for the message.
            tol: relative tolerance; default by dtype.
            start: position of index 0 along axis 1.
        """
        if found.shape != expected.shape:
            self.fail(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        if not found.numel():
            return
        tol = TOLERANCE[expected.dtype] if tol is None else tol
        found, expected = found.detach().double(), expected.detach().double()
        allowed = tol * (expected.square().mean().sqrt() + expected.abs())
        off = (found - expected).abs()
        wrong = ~(off <= allowed)
        if not bool(wrong.any()):
            return
        places = wrong.nonzero()
        axis = 1 if places.shape[1] > 1 else 0
        first = places[places[:, axis].argmin()]
        at = tuple(first.tolist())
        share = f"{int(wrong.sum())} of {wrong.numel()} values"
        if bool(off.isfinite().all()):
            worst = f"worst difference {float(off.max()):.3g} at {_place(wrong.shape, off.argmax(), start)}"
        else:
            worst = "some are not finite"
        self.fail(
            f"{what}: first wrong at {_describe(at, start)}: {float(found[at]):.9g}, expected {float(expected[at]):.9g} "
            f"(allowed {float(allowed[at]):.1e}); {worst}; {share}"
        )

    def silent(self, found: Tensor, scale: float, what: str, *, tol: float = 1e-10, start: int = 0) -> None:
        """Fail unless every value is zero beside ``scale``."""
        if not found.numel():
            return
        size = found.detach().abs()
        wrong = ~(size <= tol * scale)
        if not bool(wrong.any()):
            return
        places = wrong.nonzero()
        axis = 1 if places.shape[1] > 1 else 0
        first = tuple(places[places[:, axis].argmin()].tolist())
        self.fail(
            f"{what}: first at {_describe(first, start)}: {float(found[first]):.3g}, must be 0 (beside {scale:.3g}); "
            f"largest {float(size.nan_to_num(torch.inf).max()):.3g}; {int(wrong.sum())} of {wrong.numel()} values"
        )

    def finite(self, found: Tensor, what: str) -> None:
        """Fail on NaN or infinity."""
        found = found.detach()
        wrong = ~found.isfinite()
        if bool(wrong.any()):
            first = tuple(wrong.nonzero()[0].tolist())
            self.fail(f"{what}: {float(found[first])} at {_describe(first, 0)}; {int(wrong.sum())} of {wrong.numel()}")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(index: tuple[int, ...], start: int) -> str:
    names = ["row", "position", "channel"]
    if len(index) != 3:
        return f"index {list(index)}"
    shown = (index[0], index[1] + start, index[2])
    return ", ".join(f"{n} {i}" for n, i in zip(names, shown, strict=True))


def _place(shape: torch.Size, flat: Tensor, start: int) -> str:
    return _describe(tuple(int(i) for i in torch.unravel_index(flat.cpu(), shape)), start)
