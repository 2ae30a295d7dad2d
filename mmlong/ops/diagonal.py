"""Time-invariant diagonal recurrence with complex modes (S4D): chunks of tokens by matrix products, states between chunks by powers.

Definition, for every channel with ``M`` modes ``a = exp(lam)`` (``Re lam < 0``) and readouts ``c``, all complex:

    h_t = a h_{t-1} + u_t,      y_t = 2 Re sum_m c_m h_{t,m}        (strict: h_{t-1} is read in place of h_t)

which is the causal convolution of ``u`` with ``k_l = 2 Re sum_m c_m a_m^l`` (Gu, Gupta, Goel & Re 2022, arXiv 2206.11893; the input matrix of the
discretised system is folded into ``c``). Complex numbers are pairs of reals in every argument and result.

Fast form: the sequence is cut into chunks of ``T`` tokens. Inside one, the convolution is a product with a ``T x T`` Toeplitz matrix of ``k_0 .. k_{T-1}``;
what a chunk leaves behind is a product with powers of ``a``, states go from chunk to chunk by ``a^T``, and are read by one more product. Neither a
kernel of the whole length (``L x M`` exponentials a channel) nor an FFT is made. Documents (resets) are moved so that each begins a chunk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout

CHUNK = 64
"""Tokens a chunk: as many as a channel's state commonly has numbers, which balances the products inside and between chunks."""

SCAN_PASSES = 20
"""Doubling steps over an unknown number of chunks in an exported program: enough for 2^20 of them, 67 million tokens."""


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
        bare = layout is None or (layout.lengths is None and layout.resets is None)
        if L == 1 and bare:
            y, h = _one_token(u.to(dtype), lam, c, h, strict)
        else:
            unknown = torch.compiler.is_exporting() and not isinstance(L, int)
            T = (chunk or CHUNK) if unknown else min(chunk or CHUNK, L)
            if unknown and (layout is None or layout.lengths is None):
                # The end of a sequence of unknown length lies anywhere in a chunk, as that of a padded row does.
                layout, bare = replace(layout or Layout(), lengths=torch.full((B,), L, device=u.device)), False
            y, h = _chunked(u.to(dtype), lam, c, h, None if bare else layout, strict, T)
        return y.to(u.dtype), h


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers as pairs."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], -1)


def _powers(lam: Tensor, exponents: Tensor) -> Tensor:
    """``exp(lam j)`` for ``j`` of ``exponents (J,)``: ``(D, J, M, 2)``."""
    at = lam[:, None] * exponents.to(lam.dtype)[:, None, None]
    size = at[..., 0].exp()
    return torch.stack([size * at[..., 1].cos(), size * at[..., 1].sin()], -1)


def _readout(c: Tensor, h: Tensor) -> Tensor:
    """``2 Re sum_m c_m h_m``."""
    return 2 * (c[..., 0] * h[..., 0] - c[..., 1] * h[..., 1]).sum(-1)


def _one_token(u: Tensor, lam: Tensor, c: Tensor, h: Tensor, strict: bool) -> tuple[Tensor, Tensor]:
    a = torch.view_as_real(torch.view_as_complex(lam.contiguous()).exp())
    after = _multiply(a, h)
    after = torch.stack([after[..., 0] + u[:, 0, :, None], after[..., 1]], -1)
    return _readout(c, h if strict else after)[:, None], after


