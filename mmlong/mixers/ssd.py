"""What the mixers of Mamba-2's kind share (``mamba2``, ``mamba3``, ``hydra``, ``log_linear``): the choice of widths, first values, and the discretisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DT_FLOOR = 1e-4
"""Least step at the start."""


@dataclass(frozen=True)
class Widths:
    """Inner width, heads of ``headdim`` channels in it, and columns of a head's state."""

    inner: int
    heads: int
    headdim: int
    d_state: int


def choose_widths(name: str, dim: int, expand: float, d_state: int | None, headdim: int | None, ngroups: int) -> Widths:
    """Widths of a mixer, as asked for or chosen.

    Args:
        name: of the mixer, for errors.
        dim: width D.
        expand: inner width over ``dim``.
        d_state: ``None`` for 64, or ``dim`` down to 8 where that is less.
        headdim: ``None`` for 64, or the inner width where that is less or not divisible.
        ngroups: what heads must divide into.

    Raises:
        ValueError: an inner width, head width and number of groups that do not divide each other, or a size below 1.
    """
    inner = round(expand * dim)
    if headdim is None:
        headdim = 64 if inner % 64 == 0 else inner
    d_state = max(8, min(64, dim)) if d_state is None else d_state
    if inner < 1 or headdim < 1 or ngroups < 1 or inner % headdim or (inner // headdim) % ngroups:
        raise ValueError(
            f"{name}: inner width {inner} (expand x dim) must divide into heads of {headdim}, and its heads into "
            f"{ngroups} groups: choose headdim and ngroups accordingly"
        )
    at_least_one(name, d_state=d_state)
    return Widths(inner, inner // headdim, headdim, d_state)


def at_least_one(name: str, **sizes: int | None) -> None:
    """Raise ``ValueError`` for a size below 1; ``None`` is one that is chosen later."""
    for what, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: {what} must be at least 1, got {size}")


@torch.no_grad()
def init_steps(dt_bias: Tensor, low: float = 1e-3, high: float = 1e-1) -> None:
    """Biases whose softplus, the step of a token that says nothing, is log-uniform between ``low`` and ``high``."""
    dt = torch.empty(dt_bias.shape).uniform_(math.log(low), math.log(high)).exp().clamp_min(DT_FLOOR)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus undone


@torch.no_grad()
def init_taps(weight: Tensor, bias: Tensor) -> None:
    """Taps ``(C, K)`` and bias of a depthwise convolution, as torch's own."""
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


def discretise(dt: Tensor, bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay ``dt A`` and ``log dt``, of ``dt = softplus(raw + bias)`` and ``A = -exp(A_log)``, in at least float32.

    Args:
        dt: raw steps ``(..., H)``.
        bias: ``(H,)``.
        A_log: ``(H,)``.
    """
    dtype = torch.promote_types(dt.dtype, torch.float32)
    raw = dt.to(dtype) + bias.to(dtype)
    positive = F.softplus(raw)
    # Far below zero softplus is exp, and its logarithm the argument itself; there the quotient of its derivative is 0 / 0.
    low = raw < -15
    log = torch.where(low, raw, torch.where(low, 1.0, positive).log())
    return -positive * A_log.to(dtype).exp(), log
