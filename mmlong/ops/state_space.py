"""Time-invariant state space with a dense transition a channel (S4): chunks of tokens by matrix products, their tables by doubling.

Definition, for every channel with ``N`` real state numbers:

    h_t = A h_{t-1} + B u_t,      y_t = C h_t        (strict: C h_{t-1})

which is the causal convolution of ``u`` with ``k_l = C A^l B``. S4 (Gu, Goel & Re 2021, arXiv 2111.00396) evaluates the transform of the whole kernel at the roots of
unity, by a Cauchy kernel that its diagonal plus rank one makes cheap, and convolves by FFT.

Fast form here: chunks (:mod:`mmlong.ops.chunked_system`), for which ``A^l B`` and ``C A^l`` are wanted for the ``T`` lags of one chunk only. They come by doubling: from ``k``
rows and ``A^k``, ``2k`` rows and ``A^{2k}``, in ``log T`` batches of small matrix products, whatever the structure of ``A``. A transition that is a contraction, as S4's is,
loses no digits in its powers. The state is the system's own, so a sequence in pieces or token by token is the same computation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout
from mmlong.ops.chunked_system import CHUNK, ChunkTables, carry_by_doubling, in_chunks, lagged, plain


def state_space_reference(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition, without a layout; arguments and results as :func:`state_space`."""
    state = u.new_zeros(u.shape[0], *B.shape) if h is None else h
    outputs = []
    for t in range(u.shape[1]):
        after = (A @ state[..., None])[..., 0] + B * u[:, t, :, None]
        outputs.append((C * (state if strict else after)).sum(-1))
        state = after
    return torch.stack(outputs, 1), state


def state_space(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor | None = None,
    layout: Layout | None = None,
    strict: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the systems over a piece of a sequence.

    Args:
        u: ``(B, L, D)``.
        A: transitions ``(D, N, N)``, of the discrete systems.
        B, C: input and output matrices ``(D, N)``.
        h: the state that came before ``(B, D, N)``, or ``None`` from the beginning.
        layout: lengths and resets are honoured. A document takes whole chunks, so very many documents much shorter than a chunk
            cost as much as if each filled one.
        strict: read the state before the present token instead of after it.
        chunk: tokens a chunk, default ``CHUNK``.

    Returns:
        ``(y, h)``: ``y`` like ``u``, and the state at each row's own length, in at least float32 (as all the arithmetic is).

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, L, D = u.shape
    N = A.shape[-1]
    if tuple(A.shape) != (D, N, N) or tuple(B.shape) != (D, N) or tuple(C.shape) != (D, N):
        shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)} and C {tuple(C.shape)}"
        raise ValueError(f"state_space: {shapes} must be (D, N, N), (D, N) and (D, N) with D = {D}")
    if h is not None and tuple(h.shape) != (rows, D, N):
        raise ValueError(f"state_space: h is {tuple(h.shape)}, expected (B, D, N) = {(rows, D, N)}")
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        A, B, C = A.to(dtype), B.to(dtype), C.to(dtype)
        h = u.new_zeros(rows, D, N, dtype=dtype) if h is None else h.to(dtype)
        if L == 1 and plain(layout):
            after = torch.bmm(h.transpose(0, 1), A.mT).transpose(0, 1) + B * u[:, 0, :, None].to(dtype)
            y = (C * (h if strict else after)).sum(-1)[:, None]
            return y.to(u.dtype), after
        y, h = in_chunks(u.to(dtype), h, layout, chunk or CHUNK, partial(_tables, A, B, C, strict))
        return y.to(u.dtype), h


def _squared(A: Tensor, T: int) -> list[Tensor]:
    """``A, A^2, A^4, ..`` as far as their exponents do not exceed ``T``."""
    powers = [A]
    while 2 << (len(powers) - 1) <= T:
        powers.append(torch.bmm(powers[-1], powers[-1]))
    return powers


def _rows(first: Tensor, powers: list[Tensor], T: int) -> Tensor:
    """``first A^l`` for ``l = 0 .. T - 1`` of row vectors ``(D, N)``: ``(D, T, N)``."""
    rows = first[:, None]
    for power in powers:
        missing = T - rows.shape[1]
        if missing > 0:
            rows = torch.cat([rows, torch.bmm(rows[:, :missing], power)], 1)
    return rows


def _moved(s: Tensor, powers: list[Tensor], tokens: int | Tensor) -> Tensor:
    """States ``(D, B, N)`` after so many zeros (fewer than twice the last power's exponent): by the binary digits of that number."""
    for bit, power in enumerate(powers):
        if isinstance(tokens, int):
            if tokens >> bit & 1:
                s = torch.bmm(s, power.mT)
        else:
            s = torch.where((tokens >> bit & 1 == 1)[:, None], torch.bmm(s, power.mT), s)
    return s


def _tables(A: Tensor, B: Tensor, C: Tensor, strict: bool, T: int) -> ChunkTables:
    powers = _squared(A, T)
    across: Tensor | None = None  # A^T, of as many of the powers as T has binary digits that are one
    for bit, power in enumerate(powers):
        if T >> bit & 1:
            across = power if across is None else torch.bmm(across, power)
    assert across is not None
    transition = across
    written = _rows(B, [p.mT for p in powers], T)
    read = _rows(C, powers, T)

    def carry(left: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
        if not torch.compiler.is_exporting():
            states: Tensor = _Carry.apply(left, transition, h, keep)
            return states
        return carry_by_doubling(
            left,
            h,
            keep,
            transition,
            lambda a, s: torch.bmm(s.flatten(1, 2), a.mT).view(s.shape),
            lambda a: torch.bmm(a, a),
        )

    return ChunkTables(
        kernel=lagged((written @ C[..., None])[..., 0], strict),
        read=read if strict else torch.bmm(read, A),
        write=written.flip(1),
        carry=carry,
        silent=lambda s, tokens: _moved(s, powers, tokens),
    )


class _Carry(torch.autograd.Function):
    """``s_0 = h``, ``s_{j+1} = A keep_j s_j + left_j`` over the chunks ``j``, with ``A (D, N, N)``; returns all ``s`` ``(D, B, n + 1, N)``."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, A: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
        D, B, n, N = left.shape
        states = left.new_empty(D, B, n + 1, N)
        states[:, :, 0] = h
        for j in range(n):
            before = states[:, :, j] if keep is None else states[:, :, j] * keep[:, j, None]
            torch.baddbmm(left[:, :, j], before, A.mT, out=states[:, :, j + 1])
        ctx.save_for_backward(states, A, keep)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor | None, ...]:
        states, A, keep = ctx.saved_tensors
        D, B, n, N = states.shape[0], states.shape[1], states.shape[2] - 1, states.shape[3]
        g = dstates.clone(memory_format=torch.contiguous_format)
        for j in range(n - 1, -1, -1):
            if keep is None:
                torch.baddbmm(g[:, :, j], g[:, :, j + 1], A, out=g[:, :, j])
            else:
                g[:, :, j] += torch.bmm(g[:, :, j + 1], A) * keep[:, j, None]
        crossing = states[:, :, :n] if keep is None else states[:, :, :n] * keep[:, :, None]
        ahead = g[:, :, 1:].reshape(D, B * n, N)
        dA = torch.bmm(ahead.mT, crossing.reshape(D, B * n, N))
        return g[:, :, 1:], dA, g[:, :, 0], None
