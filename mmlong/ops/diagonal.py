"""Time-invariant diagonal recurrence with complex modes (S4D): chunks of tokens by matrix products, states between chunks by powers.

Definition, for every channel with ``M`` modes ``a = exp(lam)`` (``Re lam < 0``) and readouts ``c``, all complex:

    h_t = a h_{t-1} + u_t,      y_t = 2 Re sum_m c_m h_{t,m}        (strict: h_{t-1} is read in place of h_t)

which is the causal convolution of ``u`` with ``k_l = 2 Re sum_m c_m a_m^l`` (Gu, Gupta, Goel & Re 2022, arXiv 2206.11893; the input matrix of the
discretised system is folded into ``c``). Complex numbers are pairs of reals in every argument and result.

Fast form: chunks of tokens (:mod:`mmlong.ops.chunked_system`), whose tables are powers of ``a``; states go from chunk to chunk by ``a^T``. A kernel of the whole
length, ``L x M`` exponentials a channel, is not made.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout
from mmlong.ops.chunked_system import CHUNK, ChunkTables, carry_by_doubling, in_chunks, lagged, plain


def diagonal_reference(
    u: Tensor, lam: Tensor, c: Tensor, h: Tensor | None = None, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition, without a layout; arguments and results as :func:`diagonal_recurrence`."""
    a, c = torch.view_as_complex(lam).exp(), torch.view_as_complex(c)
    state = torch.zeros(u.shape[0], *a.shape, dtype=a.dtype, device=a.device) if h is None else torch.view_as_complex(h)
    outputs = []
    for t in range(u.shape[1]):
        after = a * state + u[:, t, :, None]
        outputs.append(2 * (c * (state if strict else after)).sum(-1).real)
        state = after
    return torch.stack(outputs, 1), torch.view_as_real(state)


