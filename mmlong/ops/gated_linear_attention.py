"""Linear attention with a decay a key channel: a matrix state that every token scales row by row, writes to, and reads.

Definition, for every head, with log decays ``g_t <= 0`` (one for each of the N key channels):

    S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T          (N x P)
    y_t = S_t^T q_t                                   (P)

This is gated linear attention (Yang et al. 2023, arXiv 2312.06635) and HGRN2 (Qin et al. 2024, arXiv 2404.07904). With a bonus ``u (N)`` for the current token, which RWKV-6 has
(Peng et al. 2024, arXiv 2404.05892), what is read is the state before the token, and the token itself by a weight of its own:

    y_t = (S_{t-1} + Diag(u) k_t v_t^T)^T q_t

where ``S_{t-1}^T q_t`` is what token ``t - 1`` would read with the query ``q_t``: the same recurrence with the queries moved by one.

Chunk form, with ``G_t`` the sum of ``g`` from the chunk's beginning and ``S_0`` the state before it, tokens as rows:

    A_ts = sum_n q_tn k_sn exp(G_tn - G_sn) for s <= t           (mmlong.ops.decayed_pairs)
    Y    = (exp(G) * Q) S_0 + A V
    S_T  = Diag(exp(G_T)) S_0 + (exp(G_T - G) * K)^T V

All exponents are sums of log decays, <= 0: nothing overflows at any decay. The gradient of ``G_t`` needs no sum over pairs: every path through it as a query's side ends in
``q_t``'s gradient, and as a key's side in ``k_t``'s,

    d G_t = q_t * dq_t - k_t * dk_t,   plus the rows' sums of S_T * dS_T at the chunk's end;   d g = reversed cumulative sum of d G.

How chunks follow one another on a CPU, under a compiler and on other devices is :mod:`mmlong.ops.chunk_forms`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.chunk_forms import Given, begins, documents_of, run_chunks
from mmlong.ops.decayed_pairs import LEAST, Documents, decay_of, scaled


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; arguments and results as :func:`gated_linear_attention`."""
    (B, L, H, P), N = v.shape, k.shape[-1]
    S = v.new_zeros(B, H, N, P) if state is None else state
    valid = None if layout is None else layout.valid(L)
    outputs = []
    for t in range(L):
        before = S
        if layout is not None and layout.resets is not None:
            before = torch.where(layout.resets[:, t, None, None, None], 0, before)
        write = k[:, t, :, :, None] * v[:, t, :, None, :]
        after = g[:, t, :, :, None].exp() * before + write
        S = after if valid is None else torch.where(valid[:, t, None, None, None], after, S)
        read = after if bonus is None else before + bonus[..., None] * write
        outputs.append((read * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1), S


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
    chunk: int | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a decay a key channel, tokens before heads as projections give them.

    Args:
        q: queries ``(B, L, H, N)``.
        k: keys ``(B, L, H, N)``.
        v: values ``(B, L, H, P)``.
        g: log decays ``(B, L, H, N)``, <= 0; below ``LEAST`` as ``LEAST``.
        bonus: ``(H, N)``, the weight by which a token's own key is read in place of 1, the state being read before its decay and its
            write; or ``None``, to read the state after both.
        state: ``(B, H, N, P)``, or ``None`` from the beginning.
        layout: lengths and resets are honoured.
        chunk: tokens a chunk, a power of two; ``None`` chooses by the sizes.
        keep: hold what a backward would recompute of the chunks until then, for a caller that runs short pieces of a sequence.

    Returns:
        ``(y, state)``: ``y (B, L, H, P)`` like ``v``, and the state at each row's own length, in at least float32.

    Raises:
        ValueError: shapes that do not fit, or a chunk that is no power of two.
    """
    (B, L, H, P), N = v.shape, k.shape[-1]
    keys = (B, L, H, N)
    for name, t, expected in (
        ("q", q, keys),
        ("k", k, keys),
        ("g", g, keys),
        ("bonus", bonus, (H, N)),
        ("state", state, (B, H, N, P)),
    ):
        if t is not None and tuple(t.shape) != expected:
            raise ValueError(
                f"gated_linear_attention: {name} is {tuple(t.shape)}, expected {expected} beside v {tuple(v.shape)}"
            )
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ValueError(f"gated_linear_attention: chunk must be a power of two, got {chunk}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    g = g.to(dtype).clamp_min(LEAST)
    state = v.new_zeros(B, H, N, P, dtype=dtype) if state is None else state.to(dtype)
    valid = None if layout is None else layout.valid(L)
    if valid is not None:
        # A position that decays nothing and writes nothing hands the state on.
        there = valid[..., None, None]
        q, k, v, g = (torch.where(there, t, 0) for t in (q, k, v, g))
    documents = documents_of(layout, L)
    if L == 1 and documents is None and not torch.is_grad_enabled():
        with torch.autocast(v.device.type, enabled=False):
            return _one_token(q, k, v, g, bonus, state)
    first = None if documents is None else begins(documents)[..., None, None]
    if first is not None:
        # Nothing passes the decay of a document's first token.
        g = g.masked_fill(first, 0)
    size = chunk or default_chunk(N, P)
    if bonus is None:
        return run_chunks(_GatedChunks, (q, k, g, v), state, documents, size, keep)
    wide = q.to(dtype)
    beginning = (wide[:, 0, :, :, None] * state).sum(-2)
    ahead = F.pad(q[:, 1:], (0, 0, 0, 0, 0, 1))
    past, after = run_chunks(_GatedChunks, (ahead, k, g, v), state, documents, size, keep)
    past = torch.cat([beginning[:, None], past[:, :-1].to(dtype)], 1)
    if first is not None:
        past = past.masked_fill(first, 0)
    own = (wide * (k.to(dtype) * bonus.to(dtype))).sum(-1, keepdim=True)
    return torch.addcmul(past, own, v.to(dtype)).to(v.dtype), after


def default_chunk(N: int, P: int) -> int:
    """Tokens a chunk: the state's work falls with it and the pairs' work grows."""
    return 32 if N * P <= 4096 else 64


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = state.dtype
    query, key, value = (t[:, 0].to(dtype) for t in (q, k, v))
    after = torch.addcmul(key[..., None] * value[:, :, None], state, g[:, 0, :, :, None].exp())
    y = (query[:, :, None] @ (after if bonus is None else state)).squeeze(2)
    if bonus is not None:
        y = torch.addcmul(y, (query * key * bonus.to(dtype)).sum(-1, keepdim=True), value)
    return y[:, None].to(v.dtype), after


class _GatedChunks:
    """Some chunks: their inputs (queries, keys, log decays, values), and what the forward and the backward both need of them."""

    def __init__(self, inputs: Given, documents: Documents | None) -> None:
        self.q, self.k, g, self.v = inputs
        self.decay = decay_of(g, self.q, documents)
        (self.pairs,) = self.decay.products([self.q], self.k)
        self.ask, self.leave = scaled(self.q, self.decay.into), scaled(self.k, self.decay.out)
        assert self.decay.total is not None
        self.total = self.decay.total

    def run(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        written = self.leave.mT @ self.v
        states = []
        for total, write in zip(self.total.unbind(0), written.unbind(0), strict=True):
            states.append(state)
            state = torch.addcmul(write, total, state)
        before = torch.stack(states)
        return self.ask @ before + self.pairs @ self.v, before, state

    def run_by_doubling(self, state: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        n = self.v.shape[0]
        torch._check(n < 1 << passes)
        # A chunk maps a state to total * S + written, and such maps compose: a scan in doubling steps (Hillis & Steele 1986). The
        # state before the first chunk is a map that forgets what it is given.
        add = torch.cat([state[None], self.leave.mT @ self.v])
        total = torch.cat([torch.zeros_like(self.total[:1]), self.total])
        place = torch.arange(n + 1, device=state.device)
        for step in (1 << i for i in range(passes)):
            source = (place - step).clamp_min(0)
            reached = (place >= step)[:, None, None, None]
            add = add + torch.where(reached, total * add.index_select(0, source), 0)
            total = torch.where(reached, total * total.index_select(0, source), total)
        return self.ask @ add[:n] + self.pairs @ self.v, add[n]

    def gradients(self, before: Tensor, after: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Given, Tensor]:
        decay, q, k, v = self.decay, self.q, self.k, self.v
        asked = self.ask.mT @ dy
        dafter = torch.empty_like(before)
        for c in reversed(range(before.shape[0])):
            dafter[c] = dstate
            dstate = torch.addcmul(asked[c], self.total[c], dstate)
        dv = (self.pairs.mT @ dy).add_(self.leave @ dafter)
        (dq,), dk = decay.gradients([q], k, [(dy @ v.mT).tril_()])
        dq += scaled(dy @ before.mT, decay.into)
        dk += scaled(v @ dafter.mT, decay.out)
        dG = (q * dq).addcmul_(k, dk, value=-1)
        # The end of a chunk's decay scales all of the state after it.
        dG[..., -1, :] += (torch.cat([before[1:], after[None]]) * dafter).sum(-1)
        return (dq, dk, dG.flip(-2).cumsum(-2).flip(-2), dv), dstate
