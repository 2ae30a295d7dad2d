"""Whole = in pieces = one token at a time, in outputs and in the state that is left."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.state import State, state_bytes, state_tensors
from mmlong.testing.isolation import batch_comes_first
from mmlong.testing.subject import Subject

MORE = 33
"""Tokens by which a final state is continued: states are compared by what comes out of them, since a state may be kept in more than
one form."""

PIECES = {
    63: ([1, 62], [31, 1, 31], [62, 1]),
    257: ([1, 64, 100, 92], [2, 3, 5, 8, 13, 21, 34, 55, 89, 27], [128, 129]),
}


def whole_is_pieces(s: Subject) -> None:
    """Outputs and final state do not depend on how the sequence was cut."""
    for dtype in (torch.float64, torch.float32):
        module = s.module(dtype)
        with torch.no_grad():
            for length, batch in ((63, 1), (63, 3), (257, 1), (257, 3)):
                whole = _Whole(s, module, batch, length, dtype)
                for sizes in PIECES[length]:
                    whole.compare(sizes, f"in pieces of {sizes}")
                if (length, batch) == (63, 1) or (dtype == torch.float64 and (length, batch) == (257, 3)):
                    whole.compare([1] * length, "one token at a time")
    with torch.no_grad():
        _Whole(s, s.module(), 1, 1031, torch.float64).compare([1, 513, 300, 217], "in pieces of [1, 513, 300, 217]")


class _Whole:
    """One sequence, run whole, and what follows it."""

    def __init__(self, s: Subject, module: nn.Module, batch: int, length: int, dtype: torch.dtype) -> None:
        self.s, self.module, self.length = s, module, length
        tokens = s.tokens(batch, length + MORE, dtype=dtype)
        self.x, self.more = tokens[:, :length], tokens[:, length:]
        self.case = f"(B = {batch}, L = {length}, {str(dtype).removeprefix('torch.')})"
        self.y, self.state = s.run(module, self.x, what="whole")
        batch_comes_first(s, self.state, batch, f"the whole sequence {self.case}")
        self.all, _ = s.run(module, tokens, what="whole")
        s.agree(self.all[:, :length], self.y, f"a longer sequence against the shorter {self.case}")
        self.continues(self.state, "the whole")
        absorb: Any = getattr(module, "absorb", None)
        if absorb is not None:
            half = length // 2
            _, before = s.run(module, self.x[:, :half])
            with s.running("absorb"):
                after = absorb(self.x[:, half:], absorb(self.x[:, :half]))
            _, expected = s.run(module, self.x[:, half:], before)
            if not same_state(after, expected):
                s.fail(f"absorb leaves another state than a call {self.case}")

    def continues(self, state: State, after: str) -> None:
        y, _ = self.s.run(self.module, self.more, state, what=f"continuing after {after}")
        what = f"continuing from the state after {after} {self.case}"
        self.s.agree(y, self.all[:, self.length :], what, start=self.length)

    def compare(self, sizes: list[int], how: str) -> None:
        y, state = self.s.in_pieces(self.module, self.x, sizes, what=how)
        self.s.agree(y, self.y, f"outputs {how} against the whole {self.case}")
        batch_comes_first(self.s, state, self.x.shape[0], how)
        if self.s.traits.state == "constant":
            found, expected = _form(state), _form(self.state)
            if found != expected:
                self.s.fail(f"a constant state has the form {found} {how}, {expected} after the whole {self.case}")
        self.continues(state, f"running {how}")


def same_state(a: State, b: State) -> bool:
    """Whether two states are the same to the bit."""
    found, expected = state_tensors(a), state_tensors(b)
    return _form(a) == _form(b) and all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def _form(state: State) -> object:
    if isinstance(state, dict):
        return {key: _form(value) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        return type(state).__name__, [_form(value) for value in state]
    return (tuple(state.shape), str(state.dtype)) if isinstance(state, Tensor) else state


def grid_is_read_or_ignored(s: Subject) -> None:
    """A mixer that reads the grid gives the same with the cells' coordinates as positions, and in pieces, and not as without; any other, as without. A layout that says nothing is none."""
    module = s.module()
    grid = s.grid
    layout = Layout(grid=grid, order="serpentine")
    x = s.tokens(2, math.prod(grid))
    cells = layout.coordinates(x.shape[1], s.device).expand(2, -1, -1).contiguous()
    with torch.no_grad():
        y, _ = s.run(module, x, None, layout, "with a grid")
        as_positions, _ = s.run(module, x, None, Layout(positions=cells), "with the grid's coordinates as positions")
        s.agree(as_positions, y, "the grid's coordinates given as positions against the grid")
        without, _ = s.run(module, x)
        nothing, _ = s.run(module, x, None, Layout(), "with a layout that says nothing")
        s.agree(nothing, without, "with a layout that says nothing against without")
        if not s.traits.grid:
            s.agree(y, without, "with a grid, which its traits say it does not read, against without")
        elif not float((y - without).abs().max()) > 1e-9 * float(y.abs().max()):
            s.fail("its traits say that it reads the grid, but it gives the same with one as without")
        if s.streaming:
            sizes = [1, 20, x.shape[1] - 21]
            pieces, _ = s.in_pieces(module, x, sizes, layout=layout)
            s.agree(pieces, y, f"in pieces of {sizes} with a grid against the whole")


def state_is_as_declared(s: Subject) -> None:
    """The float32 state of one row takes the bytes declared, stays within them in memory, and grows as the traits say."""
    module = s.module(torch.float32)
    declared = getattr(module, "state_bytes", None)
    if not callable(declared):
        s.fail("has no state_bytes(length)")
        return
    with torch.no_grad():
        if not s.streaming or s.traits.state == "none":
            _, state = s.run(module, s.tokens(1, 63, dtype=torch.float32))
            if state is not None and state_tensors(state):
                kind = "the traits say state = 'none'" if s.streaming else "it does not stream"
                s.fail(f"returned a state of {state_bytes(state)} bytes, but {kind}")
            with s.running("state_bytes(63)"):
                if declared(63) != 0:
                    s.fail(f"has no state but declares {declared(63)} bytes of it")
            return
        for length in (1, 63, 257, 1031, 2062):
            x = s.tokens(1, length, dtype=torch.float32)
            with s.running(f"state_bytes({length})"):
                promised = declared(length)
            for how, sizes in (("whole", [length]), ("in two pieces", [length - length // 2, length // 2])):
                if 0 in sizes:
                    continue
                _, state = s.in_pieces(module, x, sizes)
                if (found := state_bytes(state)) != promised:
                    s.fail(f"after {length} tokens {how} the state takes {found} bytes, declared are {promised}")
                held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state_tensors(state)}
                if (memory := sum(held.values())) > 2 * promised + 1024:
                    s.fail(
                        f"after {length} tokens {how} a state of {promised} bytes keeps {memory} bytes of memory alive: "
                        "a view of something larger (clone it), which every kept state would hold on to"
                    )
        # Far out, because a window fills up first; and a growing state may have a bound. A constant one may be that of a block that fills up again and again: the most counts.
        first = declared(1)
        near, far = (max(declared(length + more) for more in range(64)) for length in (1 << 16, 1 << 17))
        if s.traits.state == "constant" and near != far:
            s.fail(f"state = 'constant', but declares {near} bytes after 65,536 tokens and more, {far} after 131,072")
        if s.traits.state == "growing" and not far > first:
            s.fail(f"state = 'growing', but declares {first} bytes after 1 token and {far} after 131,072")
