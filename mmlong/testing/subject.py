"""What a conformance check of a mixer holds in its hands: the part under test and its data.

A property is a function of a :class:`Subject`. It draws tokens and layouts from the subject (seeded, so that a failure happens again),
runs the module, and compares by :class:`~mmlong.testing.verdicts.Verdicts`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Traits
from mmlong.mixers.state import State, detach_state, map_state, select_rows
from mmlong.testing.verdicts import Verdicts, short

Make = Callable[[int], nn.Module]

PROBED = 257
"""Tokens of a sequence whose every position is probed for a leak from the future."""


@dataclass
class Subject(Verdicts):
    """One width of the part under test.

    Attributes:
        name: for messages.
        make: builds a fresh module of a width.
        traits: what it claims.
        dim: width D.
        device: where to run.
        prepare: given each module that is built, last; or ``None``.
        probed: tokens of the sequence whose every position is probed for a leak.
    """

    name: str
    make: Make
    traits: Traits
    dim: int
    device: torch.device
    prepare: Callable[[nn.Module], None] | None = None
    probed: int = PROBED
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
                if self.prepare is not None:
                    self.prepare(module)
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
    def stops_gradient(self) -> bool:
        return bool(getattr(self.module(torch.float32), "stops_gradient", False))

    @property
    def streaming(self) -> bool:
        default = self.causal and self.traits.streaming
        return bool(getattr(self.module(torch.float32), "streaming", default))

    @property
    def grid(self) -> tuple[int, int]:
        """A grid for the module: rows of 9 cells; or, if it reads grids, of as many as it was built for (its attribute ``width``)."""
        return 7, getattr(self.module(torch.float32), "width", 9) if self.traits.grid else 9

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

    def run(
        self, module: Callable[..., Any], x: Tensor, state: State = None, layout: Layout | None = None, what: str = ""
    ) -> tuple[Tensor, State]:
        """One call of the module."""
        where = f"{what or 'a call'} at (B, L) = {tuple(x.shape[:2])}, {short(x.dtype)}"
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


def differentiable(state: State) -> State:
    """A copy of a state whose floating-point tensors are leaves that ask for a gradient."""
    return map_state(lambda t: t.clone().requires_grad_(t.is_floating_point()), detach_state(state))


def copied(state: State) -> State:
    """A detached deep copy of a state."""
    return map_state(lambda t: t.detach().clone(), state)
