"""Causal convolution of each channel with a filter as long as the sequence, by FFT, with the past inputs as its state.

Definition, for every channel ``d`` and ``M`` lags:

    y_t[d] = sum_{l=0..M-1} k_l[d] u_{t-l}[d]

where ``u`` before position 0 is the past (zeros at the beginning of a document); lags from ``M`` on count nothing.

Fast form: products of real FFTs of at least the summed lengths, so that nothing wraps round, a few channels at a time; the backward is written out (a
correlation with each factor) and keeps the inputs only, no spectra. The past stands right-aligned before the piece, so that rows that have seen
less are zeros on the left and need no lengths of their own. One token is a sum of products. Documents (resets) are convolved one after another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout

BLOCK_ELEMENTS = 1 << 21
"""Elements of a block of channels, as transformed, on a CPU."""

GPU_BLOCK_ELEMENTS = 1 << 25
"""The same on other devices, which are kept busy by few large blocks."""

TOKEN_ELEMENTS = 1 << 16
"""Elements of a block of the past, for one token, on a CPU."""

GPU_TOKEN_ELEMENTS = 1 << 24
"""The same on other devices."""


def long_conv_reference(u: Tensor, k: Tensor, past: Tensor | None = None) -> Tensor:
    """The definition, without a layout: ``y (B, L, D)``; arguments as :func:`long_conv`."""
    padded = u if past is None else torch.cat([past, u], 1)
    before, (M, _) = padded.shape[1] - u.shape[1], k.shape
    outputs = []
    for t in range(before, padded.shape[1]):
        lags = min(M, t + 1)
        outputs.append((padded[:, t + 1 - lags : t + 1] * k[:lags].flip(0)).sum(1))
    return torch.stack(outputs, 1)


def long_conv(
    u: Tensor, k: Tensor, past: Tensor | None = None, layout: Layout | None = None, reach: int | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution of a piece of a sequence with a long filter.

    Args:
        u: ``(B, L, D)``.
        k: the filter from lag 0 on, ``(M, D)``; lags from ``M`` on count nothing. At least ``min(reach, P + L)`` of them, or else later
            pieces would see lags that this one did not.
        past: earlier inputs ``(B, P, D)``, oldest first, the latest last; rows that have fewer are zeros on the left. ``None``: none.
        layout: lengths and resets are honoured.
        reach: lags that any later piece may use: ``reach - 1`` inputs at most are kept for it. ``None``: keep all.

    Returns:
        ``(y, past)``: ``y`` like ``u``, and the inputs ``(B, min(P + L, reach - 1), D)`` of each row's last document up to its own length, in at
        least float32 (as all the arithmetic is).

    Raises:
        ValueError: shapes that do not fit, or a filter that is too short.
    """
    B, L, D = u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    past = u.new_zeros(B, 0, D, dtype=dtype) if past is None else past
    if past.ndim != 3 or past.shape[0] != B or past.shape[2] != D:
        raise ValueError(f"long_conv: past is {tuple(past.shape)}, expected (B, P, D) = ({B}, P, {D})")
    P = past.shape[1]
    lags = P + L if reach is None else least(reach, P + L)
    if k.ndim != 2 or k.shape[1] != D or k.shape[0] < lags:
        raise ValueError(f"long_conv: k is {tuple(k.shape)}, expected at least {lags} lags of D = {D} channels")
    with torch.autocast(u.device.type, enabled=False):
        k = k[:lags].to(dtype)
        valid = None if layout is None else layout.valid(L)
        now = u.to(dtype) if valid is None else torch.where(valid[..., None], u.to(dtype), 0)
        padded = torch.cat([past.to(dtype), now], 1) if P else now
        if layout is not None and layout.resets is not None:
            y = _documents(padded, k, layout)
        elif torch.compiler.is_exporting():
            y = _in_one(padded, k, L)
        elif L == 1:
            y = _one_token(padded, k)
        else:
            # Inputs out of every lag's reach are not transformed.
            first = max(0, P - k.shape[0] + 1)
            y = _FFTConv.apply(padded[:, first:], k, P - first)
        return y.to(u.dtype), _after(padded, P, layout, P + L if reach is None else least(P + L, reach - 1))


def least(a: int, b: int) -> int:
    """The lesser of two lengths, also where an exported program is to find it."""
    found: Any = torch.sym_min(a, b) if torch.compiler.is_exporting() else min(a, b)
    return found


def _in_one(padded: Tensor, k: Tensor, L: int) -> Tensor:
    """The outputs at the last ``L`` of ``padded (B, P + L, D)`` in a fixed number of operations, for an exported program of any sizes."""
    total, M = padded.shape[1], k.shape[0]
    if isinstance(L, int) and L == 1:
        return (padded.narrow(1, total - M, M) * k.flip(0)).sum(1, keepdim=True)
    size = total + M
    spectrum = _spectrum(padded, size) * _spectrum(k, size)
    return torch.fft.irfft(spectrum, size).narrow(-1, total - L, L).transpose(1, 2)


