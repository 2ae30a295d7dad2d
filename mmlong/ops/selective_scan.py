"""Selective scan: a diagonal state space a channel whose step, writing and reading follow the token (Mamba's S6).

Definition, for every channel ``d`` with ``N`` real modes, ``A <= 0`` and a step ``dt >= 0`` (Gu & Dao 2023, arXiv 2312.00752, section 3; Euler's rule for B):

    h_t[n] = exp(dt_t[d] A[n, d]) h_{t-1}[n] + dt_t[d] x_t[d] B_t[n]
    y_t[d] = sum_n C_t[n] h_t[n] + skip[d] x_t[d]

``B`` and ``C`` are shared by the channels. A state has ``N D`` numbers, so decays, writes and states of all tokens, ``(B, L, N, D)``, are never held: a block of a few
tokens makes its own in the caches, walks over them, and reads them by a product with ``C``. Only the inputs and the states between blocks are kept; the backward
goes through the blocks from the last to the first, makes the decays and states again, and with ``g`` the gradient of a state,

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1};   d(dt_t A) = g_t h_{t-1} exp(dt_t A);   d(dt_t x_t) = sum_n B_t g_t.

Exponents are never positive and nothing is divided. Modes come before channels in the state, so that rows are long. Under a compiler it is the scan of
:mod:`mmlong.ops.scan` over all modes of all tokens, which does hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout
from mmlong.ops.scan import scan

BLOCK_ELEMENTS = 1 << 18
"""Decays of a block; three tensors of so many elements are alive."""

ROW_ELEMENTS = 1 << 15
"""Rows of a batch go side by side as long as one token of theirs has no more modes than this."""


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None = None,
    h: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; arguments and results as :func:`selective_scan`."""
    state = x.new_zeros(x.shape[0], *A.shape) if h is None else h
    valid = None if layout is None else layout.valid(x.shape[1])
    outputs = []
    for t in range(x.shape[1]):
        before = state
        if layout is not None and layout.resets is not None:
            before = torch.where(layout.resets[:, t, None, None], 0, before)
        step = dt[:, t, None]
        after = (step * A).exp() * before + step * x[:, t, None] * B[:, t, :, None]
        state = after if valid is None else torch.where(valid[:, t, None, None], after, state)
        y = (C[:, t, :, None] * after).sum(1)
        outputs.append(y if skip is None else y + skip * x[:, t])
    return torch.stack(outputs, 1), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None = None,
    h: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the selective scan over a piece of a sequence.

    Args:
        x: inputs ``(batch, L, D)``.
        dt: steps ``(batch, L, D)``, >= 0.
        A: rates ``(N, D)``, <= 0.
        B: what writes ``(batch, L, N)``.
        C: what reads ``(batch, L, N)``.
        skip: ``(D,)``, how much of its own input each output adds, or ``None``.
        h: the state that came before ``(batch, N, D)``, or ``None`` from the beginning.
        layout: lengths and resets are honoured.

    Returns:
        ``(y, h)``: ``y`` like ``x``, and the state at each row's own length, in at least float32 (as all the arithmetic is).

    Raises:
        ValueError: shapes that do not fit.
    """
    (batch, L, D), N = x.shape, A.shape[0]
    shapes = {"dt": (dt, (batch, L, D)), "A": (A, (N, D)), "B": (B, (batch, L, N)), "C": (C, (batch, L, N))}
    optional = {"skip": (skip, (D,)), "h": (h, (batch, N, D))}
    shapes |= {name: (t, shape) for name, (t, shape) in optional.items() if t is not None}
    for name, (t, shape) in shapes.items():
        if tuple(t.shape) != shape:
            raise ValueError(f"selective_scan: {name} is {tuple(t.shape)}, expected {shape} for x {tuple(x.shape)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        u, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        skip = u.new_zeros(D) if skip is None else skip.to(dtype)
        h = u.new_zeros(batch, N, D) if h is None else h.to(dtype)
        valid = None if layout is None else layout.valid(L)
        if valid is not None:
            # A step of no time decays nothing and writes nothing.
            u, dt, B, C = (torch.where(valid[..., None], t, 0) for t in (u, dt, B, C))
        resets = None if layout is None else layout.resets
        if resets is not None and valid is not None:
            resets = resets & valid
        if torch.compiler.is_compiling():
            y, h = _all_at_once(u, dt, A, B, C, skip, h, resets)
        elif L == 1 and resets is None and not torch.is_grad_enabled():
            h = torch.addcmul((dt * u)[:, 0, None] * B[:, 0, :, None], (dt[:, 0, None] * A).exp_(), h)
            y = torch.addcmul((C @ h), u, skip)
        else:
            y, h = _SelectiveScan.apply(u, dt, A, B, C, skip, h, resets)
        return y.to(x.dtype), h


def _all_at_once(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, h: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay = (dt[:, :, None] * A).exp().flatten(2)
    write = ((dt * x)[:, :, None] * B[..., None]).flatten(2)
    layout = None if resets is None else Layout(resets=resets)
    states, last = scan(decay, write, h.flatten(1), layout)
    y = (C[:, :, None] @ states.unflatten(2, h.shape[1:])).squeeze(2)
    return y + skip * x, last.unflatten(1, h.shape[1:])


# The blocked form


def _blocks(batch: int, L: int, N: int, D: int) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Sets of rows, and for each the blocks of tokens."""
    rows = min(batch, max(1, ROW_ELEMENTS // (N * D)))
    tokens = max(1, BLOCK_ELEMENTS // (rows * N * D))
    for b in range(0, batch, rows):
        yield slice(b, min(b + rows, batch)), [(i, min(i + tokens, L)) for i in range(0, L, tokens)]


class _Block:
    """A block's inputs, time first, and its decays and states ``(T, R, N, D)``; products see ``T R`` matrices."""

    def __init__(
        self, inputs: tuple[Tensor, ...], A: Tensor, h: Tensor, resets: Tensor | None, rows: slice, i: int, j: int
    ) -> None:
        self.x, self.dt, self.B, self.C = (t[rows, i:j].transpose(0, 1).contiguous() for t in inputs)
        self.before, self.A = h, A
        self.u = self.dt * self.x
        self.decay = torch.mul(self.dt[:, :, None], A).exp_()
        if resets is not None:
            first = resets[rows, i:j].t()
            self.decay.masked_fill_(first[..., None, None], 0)
        self.h = torch.mul(self.u[:, :, None], self.B[..., None])
        for decay, state in zip(self.decay.unbind(0), self.h.unbind(0), strict=True):
            h = state.addcmul_(decay, h)

    def output(self) -> Tensor:
        """``C h`` ``(T, R, D)``."""
        return _rows(self.C, self.h)

    def backward(self, dy: Tensor, dh: Tensor, dA: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x (without the skip's), dt, B, C ``(T, R, .)`` and of the state before; that of A ``(R, N, D)`` is added to ``dA``."""
        g = torch.mul(dy[:, :, None], self.C[..., None])
        steps, decays = g.unbind(0), self.decay.unbind(0)
        steps[-1].add_(dh)
        for t in range(len(steps) - 2, -1, -1):
            steps[t].addcmul_(decays[t + 1], steps[t + 1])
        dC, dB, du = _columns(self.h, dy), _columns(g, self.u), _rows(self.B, g)
        g.mul_(self.decay)
        dbefore = steps[0].clone()
        g[1:].mul_(self.h[:-1])
        steps[0].mul_(self.before)
        for step, dt in zip(steps, self.dt.unbind(0), strict=True):
            dA.addcmul_(step, dt[:, None])
        ddt = torch.mul(g, self.A, out=self.decay).sum(2)
        return du * self.dt, ddt.addcmul_(du, self.x), dB, dC, dbefore


def _rows(left: Tensor, h: Tensor) -> Tensor:
    """``sum_n left[n] h[n, d]`` at every token."""
    T, R, N, D = h.shape
    return torch.bmm(left.view(T * R, 1, N), h.view(T * R, N, D)).view(T, R, D)


def _columns(h: Tensor, right: Tensor) -> Tensor:
    """``sum_d h[n, d] right[d]`` at every token."""
    T, R, N, D = h.shape
    return torch.bmm(h.view(T * R, N, D), right.reshape(T * R, D, 1)).view(T, R, N)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        skip: Tensor,
        h: Tensor,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, after = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(h)
        between: list[Tensor] = []
        for rows, pieces in _blocks(*x.shape[:2], *A.shape):
            state = h[rows]
            for i, j in pieces:
                between.append(state)
                block = _Block((x, dt, B, C), A, state, resets, rows, i, j)
                y[rows, i:j] = torch.addcmul(block.output(), block.x, skip).transpose(0, 1)
                state = block.h[-1].clone()
            after[rows] = state
        # Views of an input for the first blocks, else tensors that nobody else has.
        ctx.save_for_backward(x, dt, A, B, C, skip, resets, *between)
        ctx.set_materialize_grads(False)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dafter: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, skip, resets, *between = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
        dA, dh = torch.zeros_like(A), x.new_zeros(x.shape[0], *A.shape)
        dskip = torch.zeros_like(skip)
        at = 0
        for rows, pieces in _blocks(*x.shape[:2], *A.shape):
            back = torch.zeros_like(dh[rows]) if dafter is None else dafter[rows]
            total = torch.zeros_like(back)
            for k in reversed(range(len(pieces))):
                i, j = pieces[k]
                block = _Block((x, dt, B, C), A, between[at + k], resets, rows, i, j)
                part = dy[rows, i:j].transpose(0, 1).contiguous()
                *found, back = block.backward(part, back, total)
                found[0].addcmul_(part, skip)
                dskip += (part * block.x).sum((0, 1))
                for whole, t in zip((dx, ddt, dB, dC), found, strict=True):
                    whole[rows, i:j] = t.transpose(0, 1)
            dh[rows] = back
            dA += total.sum(0)
            at += len(pieces)
        return dx, ddt, dA, dB, dC, dskip, dh, None
