"""Diagonal recurrence with decays of any kind: a vector state, a multiplication and an addition a channel and token.

Definition, for every channel, all real or all complex, with ``|a| <= 1``:

    h_t = a_t h_{t-1} + b_t

``a`` is one number a channel and token (gated recurrences: minGRU, arXiv 2410.01201; RG-LRU, arXiv 2402.19427) or one a channel (LRU, arXiv 2303.06349; S5,
arXiv 2208.04933). It is given itself, not as a logarithm: the recurrence only ever multiplies by it, a gate of exactly 0 (a document's beginning) is a number
like any other, and a gate that is a sigmoid needs no logarithm at all. Nothing is divided, so nothing overflows at any decay.

Fast form: the sequence is cut into chunks of ``T`` tokens that lie side by side. One walk over the position inside a chunk, for all chunks at once, finds what each chunk
leaves behind from nothing and the product of its decays; a walk over the chunks finds the states between them; a second walk over the positions, begun
from those, writes ``h``. That is ``2 T`` operations on long rows and ``L / T`` on short ones in place of ``L``, and every input is read twice. The backward is
the same recurrence from the end to the beginning,

    g_t = dh_t + conj(a_{t+1}) g_{t+1};   db_t = g_t;   da_t = conj(h_{t-1}) g_t,

written out, so that only ``a`` and ``h`` are kept. Under a compiler it is a scan in doubling steps instead (Hillis & Steele 1986).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout

CHUNK = 64
"""Tokens a chunk. Measured at 16,384 tokens of 256 channels: 64 to 128 is best, and 7 times faster than a walk over all tokens."""

SCAN_PASSES = 20
"""Doubling steps over an unknown number of chunks in an exported program: enough for 2^20 of them."""

SUM_TOKENS = 1024
"""Tokens that are multiplied before they are summed, where the gradient of a constant decay is a sum over all tokens."""


@dataclass(frozen=True)
class Algebra:
    """What multiplication and addition mean in a walk.

    Attributes:
        step: ``(term, factor, state, out)`` to ``factor * state + term``, written into ``out`` unless that is ``None``.
        chain: the product of two factors.
        one, zero: the factor that changes nothing, and the state that adds nothing.
    """

    step: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    chain: Callable[[Tensor, Tensor], Tensor]
    one: float
    zero: float


def _multiply_add(term: Tensor, factor: Tensor, state: Tensor, out: Tensor | None) -> Tensor:
    return torch.addcmul(term, factor, state) if out is None else torch.addcmul(term, factor, state, out=out)


def _add_maximum(term: Tensor, factor: Tensor, state: Tensor, out: Tensor | None) -> Tensor:
    moved = factor + state
    return torch.maximum(term, moved) if out is None else torch.maximum(term, moved, out=out)


SUMS = Algebra(_multiply_add, torch.mul, 1.0, 0.0)
MAXIMA = Algebra(_add_maximum, torch.add, 0.0, -1e30)
"""``h_t = max(h_{t-1} + a_t, b_t)``; finite in place of minus infinity, of which differences are not numbers."""


def scan_reference(
    a: Tensor, b: Tensor, h: Tensor | None = None, layout: Layout | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; arguments and results as :func:`scan`."""
    state = torch.zeros_like(b[:, 0]) if h is None else h
    valid = None if layout is None else layout.valid(b.shape[1])
    outputs = []
    for t in range(b.shape[1]):
        before = state
        if layout is not None and layout.resets is not None:
            before = torch.where(layout.resets[:, t, None], 0, before)
        after = (a if a.ndim == 1 else a[:, t]) * before + b[:, t]
        state = after if valid is None else torch.where(valid[:, t, None], after, state)
        outputs.append(after)
    return torch.stack(outputs, 1), state


