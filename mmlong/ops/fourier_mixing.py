"""Fourier mixing: the real part of a discrete Fourier transform over tokens and channels.

Definition (Lee-Thorp et al. 2021, arXiv 2105.03824):

    y[l, d] = Re sum_{n, c} x[n, c] exp(-2 pi i (l n / L + d c / D)) = sum_{n, c} x[n, c] cos(2 pi (l n / L + d c / D))

Of a real ``x`` the sum at ``(L - l, D - d)`` is the conjugate of that at ``(l, d)``, so half of the channels are transformed and the other half is their mirror image. The cosine is the same with ``(l, d)`` and ``(n, c)``
exchanged: the matrix is symmetric, and the backward is the forward. Nothing is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fourier_mixing(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` times the real part of the transform of ``x (B, L, D)``, in the type of ``x``; computed in at least float32."""
    if torch.compiler.is_compiling():
        return _transform(x, scale)
    return _Fourier.apply(x, scale)


def _transform(x: Tensor, scale: float) -> Tensor:
    D = x.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        t = x.to(torch.promote_types(x.dtype, torch.float32))
        half = torch.fft.fft(torch.fft.rfft(t, dim=2), dim=1).real * scale
        # Channel D - d at token l is channel d at token -l.
        mirrored = half[:, :, 1 : (D + 1) // 2].flip(1, 2).roll(1, 1)
        return torch.cat([half, mirrored], 2).to(x.dtype)


class _Fourier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return _transform(x, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Fourier.apply(dy, ctx.scale), None