def _chunked(
    u: Tensor, lam: Tensor, c: Tensor, h: Tensor, layout: Layout | None, strict: bool, T: int
) -> tuple[Tensor, Tensor]:
    B, L, D = u.shape
    M = lam.shape[1]
    ends = keep = places = None
    if layout is not None:
        valid = layout.valid(L)
        u = u if valid is None else torch.where(valid[..., None], u, 0)
        if layout.lengths is not None:
            ends = layout.lengths
        if layout.resets is not None:
            places, chunks = _places(layout, T)
            rows = torch.arange(B, device=u.device)[:, None].expand(-1, L)
            keep = torch.ones(B, chunks, dtype=u.dtype, device=u.device)
            keep = keep.masked_fill(
                torch.zeros_like(keep).index_put((rows, places // T), layout.resets.to(u.dtype), accumulate=True) > 0, 0
            )
            u = u.new_zeros(B, chunks * T, D).index_put((rows, places), u)
            last = torch.full((B,), L, device=u.device) if ends is None else ends
            ends = torch.where(last > 0, places.gather(1, (last - 1).clamp_min(0)[:, None])[:, 0] + 1, 0)
    length = u.shape[1]
    n = (length + T - 1) // T
    if torch.compiler.is_exporting() and not isinstance(length, int):
        n += 1  # of an unknown number of chunks, 1 would be traced as a special case
    # Channel-major, so that every product below is one batch of matrices a channel.
    major = F.pad(u.permute(2, 0, 1), (0, n * T - length)).reshape(D, B * n, T)

    powers = _powers(lam, torch.arange(T + 1, device=u.device))
    reads = 2 * _multiply(c[:, None], powers) * torch.tensor([1.0, -1.0], dtype=u.dtype, device=u.device)
    kernel = reads[..., 0].sum(-1)
    kernel = F.pad(kernel[:, : T - 1], (1, 0)) if strict else kernel[:, :T]
    toeplitz = F.pad(kernel, (T - 1, 0)).unfold(-1, T, 1).flip(-1)
    read = (reads[:, :T] if strict else reads[:, 1:]).reshape(D, T, 2 * M)
    write = powers[:, :T].flip(1).reshape(D, T, 2 * M)

    left = torch.bmm(major, write).view(D, B, n, M, 2)
    carry = _carry_scan if torch.compiler.is_exporting() else _Carry.apply
    states = carry(left, powers[:, T], h.transpose(0, 1), keep)
    entering = states[:, :, :n]
    if keep is not None:
        entering = entering * keep[:, :, None, None]
    y = torch.bmm(major, toeplitz.transpose(1, 2))
    y = torch.baddbmm(y, entering.reshape(D, B * n, 2 * M), read.transpose(1, 2)).view(D, B, n * T)
    after = _final(major.view(D, B, n * T), states, keep, powers, write, ends, length)
    y = y[:, :, :length].permute(1, 2, 0)
    if places is not None:
        y = y.gather(1, places[..., None].expand(-1, -1, D))
    return y, after


def _places(layout: Layout, T: int) -> tuple[Tensor, int]:
    """Where each token goes so that every document begins a chunk, int64 ``(B, L)``, and the number of chunks."""
    resets, starts = layout.resets, layout.starts()
    assert resets is not None
    assert starts is not None
    here = torch.arange(resets.shape[1], device=resets.device).expand_as(resets)
    previous = F.pad(starts.clamp_min(0), (1, -1))
    gaps = torch.where(resets, (previous - here) % T, 0)
    places = here + gaps.cumsum(1)
    return places, int(places[:, -1].max()) // T + 1


def _final(
    major: Tensor, states: Tensor, keep: Tensor | None, powers: Tensor, write: Tensor, ends: Tensor | None, length: int
) -> Tensor:
    """The state at ``ends (B,)`` (or at ``length``): that of the chunk it lies in, decayed, and the chunk's tokens before it."""
    D, B, _ = major.shape
    T, M = write.shape[1], powers.shape[2]
    if ends is None:
        chunk, rest = divmod(length, T)
        before = states[:, :, chunk]
        if not rest:
            return before.transpose(0, 1).clone()
        decay = powers[:, rest, None]
        window = F.pad(major[:, :, chunk * T : length], (T - rest, 0))
    else:
        rows = torch.arange(B, device=major.device)
        chunks, rests = ends // T, ends % T
        before = states[:, rows, chunks]
        if keep is not None:
            crossed = keep[rows, chunks.clamp_max(keep.shape[1] - 1)]
            before = before * torch.where(rests > 0, crossed, 1)[:, None, None]
        decay = powers[:, rests]
        index = ends[:, None] - T + torch.arange(T, device=major.device)
        window = major.gather(2, index.clamp_min(0).expand(D, -1, -1))
        window = torch.where(index >= (chunks * T)[:, None], window, 0)
    added = torch.bmm(window, write).view(D, B, M, 2)
    return (_multiply(decay, before) + added).transpose(0, 1).contiguous()


def _carry_scan(left: Tensor, a: Tensor, h: Tensor, keep: Tensor | None) -> Tensor:
    """What :class:`_Carry` does, for an exported program, which has no loop over an unknown number of chunks.

    A scan in doubling steps (Hillis & Steele 1986): after ``k`` of them each place holds the sum of the ``2^k`` chunks before it.
    """
    n = left.shape[2]
    passes = n.bit_length() if isinstance(n, int) else SCAN_PASSES
    torch._check(n < 1 << passes)
    total = torch.cat([h[:, :, None], left], 2)
    factor = a[:, None, None]  # (D, 1, 1, M, 2)
    across = None if keep is None else F.pad(keep, (1, 0))  # (B, n + 1): whether what came before crosses into it
    place = torch.arange(n + 1, device=left.device)
    for step in (1 << k for k in range(passes)):
        source = (place - step).clamp_min(0)
        moved = _multiply(factor, total.index_select(2, source))
        moved = torch.where((place >= step)[:, None, None], moved, 0)
        if across is not None:
            moved = moved * across[:, :, None, None]
            across = across * across.index_select(1, source)
        total = total + moved
        factor = _multiply(factor, factor)
    return total


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
