"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv 2104.09864), one-dimensional, in real arithmetic.

Channel ``c`` and channel ``c + R / 2`` of a head of ``D`` channels (``R``: D, or D - 1 where that is odd) are the two coordinates of a point that is turned by the
angle ``position * base ** (-2 c / R)``:

    y[c]         = x[c] cos - x[c + R/2] sin
    y[c + R/2]   = x[c + R/2] cos + x[c] sin

so that the product of a query and a key depends on the distance of their positions alone. Pairing halves, not neighbours, follows Llama's code; the two differ by a
fixed permutation of the channels, which the projections learn.

Angles are reduced to one turn in float64 before they are rounded: at a million tokens a float32 angle is already off by 0.06.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
"""Elements turned at a time on a CPU: source, result and table stay in the caches."""


def rotary_reference(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """The definition; arguments and result as :func:`rotate`."""
    half = x.shape[-1] // 2
    angle = positions.double()[..., None] * base ** (-torch.arange(half, device=x.device).double() / half)
    cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
    a, b, rest = x[..., :half].double(), x[..., half : 2 * half].double(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def rotary_table(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle.

    Args:
        positions: integer ``(L,)`` or ``(B, L)``.
        head_dim: channels D of a head.
        base: of the wavelengths.
        dtype: of the tokens; the table is in at least float32.

    Returns:
        two tensors ``(L, D // 2)`` or ``(B, L, D // 2)``.
    """
    half = head_dim // 2
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    rates = base ** (-torch.arange(half, device=positions.device, dtype=exact) / max(half, 1))
    angle = torch.remainder(positions.to(exact)[..., None] * rates, 2 * torch.pi)
    angle = angle.to(torch.promote_types(dtype, torch.float32))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the heads of every token by its position.

    Args:
        x: ``(B, L, H, D)``.
        table: from :func:`rotary_table`, for D channels and L positions.

    Returns:
        like ``x``. An odd last channel stays as it is.
    """
    cos, sin = (t if t.ndim == 3 else t[None] for t in table)
    if not cos.shape[-1]:
        return x
    if torch.compiler.is_compiling() or (x.shape[1] == 1 and not torch.is_grad_enabled()):
        return _turn(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


class _Rotate(torch.autograd.Function):
    """Keeps the table only: the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        L = x.shape[1]
        step = L if x.device.type != "cpu" else max(1, BLOCK_ELEMENTS // max(1, x[:, 0].numel()))
        if step >= L:
            return _turn(x, cos, sin)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i in range(0, L, step):
            j = min(i + step, L)
            y[:, i:j] = _turn(x[:, i:j], cos[:, i:j], sin[:, i:j])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dy, cos, -sin), None, None