def scan(
    a: Tensor, b: Tensor, h: Tensor | None = None, layout: Layout | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a piece of a sequence.

    Args:
        a: decays ``(B, L, D)``, or ``(D,)`` where they are the same at every token. In float32 or better: near 1 a lower precision has few values.
        b: what is added ``(B, L, D)``.
        h: the state that came before ``(B, D)``, or ``None`` from the beginning.
        layout: lengths and resets are honoured.
        chunk: tokens a chunk, default ``CHUNK``.

    Returns:
        ``(h, state)``: all states ``(B, L, D)`` (at padding the last valid one) and the one at each row's own length ``(B, D)``, in at least float32,
        complex if an argument is.

    Raises:
        ValueError: shapes that do not fit.
    """
    B, L, D = b.shape
    if tuple(a.shape) not in ((B, L, D), (D,)):
        raise ValueError(f"scan: a is {tuple(a.shape)}, expected (B, L, D) = {(B, L, D)} or (D,) = ({D},)")
    if h is not None and tuple(h.shape) != (B, D):
        raise ValueError(f"scan: h is {tuple(h.shape)}, expected (B, D) = {(B, D)}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(b.device.type, enabled=False):
        a, b = a.to(dtype), b.to(dtype)
        h = b.new_zeros(B, D) if h is None else h.to(dtype)
        if layout is not None and layout.resets is not None:
            a = torch.where(layout.resets[..., None], 0, a)
        valid = None if layout is None else layout.valid(L)
        if valid is not None:
            # A position that decays nothing and adds nothing hands the state on.
            a, b = torch.where(valid[..., None], a, 1), torch.where(valid[..., None], b, 0)
        if torch.compiler.is_compiling():
            return _doubling_form(a, b, h, chunk or CHUNK)
        if L == 1 and not torch.is_grad_enabled():
            h = torch.addcmul(b[:, 0], a if a.ndim == 1 else a[:, 0], h)
            return h[:, None], h
        return _Scan.apply(a, b, h, chunk or CHUNK)


def maxima(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """``h_t = max(h_{t-1} + a_t, b_t)`` at all tokens ``(B, L, D)``, by the same walk; without a gradient.

    Args:
        a: what a maximum loses or gains at each token ``(B, L, D)``.
        b: what it is compared with ``(B, L, D)``.
        h: the maximum before ``(B, D)``.
    """
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return _doubling_form(a, b, h, CHUNK, MAXIMA)[0]
        out = torch.empty_like(b, memory_format=torch.contiguous_format)
        _walk(a, b, h, out, CHUNK, algebra=MAXIMA)
        return out


# Chunks side by side


def _walk(a: Tensor, b: Tensor, h: Tensor, out: Tensor, T: int, back: bool = False, algebra: Algebra = SUMS) -> Tensor:
    """Write all states to ``out (B, L, D)``, from the beginning on or from the end back; the last one written.

    Whole chunks go together; what is left over at the end is a chunk of its own.
    """
    L = b.shape[1]
    even = L - L % T
    parts = [(0, even, T), (even, L, L - even)]
    for i, j, size in reversed(parts) if back else parts:
        if i < j:
            h = _walk_chunks(a if a.ndim == 1 else a[:, i:j], b[:, i:j], h, out[:, i:j], size, back, algebra)
    return h


def _walk_chunks(a: Tensor, b: Tensor, h: Tensor, out: Tensor, T: int, back: bool, algebra: Algebra) -> Tensor:
    n = b.shape[1] // T
    decays, added, places = ([a] * T if t.ndim == 1 else list(t.unflatten(1, (n, T)).unbind(2)) for t in (a, b, out))
    if back:
        decays, added, places = decays[::-1], added[::-1], places[::-1]
    entering = h[:, None]
    if n > 1:
        left, product = added[0].clone(), decays[0]
        for factor, term in zip(decays[1:], added[1:], strict=True):
            algebra.step(term, factor, left, left)
            product = algebra.chain(product, factor)
        product = product.expand_as(left)
        entering = torch.empty_like(left)
        for c in reversed(range(n)) if back else range(n):
            entering[:, c] = h
            h = algebra.step(left[:, c], product[:, c], h, None)
    state = entering
    for factor, term, place in zip(decays, added, places, strict=True):
        state = algebra.step(term, factor, state, place)
    return state[:, 0 if back else -1]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, h: Tensor, T: int) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(b, memory_format=torch.contiguous_format)
        final = _walk(a, b, h, out, T).clone()
        ctx.save_for_backward(a, h, out)
        ctx.T = T
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        a, h, out = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        back = a.conj().resolve_conj()
        g = torch.empty_like(out)
        g[:, -1] = dout[:, -1] if dfinal is None else dout[:, -1] + dfinal
        # What returns to a token has passed the decay of the one after it.
        later = back if a.ndim == 1 else back[:, 1:]
        _walk(later, dout[:, :-1], g[:, -1], g[:, :-1], ctx.T, back=True)
        da = None
        if ctx.needs_input_grad[0] and a.ndim == 1:
            da = (g[:, 0] * h.conj()).sum(0)
            for i in range(1, out.shape[1], SUM_TOKENS):
                some = g[:, i : i + SUM_TOKENS]
                da += (some * out[:, i - 1 : i - 1 + some.shape[1]].conj()).sum((0, 1))
        elif ctx.needs_input_grad[0]:
            da = torch.empty_like(out)
            torch.mul(g[:, 0], h.conj(), out=da[:, 0])
            torch.mul(g[:, 1:], out[:, :-1].conj(), out=da[:, 1:])
        return da, g, (back if a.ndim == 1 else back[:, 0]) * g[:, 0], None


# Doubling steps


def _doubling_form(a: Tensor, b: Tensor, h: Tensor, T: int, algebra: Algebra = SUMS) -> tuple[Tensor, Tensor]:
    """Inside all chunks, then between them, in operations that autograd and compilers understand."""
    B, L, D = b.shape
    n = (L + T - 1) // T
    if torch.compiler.is_exporting() and not isinstance(L, int):
        n += 1  # of an unknown number of chunks, 1 would be traced as a special case
    short = n * T - L
    added = F.pad(b, (0, 0, 0, short)).reshape(B, n, T, D)
    decays = F.pad(a.expand(B, L, D), (0, 0, 0, short)).reshape(B, n, T, D)
    decays, local = _double(decays, added, 2, algebra)
    ends = torch.cat([h[:, None], local[:, :, -1]], 1)
    _, states = _double(F.pad(decays[:, :, -1], (0, 0, 1, 0)), ends, 1, algebra)
    out = algebra.step(local, decays, states[:, :n, None], None)
    out = out.reshape(B, n * T, D)[:, :L]
    return out, out[:, -1].clone()


def _double(a: Tensor, b: Tensor, axis: int, algebra: Algebra) -> tuple[Tensor, Tensor]:
    """Products of ``a`` and states from nothing at every place of an axis: after ``k`` steps they reach over ``2^k`` places."""
    size = b.shape[axis]
    passes = (size - 1).bit_length() if isinstance(size, int) else SCAN_PASSES
    torch._check(size <= 1 << passes)
    place = torch.arange(size, device=b.device).view(-1, *[1] * (b.ndim - 1 - axis))
    for step in (1 << k for k in range(passes)):
        within = place >= step
        b = algebra.step(b, a, torch.where(within, b.roll(step, axis), algebra.zero), None)
        a = algebra.chain(a, torch.where(within, a.roll(step, axis), algebra.one))
    return a, b