def diagonal_recurrence(
    u: Tensor,
    lam: Tensor,
    c: Tensor,
    h: Tensor | None = None,
    layout: Layout | None = None,
    strict: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a piece of a sequence.

    Args:
        u: ``(B, L, D)``.
        lam: logarithms of the modes ``(D, M, 2)``, real and imaginary parts.
        c: readouts ``(D, M, 2)``.
        h: the state that came before ``(B, D, M, 2)``, or ``None`` from the beginning.
        layout: lengths and resets are honoured. A document takes whole chunks, so very many documents much shorter than a chunk
            cost as much as if each filled one.
        strict: read the state before the present token instead of after it.
        chunk: tokens a chunk, default ``CHUNK``.

    Returns:
        ``(y, h)``: ``y`` like ``u``, and the state at each row's own length, in at least float32 (as all the arithmetic is).

    Raises:
        ValueError: shapes that do not fit.
    """
    B, L, D = u.shape
    M = lam.shape[1]
    if tuple(lam.shape) != (D, M, 2) or tuple(c.shape) != (D, M, 2):
        raise ValueError(f"diagonal_recurrence: lam {tuple(lam.shape)} and c {tuple(c.shape)} must be (D = {D}, M, 2)")
    if h is not None and tuple(h.shape) != (B, D, M, 2):
        raise ValueError(f"diagonal_recurrence: h is {tuple(h.shape)}, expected (B, D, M, 2) = {(B, D, M, 2)}")
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        lam, c = lam.to(dtype), c.to(dtype)
        h = u.new_zeros(B, D, M, 2, dtype=dtype) if h is None else h.to(dtype)
        if L == 1 and plain(layout):
            y, h = _one_token(u.to(dtype), lam, c, h, strict)
        else:
            tables = partial(_tables, lam, c, strict)
            y, flat = in_chunks(u.to(dtype), h.flatten(2), layout, chunk or CHUNK, tables)
            h = flat.unflatten(2, (M, 2))
        return y.to(u.dtype), h


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers as pairs."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)


def _powers(lam: Tensor, exponents: Tensor) -> Tensor:
    """``exp(lam j)`` for ``j`` of ``exponents (J,)``: ``(D, J, M, 2)``."""
    at = lam[:, None] * exponents.to(lam.dtype)[:, None, None]
    size = at[..., 0].exp()
    return torch.stack([size * at[..., 1].cos(), size * at[..., 1].sin()], -1)


def _reads(c: Tensor, powers: Tensor) -> Tensor:
    """Products with these, of the pairs ``(D, J, M, 2)``, are ``2 Re(c a^j h)``."""
    return 2 * multiply(c[:, None], powers) * c.new_tensor([1.0, -1.0])


def diagonal_kernel(lam: Tensor, c: Tensor, length: int) -> Tensor:
    """The impulse response ``k_l = 2 Re sum_m c_m a_m^l`` at lags ``0 .. length - 1``, ``(D, length)``; arguments as :func:`diagonal_recurrence`.

    A lag is a multiple of ``T`` and a rest: a product of powers of either, in place of ``length`` powers of every mode.
    """
    T = math.isqrt(length - 1) + 1
    near, far = (torch.arange(0, stop, step, device=lam.device) for stop, step in ((T, 1), (length, T)))
    products = torch.bmm(_reads(c, _powers(lam, far)).flatten(2), _powers(lam, near).flatten(2).mT)
    return products.flatten(1)[:, :length]


def _readout(c: Tensor, h: Tensor) -> Tensor:
    """``2 Re sum_m c_m h_m``."""
    return 2 * (c[..., 0] * h[..., 0] - c[..., 1] * h[..., 1]).sum(-1)


def _one_token(u: Tensor, lam: Tensor, c: Tensor, h: Tensor, strict: bool) -> tuple[Tensor, Tensor]:
    a = torch.view_as_real(torch.view_as_complex(lam.contiguous()).exp())
    after = multiply(a, h)
    after = torch.stack([after[..., 0] + u[:, 0, :, None], after[..., 1]], -1)
    return _readout(c, h if strict else after)[:, None], after


def _tables(lam: Tensor, c: Tensor, strict: bool, T: int) -> ChunkTables:
    D, M, _ = lam.shape
    powers = _powers(lam, torch.arange(T + 1, device=lam.device))
    reads = _reads(c, powers)

    def pairs(s: Tensor) -> Tensor:
        return s.unflatten(-1, (M, 2))

    def carry(left: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
        if not torch.compiler.is_exporting():
            states: Tensor = _Carry.apply(pairs(left), powers[:, T], pairs(h), keep)
            return states.flatten(-2)
        across = powers[:, T, None, None]  # (D, 1, 1, M, 2)
        return carry_by_doubling(
            left, h, keep, across, lambda a, s: multiply(a, pairs(s)).flatten(-2), lambda a: multiply(a, a)
        )

    def silent(s: Tensor, tokens: int | Tensor) -> Tensor:
        decay = powers[:, tokens, None] if isinstance(tokens, int) else powers[:, tokens]
        return multiply(decay, pairs(s)).flatten(-2)

    return ChunkTables(
        kernel=lagged(reads[:, :T, :, 0].sum(-1), strict),
        read=(reads[:, :T] if strict else reads[:, 1:]).reshape(D, T, 2 * M),
        write=powers[:, :T].flip(1).reshape(D, T, 2 * M),
        carry=carry,
        silent=silent,
    )


class _Carry(torch.autograd.Function):
    """``s_0 = h``, ``s_{j+1} = a keep_j s_j + left_j`` over the chunks ``j``; returns all ``s`` ``(D, B, n + 1, M, 2)``."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, a: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
        D, B, n, M, _ = left.shape
        states = left.new_empty(D, B, n + 1, M, 2)
        states[:, :, 0] = h
        w, s = torch.view_as_complex(left), torch.view_as_complex(states)
        factor = torch.view_as_complex(a.contiguous())[:, None]
        for j in range(n):
            step = factor if keep is None else factor * keep[:, j, None]
            torch.addcmul(w[:, :, j], step, s[:, :, j], out=s[:, :, j + 1])
        ctx.save_for_backward(states, a, keep)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor | None, ...]:
        states, a, keep = ctx.saved_tensors
        n = states.shape[2] - 1
        total = dstates.clone(memory_format=torch.contiguous_format)
        g, s = torch.view_as_complex(total), torch.view_as_complex(states)
        factor = torch.view_as_complex(a.contiguous()).conj().resolve_conj()[:, None]
        for j in range(n - 1, -1, -1):
            step = factor if keep is None else factor * keep[:, j, None]
            g[:, :, j].addcmul_(step, g[:, :, j + 1])
        crossing = s[:, :, :n] if keep is None else s[:, :, :n] * keep[:, :, None]
        da = (crossing.conj() * g[:, :, 1:]).sum((1, 2))
        return total[:, :, 1:], torch.view_as_real(da.resolve_conj()), total[:, :, 0], None