def _one_token(padded: Tensor, k: Tensor) -> Tensor:
    """The output at the last input, by blocks of lags, so that turned filters and products stay in the cache."""
    (B, total, D), M = padded.shape, k.shape[0]
    block = TOKEN_ELEMENTS if padded.device.type == "cpu" else GPU_TOKEN_ELEMENTS
    step = max(64, block // (B * D))
    y = padded.new_zeros(B, 1, D)
    for lag in range(0, M, step):
        part = k[lag : lag + step].flip(0)
        stop = total - lag
        y = y + (padded[:, stop - part.shape[0] : stop] * part).sum(1, keepdim=True)
    return y


def _after(padded: Tensor, P: int, layout: Layout | None, size: int) -> Tensor:
    """The last ``size`` inputs of each row's last document at its own length, zeros before it."""
    B, total, D = padded.shape
    if layout is None or (layout.lengths is None and layout.resets is None):
        kept = padded[:, total - size :]
        # With a past, the padded row is a tensor of its own already; a small part of it must not hold on to the rest.
        return kept if P and 2 * size > total else kept.clone()
    ends = torch.full((B,), total - P, device=padded.device) if layout.lengths is None else layout.lengths
    index = P + ends[:, None] + torch.arange(-size, 0, device=padded.device)
    first = torch.zeros_like(ends)
    starts = layout.starts()
    if starts is not None:
        start = starts.gather(1, (ends - 1).clamp_min(0)[:, None])[:, 0]
        first = torch.where((ends > 0) & (start >= 0), P + start, 0)
    found = padded.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, D))
    return torch.where((index >= first[:, None])[..., None], found, 0)


def _documents(padded: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """Each row's documents one after another, the first of them with the past."""
    assert layout.resets is not None
    B, L = layout.resets.shape
    P, M = padded.shape[1] - L, k.shape[0]
    rows = []
    for b in range(B):
        cuts = [p for p in layout.resets[b].nonzero().flatten().tolist() if p > 0]
        parts = []
        for start, stop in zip([0, *cuts], [*cuts, L], strict=True):
            carried = start == 0 and not bool(layout.resets[b, 0])
            first = max(0, P - M + 1) if carried else P + start
            part = padded[b : b + 1, first : P + stop]
            parts.append(_FFTConv.apply(part, k[: part.shape[1]], P + start - first))
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def fft_size(least: int) -> int:
    """The smallest ``2^a``, ``3 * 2^a`` or ``5 * 2^a`` that is not less: sizes at which FFTs are fast."""
    sizes = [odd << max(0, (-(-least // odd) - 1).bit_length()) for odd in (1, 3, 5)]
    return min(sizes)


class _FFTConv(torch.autograd.Function):
    """``y_t = sum_l k_l u_{t-l}`` for ``t`` from ``skip`` on, of ``u (B, N, D)`` and ``k (M, D)``, ``M <= N``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, skip: int) -> Tensor:
        B, N, D = u.shape
        size = fft_size(_needed(N, k.shape[0], skip))
        y = u.new_empty(B, N - skip, D)
        for d in _channels(B, D, size, u.device):
            # Channels first while transforming: contiguous sequences.
            spectrum = _spectrum(u[..., d], size).mul_(_spectrum(k[:, d], size))
            y[..., d] = torch.fft.irfft(spectrum, size)[..., skip:N].transpose(1, 2)
        ctx.save_for_backward(u, k)
        ctx.skip, ctx.size = skip, size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, k = ctx.saved_tensors
        B, N, D = u.shape
        size, skip = ctx.size, ctx.skip
        du = torch.empty_like(u) if ctx.needs_input_grad[0] else None
        dk = torch.empty_like(k) if ctx.needs_input_grad[1] else None
        for d in _channels(B, D, size, u.device):
            g = _spectrum(F.pad(dy[..., d], (0, 0, skip, 0)), size)
            if du is not None:
                product = g * _spectrum(k[:, d], size).conj()
                du[..., d] = torch.fft.irfft(product, size)[..., :N].transpose(1, 2)
            if dk is not None:
                product = (g * _spectrum(u[..., d], size).conj()).sum(0)
                dk[:, d] = torch.fft.irfft(product, size)[:, : k.shape[0]].t()
        return du, dk, None


def _needed(N: int, M: int, skip: int) -> int:
    """Size at which nothing wraps round into what is kept: what lies past the end may fall on the outputs before ``skip``."""
    return max(N, N + M - 1 - skip)


def _channels(B: int, D: int, size: int, device: torch.device) -> list[slice]:
    block = BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = max(1, block // (B * size))
    return [slice(d, min(d + step, D)) for d in range(0, D, step)]


def _spectrum(t: Tensor, size: int) -> Tensor:
    return torch.fft.rfft(t.transpose(-1, -2).contiguous(), size)
