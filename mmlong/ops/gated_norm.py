"""Gated root-mean-square norm: gate first, then normalise each group of channels.

Definition, for every token and group of ``n`` channels (Dao & Gu 2024, arXiv 2405.21060, section 7):

    u = y * silu(z);   out = weight * u / sqrt(mean(u^2) + eps)

Written with its backward so that only ``y`` and ``z`` are kept, where autograd would keep six tensors of their size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.backends import Backend
from mmlong.ops.gated_norm_backends import GATED_NORM, choose_gated_norm

FEW = 1 << 13
"""Elements up to which the calls cost more than the arithmetic."""


def gated_rms_norm_reference(y: Tensor, z: Tensor, weight: Tensor, groups: int = 1, eps: float = 1e-5) -> Tensor:
    """The definition; arguments and result as :func:`gated_rms_norm`."""
    u = (y * F.silu(z)).unflatten(-1, (groups, -1))
    u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    return weight * u.flatten(-2)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, groups: int = 1, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """Gate, then norm.

    Args:
        y: what is gated ``(..., D)``.
        z: gate before its SiLU ``(..., D)``.
        weight: ``(D,)``.
        groups: groups of ``D / groups`` channels, each with a norm of its own.
        eps: added to the mean square.
        backend: a name that ``mmlong doctor`` lists, or ``auto`` for the best that can run here.

    Returns:
        ``(..., D)`` in the type of ``y``, computed in at least float32.

    Raises:
        BackendError: an unknown backend, or one that cannot do this, with the reason.
    """
    if backend == "auto" and (y.device.type == "cpu" or torch.compiler.is_compiling()):
        chosen = GATED_NORM.portable()
    else:
        chosen = choose_gated_norm(y, z, weight, groups, backend)
    return chosen.run(y, z, weight, groups, eps)


def _portable(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    if torch.compiler.is_compiling() or y.device.type != "cpu":
        dtype = torch.promote_types(y.dtype, torch.float32)
        return gated_rms_norm_reference(y.to(dtype), z.to(dtype), weight.to(dtype), groups, eps).to(y.dtype)
    if groups == 1 and y.numel() <= FEW and not torch.is_grad_enabled():
        # As a token that is drawn: what counts are the calls.
        dtype = torch.promote_types(y.dtype, torch.float32)
        u = F.silu(z.to(dtype)).mul_(y)
        return F.rms_norm(u, u.shape[-1:], weight.to(dtype), eps).to(y.dtype)
    return _GatedNorm.apply(y, z, weight, groups, eps)


GATED_NORM.register(Backend("portable", _portable, note="default on a CPU"))


def _mean_square(u: Tensor, groups: int) -> Tensor:
    """``(T, groups, 1)`` of ``u (T, D)``; the norm of a row is one pass, where square and mean would be two."""
    n = u.shape[-1] // groups
    return torch.linalg.vector_norm(u.unflatten(-1, (groups, n)), dim=-1, keepdim=True).square_().div_(n)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        dtype = torch.promote_types(y.dtype, torch.float32)
        u = F.silu(z.to(dtype)).mul_(y)
        rate = _mean_square(u, groups).add_(eps).rsqrt_()
        u.unflatten(-1, (groups, -1)).mul_(rate)
        ctx.save_for_backward(y, z, weight, rate)
        ctx.groups = groups
        return u.mul_(weight).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, rate = ctx.saved_tensors
        dtype, groups = rate.dtype, ctx.groups
        n = weight.shape[0] // groups
        wide, gate = z.to(dtype), F.silu(z.to(dtype))
        u = (gate * y).unflatten(-1, (groups, -1)).mul_(rate).flatten(-2)  # normalised
        dout = dout.to(dtype)
        product = dout * u
        dweight = product.flatten(0, -2).sum(0)
        inner = (product.mul_(weight)).unflatten(-1, (groups, n)).sum(-1, keepdim=True).div_(-n)
        du = torch.mul(dout, weight, out=product).unflatten(-1, (groups, n))
        du.addcmul_(u.unflatten(-1, (groups, n)), inner).mul_(rate)
        du = du.flatten(-2)
        dgate = torch.mul(du, y, out=u) if u.dtype == y.dtype else du * y
        return (
            du.mul_(gate).to(y.dtype),
            torch.ops.aten.silu_backward(dgate, wide).to(z.dtype),
            dweight.to(weight.dtype),
            None,
            None,
        )
