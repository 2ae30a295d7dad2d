"""What a conformance check holds in its hands: the part under test, its data, and the words for what went wrong.

A property is a function of a :class:`Subject`. It draws tokens and layouts from the subject (seeded, so that a failure happens again),
runs the module, and compares with :meth:`Subject.agree` and :meth:`Subject.silent`, which raise :class:`ConformanceError` with the
first position at which two results part.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Traits
from mmlong.mixers.state import State, detach_state, map_state, select_rows

Make = Callable[[int], nn.Module]

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


@dataclass
class Subject:
    """One width of the part under test.

    Attributes:
        name: for messages.
        make: builds a fresh module of a width.
        traits: what it claims.
        dim: width D.
        device: where to run.
        checking: name of the property being checked, for messages.
    """

    name: str
    make: Make
    traits: Traits
    dim: int
    device: torch.device
    checking: str = "construction"
    _modules: dict[torch.dtype, nn.Module] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} (dim {self.dim})"

    # The module

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh module in eval mode, float32, with every parameter moved off its initial value.

        Projections that start at zero and gates that start open would hide most faults.
        """
        with self.running("construction"):
            torch.manual_seed(seed)
            module = self.make(self.dim).to(self.device)
            with torch.no_grad():
                for p in module.parameters():
                    if p.is_floating_point() or p.is_complex():
                        p.add_(torch.randn_like(p) * (0.05 * p.abs() + 0.03))
            return module.eval()

    def module(self, dtype: torch.dtype = torch.float64, fresh: bool = False) -> nn.Module:
        """The module in ``dtype``; shared between properties unless ``fresh``."""
        if dtype not in self._modules:
            self._modules[dtype] = self.build().to(dtype)
        kept = self._modules[dtype]
        return copy.deepcopy(kept) if fresh else kept

    @property
    def causal(self) -> bool:
        return bool(getattr(self.module(torch.float32), "causal", self.traits.causal))

    @property
    def streaming(self) -> bool:
        default = self.causal and self.traits.streaming
        return bool(getattr(self.module(torch.float32), "streaming", default))

    # Data

    def draw(self, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal values, the same for the same shape and seed."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        return values.to(self.device, dtype)

    def tokens(self, batch: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Tokens ``(batch, length, dim)``."""
        return self.draw((batch, length, self.dim), seed, dtype)

    def layout(
        self, lengths: list[int] | None = None, resets: list[tuple[int, int]] | None = None, shape: Any = None
    ) -> Layout:
        """A layout of given lengths, and of resets listed as (row, position) in a ``(B, L)`` ``shape``."""
        marks = None
        if resets is not None:
            marks = torch.zeros(shape, dtype=torch.bool)
            for row, position in resets:
                marks[row, position] = True
            marks = marks.to(self.device)
        valid = None if lengths is None else torch.tensor(lengths, device=self.device)
        return Layout(lengths=valid, resets=marks)

    # Running

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

    def run(
        self, module: Callable[..., Any], x: Tensor, state: State = None, layout: Layout | None = None, what: str = ""
    ) -> tuple[Tensor, State]:
        """One call of the module."""
        where = f"{what or 'a call'} at (B, L) = {tuple(x.shape[:2])}, {_short(x.dtype)}"
        with self.running(where):
            answer = module(x, state, layout)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            self.fail(f"{where}: must return (y, state), returned {type(answer).__name__}")
        y, after = answer
        if not isinstance(y, Tensor) or y.shape != x.shape:
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            self.fail(f"{where}: y must have the shape of x {tuple(x.shape)}, got {shape}")
        return y, after

    def in_pieces(
        self,
        module: nn.Module,
        x: Tensor,
        sizes: list[int],
        state: State = None,
        layout: Layout | None = None,
        what: str = "pieces",
    ) -> tuple[Tensor, State]:
        """The sequence in consecutive pieces of the given sizes, the state carried."""
        outputs, start = [], 0
        for size in sizes:
            stop = min(start + size, x.shape[1])
            part = None if layout is None else layout.slice(start, stop)
            y, state = self.run(module, x[:, start:stop], state, part, f"{what} [{start}:{stop}]")
            outputs.append(y)
            start = stop
        if start != x.shape[1]:
            raise ValueError(f"pieces {sizes} do not make up {x.shape[1]} positions")
        return torch.cat(outputs, 1), state

    def each_alone(
        self, module: nn.Module, x: Tensor, state: State = None, layout: Layout | None = None
    ) -> list[tuple[Tensor, State]]:
        """What the layout means: per row, every document run by itself on exactly its own tokens, without a layout.

        Returns:
            per row, outputs ``(1, length, D)`` and the state after the last document (the incoming one if the row is empty).
        """
        rows = []
        for b in range(x.shape[0]):
            length = x.shape[1] if layout is None or layout.lengths is None else int(layout.lengths[b])
            past = None if state is None else select_rows(state, slice(b, b + 1))
            cuts = [0]
            if layout is not None and layout.resets is not None:
                marks = layout.resets[b, :length].nonzero().flatten().tolist()
                if 0 in marks:
                    past = None
                cuts += [p for p in marks if p > 0]
            cuts.append(length)
            outputs = [x[b : b + 1, :0]]
            for k, (start, stop) in enumerate(itertools.pairwise(cuts)):
                if stop > start:
                    y, past = self.run(module, x[b : b + 1, start:stop], past if k == 0 else None, None, "a document")
                    outputs.append(y)
            rows.append((torch.cat(outputs, 1), past))
        return rows

    # Verdicts

    def fail(self, what: str, cause: BaseException | None = None) -> None:
        """Raise the failure of the current property."""
        raise ConformanceError(self.checking, str(self), what) from cause

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
        wrong = ~found.detach().isfinite()
        if bool(wrong.any()):
            first = tuple(wrong.nonzero()[0].tolist())
            self.fail(f"{what}: {float(found[first])} at {_describe(first, 0)}; {int(wrong.sum())} of {wrong.numel()}")


def differentiable(state: State) -> State:
    """A copy of a state whose floating-point tensors are leaves that ask for a gradient."""
    return map_state(lambda t: t.clone().requires_grad_(t.is_floating_point()), detach_state(state))


def copied(state: State) -> State:
    """A detached deep copy of a state."""
    return map_state(lambda t: t.detach().clone(), state)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(index: tuple[int, ...], start: int) -> str:
    names = ["row", "position", "channel"]
    if len(index) != 3:
        return f"index {list(index)}"
    shown = (index[0], index[1] + start, index[2])
    return ", ".join(f"{n} {i}" for n, i in zip(names, shown, strict=True))


def _place(shape: torch.Size, flat: Tensor, start: int) -> str:
    return _describe(tuple(int(i) for i in torch.unravel_index(flat.cpu(), shape)), start)
