"""Causal depthwise convolution with tens to hundreds of taps: chunks of tokens by products with Toeplitz matrices.

Definition, for every channel ``d`` of group ``g``, whose channels share ``K`` taps (the last tap is the present), the tail before position 0:

    y_t[d] = sum_{k=0..K-1} weight[g, K-1-k] x_{t-k}[d]

Fast form (the two-stage block form of StripedHyena 2, Ku et al. 2025, arXiv 2503.01868, section 4): the sequence is cut into chunks ``X_n`` of ``T`` tokens, and

    Y_n = H_0 X_n + H_1 X_{n-1} + ... + H_J X_{n-J},      H_j[t, s] = weight[g, K-1 - (jT + t - s)], zero where there is no such tap

so that a tap costs less than a multiply-add, which ``K`` shifted copies of the sequence take (:mod:`mmlong.ops.short_conv`), and no FFT is made. On a CPU it runs over blocks of
tokens and channels that stay in the cache; the backward is written out and keeps the inputs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 32
"""Tokens T a chunk: more of them would multiply more zeros, fewer would make smaller products."""

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block; it, its result and a gradient fit the second and third-level caches of a common processor."""


def toeplitz_conv(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """Causal depthwise convolution of a piece of a sequence.

    Args:
        x: ``(B, L, D)``.
        weight: ``(G, K)``, G dividing D: channel ``d`` has the taps of group ``d // (D // G)``.
        tail: the ``K - 1`` inputs before the piece, ``(B, K - 1, D)``, in the type of all arithmetic.

    Returns:
        ``y (B, L, D)`` in the type of ``tail``.
    """
    with torch.autocast(x.device.type, enabled=False):
        H = _matrices(weight.to(tail.dtype), CHUNK)
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return _whole(x.to(tail.dtype), H, tail)
        return _ToeplitzConv.apply(x, H, tail)


def _matrices(weight: Tensor, T: int) -> Tensor:
    """``H_j`` transposed, ``(J + 1, G, T, T)``: rows are inputs ``s``, columns outputs ``t``."""
    K = weight.shape[1]
    n = _reach(K, T) + 1
    # By lag, from -(T - 1) on: entry (s, t) of H_j is at lag jT + t - s.
    by_lag = F.pad(weight.flip(1), (T - 1, n * T - K))
    return by_lag.unfold(1, T, 1).unflatten(1, (n, T)).flip(2).transpose(0, 1).contiguous()


def _reach(K: int, T: int) -> int:
    """J: chunks before its own that a token reaches."""
    return (K - 1 + T - 1) // T


def _whole(x: Tensor, H: Tensor, tail: Tensor) -> Tensor:
    """All chunks at once, in operations that autograd and compilers understand."""
    (B, L, D), (n, G, T, _) = x.shape, H.shape
    before = (n - 1) * T
    chunks = (L + T - 1) // T
    padded = F.pad(torch.cat([tail, x], 1), (0, 0, before - tail.shape[1], chunks * T - L))
    major = padded.view(B, n - 1 + chunks, T, G, D // G).permute(3, 1, 0, 4, 2).flatten(2, 3)  # (G, chunk, B d, T)
    rows = major.shape[2]
    y = sum(torch.bmm(major.narrow(1, n - 1 - j, chunks).reshape(G, chunks * rows, T), H[j]) for j in range(n))
    assert isinstance(y, Tensor)
    return y.view(G, chunks, B, D // G, T).permute(2, 1, 4, 0, 3).reshape(B, chunks * T, D)[:, :L]


# The blocked form


def _blocks(B: int, L: int, D: int, G: int, T: int) -> Iterator[tuple[slice, slice, int, int]]:
    """Rows, groups, and ``start, stop`` of blocks of about ``BLOCK_ELEMENTS``, of at least 8 chunks where the sequence has them."""
    some = max(1, min(G, BLOCK_ELEMENTS // (8 * T * (D // G))))
    width = some * (D // G)
    tokens = max(T, BLOCK_ELEMENTS // width // T * T)
    rows = max(1, tokens // (-(-L // T) * T))
    for b in range(0, B, rows):
        for g in range(0, G, some):
            for i in range(0, L, tokens):
                yield slice(b, min(b + rows, B)), slice(g, min(g + some, G)), i, min(i + tokens, L)


def _major(x: Tensor, before: Tensor | None, start: int, stop: int, T: int, G: int) -> Tensor:
    """Tokens ``start`` to ``stop`` (whole chunks) of ``x (R, L, D)`` as ``(G, chunks, R d, T)``; what lies before it is the end of ``before``, then zeros."""
    R, L, D = x.shape
    dtype = x.dtype if before is None else before.dtype
    major = torch.zeros if start < 0 or stop > L else torch.empty
    out = major(G, (stop - start) // T, R, D // G, T, dtype=dtype)
    i, j = max(start, 0), min(stop, L)
    if start >= 0 and stop <= L:
        return _fill(out, x[:, i:j], T, G)
    padded = torch.zeros(R, stop - start, D, dtype=dtype)
    if i < j:
        padded[:, i - start : j - start] = x[:, i:j]
    if before is not None and start < 0:
        new = min(-start, before.shape[1])
        padded[:, -start - new : -start] = before[:, before.shape[1] - new :]
    return _fill(out, padded, T, G)


def _fill(out: Tensor, part: Tensor, T: int, G: int) -> Tensor:
    D = part.shape[2]
    out.copy_(part.unflatten(1, (-1, T)).unflatten(3, (G, D // G)).permute(3, 1, 0, 4, 2))
    return out.flatten(2, 3)


def _minor(major: Tensor, R: int) -> Tensor:
    """``(G, chunks, R d, T)`` to ``(R, tokens, D)``, a view."""
    return major.unflatten(2, (R, -1)).permute(2, 1, 4, 0, 3)


def _channels(groups: slice, d: int) -> slice:
    return slice(groups.start * d, groups.stop * d)


def _products(major: Tensor, H: Tensor, first: int, step: int, chunks: int) -> Tensor:
    """``sum_j major[chunk first + step j + n] H_j`` for ``chunks`` chunks ``n``: ``(G, chunks, rows, T)``."""
    G, _, rows, T = major.shape
    y = major.new_empty(G, chunks * rows, T)
    for j in range(H.shape[0]):
        part = major[:, first + step * j :][:, :chunks].flatten(1, 2)
        if j:
            y.baddbmm_(part, H[j])
        else:
            torch.bmm(part, H[j], out=y)
    return y.view(G, chunks, rows, T)


class _ToeplitzConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, H: Tensor, tail: Tensor) -> Tensor:
        (B, L, D), (n, G, T, _) = x.shape, H.shape
        y = torch.empty(B, L, D, dtype=tail.dtype)
        for rows, groups, i, j in _blocks(B, L, D, G, T):
            d = _channels(groups, D // G)
            chunks = -(-(j - i) // T)
            start = i - (n - 1) * T
            major = _major(x[rows, :, d], tail[rows, :, d], start, i + chunks * T, T, groups.stop - groups.start)
            out = _minor(_products(major, H[:, groups], n - 1, -1, chunks), rows.stop - rows.start)
            y[rows, i:j, d] = out.reshape(out.shape[0], chunks * T, -1)[:, : j - i]
        ctx.save_for_backward(x, H, tail)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, H, tail = ctx.saved_tensors
        (B, L, D), (n, G, T, _) = x.shape, H.shape
        dx = torch.empty(B, L, D, dtype=x.dtype) if ctx.needs_input_grad[0] else None
        dH = torch.zeros_like(H) if ctx.needs_input_grad[1] else None
        dtail = torch.zeros_like(tail) if ctx.needs_input_grad[2] else None
        back = H.transpose(2, 3)
        for rows, groups, i, j in _blocks(B, L, D, G, T):
            d, R, some = _channels(groups, D // G), rows.stop - rows.start, groups.stop - groups.start
            chunks = -(-(j - i) // T)
            # The gradient of these tokens, and what they hand back to those before them.
            later = _major(dy[rows, :, d].to(tail.dtype), None, i, i + (chunks + n - 1) * T, T, some)
            if dx is not None:
                found = _minor(_products(later, back[:, groups], 0, 1, chunks), R)
                dx[rows, i:j, d] = found.reshape(R, chunks * T, -1)[:, : j - i]
            if dH is not None:
                major = _major(x[rows, :, d], tail[rows, :, d], i - (n - 1) * T, i + chunks * T, T, some)
                now = later[:, :chunks].flatten(1, 2)
                for k in range(n):
                    then = major[:, n - 1 - k :][:, :chunks].flatten(1, 2)
                    dH[k, groups] += torch.bmm(then.transpose(1, 2), now)
            if dtail is not None and i == 0 and n > 1:
                first = _major(dy[rows, : (n - 1) * T, d].to(tail.dtype), None, -(n - 1) * T, (n - 1) * T, T, some)
                found = _minor(_products(first, back[:, groups], 0, 1, n - 1), R).reshape(R, (n - 1) * T, -1)
                dtail[rows, :, d] = found[:, (n - 1) * T - tail.shape[1] :]
        return dx, dH, dtail
