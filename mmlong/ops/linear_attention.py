"""Linear attention with a scalar decay per head: a matrix state, read by queries, written by keys and values.

Definition, for every head, with log decay ``g_t <= 0``, log input scale ``i_t`` and an optional skip ``d``:

    S_t = exp(g_t) S_{t-1} + exp(i_t) v_t k_t^T          (P x N)
    y_t = S_t q_t + d v_t                                 (P)

Keys and queries may be shared by the heads of a group. This is the state-space dual of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060; there
``q = C, k = B, v = x, g = dt A, exp(i) = dt``), RetNet's retention with ``g`` constant, and gated linear attention with one gate a head.

Chunk form, with ``a_t`` the sum of ``g`` from the chunk's beginning, ``s_t = a_t - i_t`` and ``S_0`` the state before the chunk:

    M_ts = (q_t . k_s) exp(a_t - s_s) for s <= t, plus d on the diagonal
    Y    = M V + exp(a) * (Q S_0^T)
    S_Q  = exp(a_Q) S_0 + (exp(a_Q - s) * V)^T K

The input scale rides in the exponent and the skip on the diagonal, so neither costs a pass over the tokens. Exponents are differences over ``s <= t``: nothing
overflows at any decay; a weight's relative error is the spacing of floats at the sum of ``g`` over the chunk (between chunks, where sums are longer, they are float64's). Blocks of a few chunks run through the caches
(:mod:`mmlong.ops.linear_attention_blocks`). The gradient of ``a_t`` needs no
sum over pairs, since every path through ``a_t`` as a query's side ends in ``y_t`` and as a key's side begins in ``v_t``:

    d a_t = dY_t . Y_t - V_t . dV_t,   plus <S_Q, dS_Q> at the chunk's end;   d g = reversed cumulative sum of d a.

That is the form on a CPU. Under a compiler and on other devices it is :mod:`mmlong.ops.linear_attention_whole`, or a package's kernels (:mod:`mmlong.ops.linear_attention_backends`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.backends import Backend, Request, span
from mmlong.ops.decayed_pairs import LEAST
from mmlong.ops.linear_attention_backends import LINEAR_ATTENTION, Recurrence, preferred
from mmlong.ops.linear_attention_blocks import BlockedScalarDecay
from mmlong.ops.linear_attention_whole import stretches, whole


def scalar_decay_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    log_input: Tensor | None = None,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; arguments and results as :func:`scalar_decay_attention`."""
    (B, L, H, P), N = v.shape, k.shape[-1]
    q, k = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (q, k))
    S = v.new_zeros(B, H, P, N) if state is None else state
    valid = None if layout is None else layout.valid(L)
    outputs = []
    for t in range(L):
        before = S
        if layout is not None and layout.resets is not None:
            before = torch.where(layout.resets[:, t, None, None, None], 0, before)
        write = v[:, t, :, :, None] * k[:, t, :, None, :]
        if log_input is not None:
            write = log_input[:, t, :, None, None].exp() * write
        after = g[:, t, :, None, None].exp() * before + write
        S = after if valid is None else torch.where(valid[:, t, None, None, None], after, S)
        y = (S * q[:, t, :, None, :]).sum(-1)
        outputs.append(y if skip is None else y + skip[:, None] * v[:, t])
    return torch.stack(outputs, 1), S


