"""Linear attention with a scalar decay, the chunk form of :mod:`mmlong.ops.linear_attention` in operations that autograd and compilers understand.

All chunks go at once, or on devices other than a CPU all chunks of a stretch. States at the chunks' boundaries come from one triangular product with the decays between them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STRETCH_CHUNKS = 256
"""Chunks that go at once where there is no loop over them: what joins them is quadratic in it."""


def whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    log_input: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    documents: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The chunk form over all chunks at once, in operations that autograd and compilers understand."""
    (B, L, H, P), G, dtype = v.shape, k.shape[2], state.dtype
    C = (L + size - 1) // size
    if torch.compiler.is_exporting() and not isinstance(L, int):
        C += 1  # of an unknown number of chunks, 1 would be traced as a special case
    short = C * size - L
    if log_input is None:
        log_input = torch.zeros_like(g)

    def chunks(t: Tensor, fill: float = 0.0) -> Tensor:
        padding = [0, 0] * (t.ndim - 2) + [0, short]
        return torch.nn.functional.pad(t, padding, value=fill).reshape(B, C, size, *t.shape[2:])

    Q, K, V = (chunks(t.to(dtype)) for t in (q, k, v))
    a = chunks(g).cumsum(2).movedim(3, 1)  # (B, H, C, Q)
    s = a - chunks(log_input, -math.inf).movedim(3, 1)
    total = a[..., -1]
    # Log decay up to each boundary (B, H, C + 1); in float64, since after thousands of strong decays a weak one is beyond float32's digits.
    exact = dtype if v.device.type == "mps" else torch.float64
    ends = torch.nn.functional.pad(total.cumsum(-1, dtype=exact), (1, 0))
    future = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    later = torch.ones(C + 1, C + 1, dtype=torch.bool, device=v.device).triu(1)
    cut_pairs, cut_ends = future, later
    cut_in: Tensor | None = None
    cut_out: Tensor | None = None
    if documents is not None:
        last = documents[:, -1:].expand(-1, short)
        inside = torch.cat([documents, last], 1).view(B, 1, C, size)
        boundary = torch.cat([torch.zeros_like(inside[..., 0, :1]), inside[..., -1]], -1)  # (B, 1, C + 1)
        cut_pairs = future | (inside[..., :, None] != inside[..., None, :])
        cut_ends = later | (boundary[..., :, None] != boundary[..., None, :])
        cut_in = inside != boundary[..., :-1, None]
        cut_out = inside != inside[..., -1:]
    none = -math.inf
    decay = (a[..., :, None] - s[..., None, :]).masked_fill(cut_pairs, none).exp()
    across = (ends[..., :, None] - ends[..., None, :]).to(dtype).masked_fill(cut_ends, none).exp()
    log_out = total[..., None] - s
    into, out = a if cut_in is None else a.masked_fill(cut_in, none), log_out
    out = out if cut_out is None else out.masked_fill(cut_out, none)
    M = torch.einsum("bctgn,bcsgn->bgcts", Q, K).repeat_interleave(H // G, 1) * decay
    V = V.movedim(3, 1)  # (B, H, C, Q, P)
    Kh, Qh = (t.movedim(3, 1).repeat_interleave(H // G, 1) for t in (K, Q))
    written = torch.einsum("bhcqp,bhcqn->bhcpn", V * out.exp()[..., None], Kh)
    states = torch.einsum("bhrc,bhcpn->bhrpn", across, torch.cat([state[:, :, None], written], 2))
    y = M @ V + torch.einsum("bhcqn,bhcpn->bhcqp", Qh * into.exp()[..., None], states[:, :, :-1])
    y = y if skip is None else y + skip[:, None, None, None] * V
    return y.movedim(1, 3).reshape(B, C * size, H, P)[:, :L].to(v.dtype), states[:, :, -1]


def stretches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    log_input: Tensor | None,
    skip: Tensor | None,
    state: Tensor,
    documents: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """:func:`whole` over stretches of chunks one after another, each recomputed in the backward: memory linear in the length, and little of it."""
    L, step = v.shape[1], size * STRETCH_CHUNKS
    if step >= L:
        return whole(q, k, v, g, log_input, skip, state, documents, size)
    outputs = []
    for i in range(0, L, step):
        part = slice(i, min(i + step, L))
        inside = None
        if documents is not None:
            # Counted from what the stretch before ended in, whose state this one begins with.
            inside = documents[:, part] - (documents[:, i - 1 : i] if i else 0)
        y, state = checkpoint(
            whole,
            *(None if t is None else t[:, part] for t in (q, k, v, g, log_input)),
            skip,
            state,
            inside,
            size,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(y)
    return torch.cat(outputs, 1), state
