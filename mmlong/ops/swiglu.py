"""SwiGLU without the hidden activations of the whole sequence.

Definition, for each token ``x``:

    a, b = split(W_in x + b_in);   y = W_out (silu(a) * b) + b_out

The hidden ``a, b`` are several times wider than ``x``; kept for the backward they are most of a block's memory, and walking over them through
main memory is most of its time at small widths. :func:`swiglu` runs over blocks of tokens that fit the cache, keeps only ``x``, and recomputes the
hidden in the backward, where it adds up the weights' gradients block by block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

BLOCK_BYTES = 1 << 19
"""Bytes of hidden activations in a block; with their temporaries they stay in the caches of a common core."""


def swiglu_reference(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None) -> Tensor:
    """The definition. ``x (..., D)``, ``w_in (2 M, D)``, ``w_out (D', M)``."""
    a, b = F.linear(x, w_in, b_in).chunk(2, dim=-1)
    return F.linear(F.silu(a) * b, w_out, b_out)


def swiglu(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None) -> Tensor:
    """Equal to :func:`swiglu_reference`, in blocks of tokens, with a recomputing backward.

    Traced code (``torch.compile``, ``torch.export``), other devices' eager kernels and second derivatives see the definition itself where the
    blocks would bring nothing: a compiler fuses it, and a GPU's cache is not blocked from Python.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return swiglu_reference(x, w_in, b_in, w_out, b_out)
    small = x.numel() * w_in.shape[0] // x.shape[-1] * x.element_size() <= 2 * BLOCK_BYTES
    if small:
        return swiglu_reference(x, w_in, b_in, w_out, b_out)
    return _SwiGLU.apply(x, w_in, b_in, w_out, b_out)


def _blocks(tokens: int, hidden: int, size: int) -> list[tuple[int, int]]:
    step = max(256, BLOCK_BYTES // (hidden * size))
    return [(i, min(i + step, tokens)) for i in range(0, tokens, step)]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            wi, bi, wo, bo = (None if t is None else t.to(dtype) for t in (w_in, b_in, w_out, b_out))
            assert wi is not None
            assert wo is not None
            flat = x.reshape(-1, x.shape[-1])
            y = torch.empty(flat.shape[0], w_out.shape[0], dtype=dtype)
            middle = w_out.shape[1]
            for i, j in _blocks(flat.shape[0], w_in.shape[0], x.element_size()):
                h = F.linear(flat[i:j].to(dtype), wi, bi)
                gated = F.silu(h[:, :middle]).mul_(h[:, middle:])
                if bo is None:
                    torch.mm(gated, wo.T, out=y[i:j])
                else:
                    torch.addmm(bo, gated, wo.T, out=y[i:j])
        ctx.save_for_backward(x, *[t for t in (wi, bi, wo, bo) if t is not None])
        ctx.biased = (b_in is not None, b_out is not None)
        ctx.types = (x.dtype, w_in.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        bias_in, bias_out = ctx.biased
        w_in = weights.pop(0)
        b_in = weights.pop(0) if bias_in else None
        w_out = weights.pop(0)
        dtype, middle = w_in.dtype, w_out.shape[1]
        flat, dflat = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.empty(flat.shape, dtype=ctx.types[0])
        # Sums over many blocks are kept in at least float32.
        sums = torch.promote_types(dtype, torch.float32)
        dw_in, dw_out = torch.zeros_like(w_in, dtype=sums), torch.zeros_like(w_out, dtype=sums)
        db_in = torch.zeros(w_in.shape[0], dtype=sums) if bias_in else None
        db_out = torch.zeros(w_out.shape[0], dtype=sums) if bias_out else None
        with torch.autocast("cpu", enabled=False):
            for i, j in _blocks(flat.shape[0], w_in.shape[0], x.element_size()):
                xb, dyb = flat[i:j].to(dtype), dflat[i:j].to(dtype)
                h = F.linear(xb, w_in, b_in)
                a, b = h[:, :middle], h[:, middle:]
                s = F.silu(a)
                dgated = dyb @ w_out
                dw_out += dyb.T @ (s * b)
                dh = torch.empty_like(h)
                torch.mul(dgated, s, out=dh[:, middle:])
                torch.mul(dgated, b, out=dh[:, :middle])
                dh[:, :middle] = torch.ops.aten.silu_backward(dh[:, :middle], a)
                dw_in += dh.T @ xb
                if db_in is not None:
                    db_in += dh.sum(0)
                if db_out is not None:
                    db_out += dyb.sum(0)
                if dx.dtype == dtype:
                    torch.mm(dh, w_in, out=dx[i:j])
                else:
                    dx[i:j] = dh @ w_in
        weight = ctx.types[1]
        return (
            dx.view(x.shape),
            dw_in.to(weight),
            None if db_in is None else db_in.to(weight),
            dw_out.to(weight),
            None if db_out is None else db_out.to(weight),
        )