def scalar_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    log_input: Tensor | None = None,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
    chunk: int | None = None,
    keep: bool = False,
    rate: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention with scalar decay, tokens before heads as projections give them.

    Args:
        q: queries ``(B, L, G, N)``; head ``h`` reads group ``h // (H // G)``.
        k: keys ``(B, L, G, N)``.
        v: values ``(B, L, H, P)``.
        g: log decay ``(B, L, H)``, <= 0; below ``LEAST`` as ``LEAST``.
        log_input: log of the scale that writes get ``(B, L, H)`` (``-inf`` writes nothing), or ``None`` for 1.
        skip: ``(H,)``, how much of its own value each output adds, or ``None``.
        state: ``(B, H, P, N)``, or ``None`` from the beginning.
        layout: lengths and resets are honoured.
        chunk: tokens a chunk; ``None`` chooses by the sizes.
        keep: hold the weights of pairs until the backward instead of recomputing them, for a caller that runs short pieces of a
            sequence (``H x chunk`` numbers a token, twice).
        rate: ``(H,)``, < 0, where ``g = rate exp(log_input)``: a backend that is parametrised so takes these two in place of ``g``, and
            gives its gradient to them. ``None``: not known.
        backend: a name that ``mmlong doctor`` lists, or ``auto`` for the best that can run here. One token without a gradient is
            computed in plain torch by any of them.

    Returns:
        ``(y, state)``: ``y (B, L, H, P)`` like ``v``, and the state at each row's own length, in at least float32.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: an unknown backend, or one that cannot do this, with the reason.
    """
    (B, L, H, P), (G, N) = v.shape, k.shape[2:]
    if q.shape != k.shape or k.shape[:2] != (B, L) or H % G:
        raise ValueError(
            f"scalar_decay_attention: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, L, G, N) with G dividing "
            f"the H = {H} heads of v {tuple(v.shape)}"
        )
    for name, t in (("g", g), ("log_input", log_input)):
        if t is not None and tuple(t.shape) != (B, L, H):
            raise ValueError(f"scalar_decay_attention: {name} is {tuple(t.shape)}, expected (B, L, H) = {(B, L, H)}")
    if state is not None and tuple(state.shape) != (B, H, P, N):
        raise ValueError(f"scalar_decay_attention: state is {tuple(state.shape)}, expected {(B, H, P, N)}")
    if rate is not None and (tuple(rate.shape) != (H,) or log_input is None):
        raise ValueError(
            f"scalar_decay_attention: rate is {tuple(rate.shape)}, expected (H,) = ({H},), beside log_input"
        )
    dtype = torch.promote_types(v.dtype, torch.float32)
    g = g.to(dtype).clamp_min(LEAST)
    log_input = None if log_input is None else log_input.to(dtype)
    skip = None if skip is None else skip.to(dtype)
    state = v.new_zeros(B, H, P, N, dtype=dtype) if state is None else state.to(dtype)
    valid = None if layout is None else layout.valid(L)
    if valid is not None:
        # A position that decays nothing and writes nothing hands the state on.
        there = valid[..., None]
        g = torch.where(there, g, 0)
        log_input = torch.where(there, torch.zeros_like(g) if log_input is None else log_input, -math.inf)
        k, v = torch.where(there[..., None], k, 0), torch.where(there[..., None], v, 0)
    documents = None
    if layout is not None and layout.resets is not None:
        # A document that would begin in the padding has not begun.
        documents = (layout.resets if valid is None else layout.resets & valid).long().cumsum(1)
    size = chunk or default_chunk(N, P)
    rate = None if rate is None else rate.to(dtype)
    asked = Recurrence(q, k, v, g, log_input, skip, state, documents, rate, size, keep)
    return _choose(asked, backend).run(asked)


def _choose(r: Recurrence, backend: str) -> Backend:
    if backend == "auto" and (r.v.device.type == "cpu" or torch.compiler.is_compiling()):
        return LINEAR_ATTENTION.portable()
    (B, L, H, P), (G, N) = r.v.shape, r.k.shape[2:]
    sizes = {"batch": B, "length": L, "heads": H, "groups": G, "values": P, "keys": N}
    sizes |= {"span": span(r.q, r.k, r.v), "rated": int(r.rate is not None)}
    grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in r)
    mask = "" if r.documents is None else "resets"
    request = Request(r.v.device.type, r.v.dtype, mask, backward=grad, sizes=sizes)
    chosen = LINEAR_ATTENTION.choose(request, backend, preferred(request))
    return LINEAR_ATTENTION.portable() if _is_one_token(r) else chosen


def _is_one_token(r: Recurrence) -> bool:
    return r.v.shape[1] == 1 and r.documents is None and not torch.is_grad_enabled()


def _portable(r: Recurrence) -> tuple[Tensor, Tensor]:
    q, k, v, g, log_input, skip, state, documents, _, size, keep = r
    if _is_one_token(r):
        return _one_token(q, k, v, g, log_input, skip, state)
    if torch.compiler.is_compiling() and (v.device.type == "cpu" or torch.compiler.is_exporting()):
        with torch.autocast(v.device.type, enabled=False):
            return whole(q, k, v, g, log_input, skip, state, documents, size)
    if v.device.type != "cpu":
        with torch.autocast(v.device.type, enabled=False):
            return stretches(q, k, v, g, log_input, skip, state, documents, size)
    return BlockedScalarDecay.apply(q, k, v, g, log_input, skip, state, documents, size, torch.is_grad_enabled(), keep)


LINEAR_ATTENTION.register(Backend("portable", _portable, masks=frozenset({"resets"}), note="default on a CPU"))


def default_chunk(N: int, P: int) -> int:
    """Tokens a chunk: the state's work falls with it and the pairs' work grows, and narrow heads are all pairs' work."""
    return 32 if N * P <= 1024 else 64 if N * P <= 4096 else 128


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, log_input: Tensor | None, skip: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    (B, _, H, P), (G, N), dtype = v.shape, k.shape[2:], state.dtype
    value = v[:, 0].to(dtype)
    written = value if log_input is None else value * log_input[:, 0, :, None].exp()
    write = written.view(B, G, -1, 1) * k[:, 0, :, None].to(dtype)
    state = torch.addcmul(write.view(B, H, P, N), state, g[:, 0, :, None, None].exp())
    y = (state.view(B, G, -1, N) @ q[:, 0, :, :, None].to(dtype)).view(B, H, P)
    y = y if skip is None else torch.addcmul(y, value, skip[:, None])
    return y[:, None].to(v.dtype), state
