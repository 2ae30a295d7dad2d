"""Attention by a kernel that factors into features of queries and keys, normalised: softmax's form at a cost linear in the length.

Definition, with features ``f_t`` of the query and ``h_t`` of the key, for every head,

    y_t = sum_s (f_t . h_s) v_s / sum_s (f_t . h_s)

over the past (s <= t), or over both sides (Katharopoulos et al. 2020, arXiv 2006.16236). The sum of weights is the sum of values that are all 1, so that a head is linear attention with one more value column
(:mod:`mmlong.ops.linear_attention`), and may decay and scale its writes as that does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.linear_attention import scalar_decay_attention

EPS = 1e-6
"""What a sum of weights is kept away from zero by."""


def kernel_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None, causal: bool = True, eps: float = EPS
) -> Tensor:
    """The definition, over all pairs; arguments as :func:`kernel_attention`, without a state."""
    B, L = q.shape[:2]
    here = torch.arange(L, device=q.device)
    seen = (here[:, None] >= here) if causal else torch.ones(L, L, dtype=torch.bool, device=q.device)
    seen = seen.expand(B, L, L)
    if layout is not None and (documents := layout.documents()) is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    if layout is not None and (valid := layout.valid(L)) is not None:
        seen = seen & valid[:, None, :]
    A = torch.einsum("bthn,bshn->bhts", q, k) * seen[:, None]
    return quotient(torch.einsum("bhts,bshp->bthp", A, with_ones(v)), eps)


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    log_input: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
    eps: float = EPS,
    chunk: int | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Over the past.

    Args:
        q: features of queries ``(B, L, H, N)``.
        k: features of keys ``(B, L, H, N)``.
        v: values ``(B, L, H, P)``.
        g: log decay ``(B, L, H)``, or ``None`` for none.
        log_input: log of the scale that writes get ``(B, L, H)``, or ``None`` for 1.
        state: ``(B, H, P + 1, N)``, the last row the sum of the keys' features; or ``None`` from the beginning.
        layout: lengths and resets are honoured.
        eps: added to the sums of weights, away from zero.
        chunk, keep: as for :func:`mmlong.ops.linear_attention.scalar_decay_attention`.

    Returns:
        ``(y, state)``: ``y (B, L, H, P)`` like ``v``, and the state at each row's own length, in at least float32.
    """
    values = with_ones(v)
    g = values.new_zeros(()).expand(values.shape[:3]) if g is None else g
    y, state = scalar_decay_attention(q, k, values, g, log_input, None, state, layout, chunk, keep)
    return quotient(y, eps).to(v.dtype), state


def kernel_attention_two_sided(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None, eps: float = EPS
) -> Tensor:
    """Over both sides; arguments and ``y`` as for :func:`kernel_attention`."""
    B, L, H, _ = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    if layout is None or layout.resets is None:
        return read(q, written(k, v, layout), eps).to(v.dtype)
    # The past with the token, and the future without it: the same over reversed rows.
    q, k, values = q.to(dtype), k.to(dtype), with_ones(v)
    g = values.new_zeros(()).expand(B, L, H)
    past, _ = scalar_decay_attention(q, k, values, g, layout=layout)
    back_q, back_k, back_v = (layout.flip_tokens(t) for t in (q, k, values))
    future, _ = scalar_decay_attention(back_q, back_k, back_v, g, layout=layout.flip(L))
    own = (q * k).sum(-1, keepdim=True) * values
    return quotient(past + layout.flip_tokens(future) - own, eps).to(v.dtype)


def written(k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """What all keys and values of a row leave, as a state ``(B, H, P + 1, N)``; lengths are honoured."""
    values = with_ones(v)
    valid = None if layout is None else layout.valid(v.shape[1])
    if valid is not None:
        values, k = (torch.where(valid[..., None, None], t, 0) for t in (values, k))
    with torch.autocast(v.device.type, enabled=False):
        return values.permute(0, 2, 3, 1) @ k.to(values.dtype).transpose(1, 2)


def read(q: Tensor, state: Tensor, eps: float = EPS) -> Tensor:
    """What queries ``(B, L, H, N)`` read of one state ``(B, H, P + 1, N)`` for the whole row: ``(B, L, H, P)``."""
    with torch.autocast(q.device.type, enabled=False):
        return quotient((q.to(state.dtype).transpose(1, 2) @ state.mT).transpose(1, 2), eps)


def with_ones(v: Tensor) -> Tensor:
    """Values ``(B, L, H, P)`` and a column of ones, in at least float32."""
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    return torch.cat([v, v.new_ones(()).expand(*v.shape[:-1], 1)], -1)


def quotient(sums: Tensor, eps: float) -> Tensor:
    """``(..., P + 1)``: all but the last over the last, which is moved ``eps`` away from zero."""
    weight = sums[..., -1:]
    return sums[..., :-1] / torch.where(weight < 0, weight - eps, weight + eps)
