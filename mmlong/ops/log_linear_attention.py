"""Log-linear attention: linear attention with a scalar decay a head and a matrix state for each bucket of a Fenwick tree, of which each token weighs the levels.

Definition (Guo et al. 2025, arXiv 2506.04761), for every head, with log decays ``g_t <= 0``, weights ``w_t^(l) >= 0`` of ``K`` levels, and ``level(t, s)`` of :mod:`mmlong.ops.fenwick`, of
tokens counted from their document's first:

    y_t = sum over s <= t of w_t^(level(t, s)) exp(g_{s+1} + .. + g_t) (q_t . k_s) v_s

or, with ``S_t^(l)`` the decayed sum of ``k_s v_s^T`` over the tokens at level ``l``, ``y_t = sum over l of w_t^(l) S_t^(l)^T q_t``. At all weights one it is linear attention. Near tokens have levels of
their own, far ones share one with as many others as lie nearer, so the state grows with the logarithm of the length: ``K`` levels tell apart the first ``2^(K - 1)`` tokens of a document; beyond, the
last level is one bucket that is never merged, as linear attention's state. Keys and queries may be shared by the heads of a group.

Chunk form: within a chunk a masked product, of which the weights of pairs are those of the query at their levels; between chunks the states of the buckets, which every token reads at one level each:

    Y = (Q K^T * D * W) V + exp(a) * sum over b of w^(read_b) * (Q S_b)

and at a chunk's end buckets are merged and what the chunk wrote is added to one of them, or to a few where the chunk does not end on a round count. On a CPU a sequence of one count is cut into chunks at round
counts, and only buckets that have something in them are carried: one for each digit that is one, half of the digits on the average. Elsewhere, where reading counts back would stop a device or a compiler,
all are. Nothing is divided by, and decays between chunks are multiplied on one after another: weak decays after strong ones keep their digits.

Long sequences go in spans of chunks, recomputed in the backward (``SPAN``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmlong.layout import Layout, document_index
from mmlong.ops.chunk_forms import documents_of
from mmlong.ops.decayed_pairs import LEAST
from mmlong.ops.fenwick import level
from mmlong.ops.kv_cache import counts_after
from mmlong.ops.log_linear_chunks import Span, Tokens, blocked, plain

CHUNK = 64
"""Tokens a chunk."""

SPAN = 4096
"""Tokens of a row whose chunks are kept for the backward; of longer sequences so many are recomputed at a time."""


def log_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    weights: Tensor,
    state: Tensor | None = None,
    passed: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, token by token: buckets are merged as a counter carries. Arguments and results as :func:`log_linear_attention`."""
    (B, L, H, P), (G, N), K = v.shape, k.shape[2:], weights.shape[-1]
    q, k = (t.repeat_interleave(H // G, 2) for t in (q, k))
    S = v.new_zeros(B, H, K - 1, N, P) if state is None else state
    count = torch.zeros(B, dtype=torch.int64) if passed is None else passed
    valid = None if layout is None else layout.valid(L)
    outputs = []
    for t in range(L):
        there = torch.ones(B, dtype=torch.bool) if valid is None else valid[:, t]
        if layout is not None and layout.resets is not None:
            begins = layout.resets[:, t] & there
            S, count = torch.where(begins[:, None, None, None, None], 0, S), torch.where(begins, 0, count)
        write = k[:, t, :, :, None] * v[:, t, :, None]
        decayed = g[:, t, :, None, None, None].exp() * S
        all_levels = torch.cat([write[:, :, None], decayed], 2)  # (B, H, K, N, P)
        outputs.append(torch.einsum("bhk,bhn,bhknp->bhp", weights[:, t], q[:, t], all_levels))
        # The carry: levels up to that at which the next token sees this one become that level.
        to = level(count, count + 1, K)[:, None, None, None, None]
        place = torch.arange(K)[:, None, None]
        merged = torch.where(place <= to, all_levels, 0).sum(2, keepdim=True)
        after = torch.where(place == to, merged, torch.where(place < to, 0, all_levels))[:, :, 1:]
        S = torch.where(there[:, None, None, None, None], after, S)
        count = count + there.long()
    return torch.stack(outputs, 1), S, count


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    weights: Tensor,
    state: Tensor | None = None,
    passed: Tensor | None = None,
    layout: Layout | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-linear attention, tokens before heads as projections give them.

    Args:
        q: queries ``(B, L, G, N)``; head ``h`` reads group ``h // (H // G)``.
        k: keys ``(B, L, G, N)``.
        v: values ``(B, L, H, P)``.
        g: log decay ``(B, L, H)``, <= 0; below ``LEAST`` as ``LEAST``.
        weights: of the levels ``(B, L, H, K)``, K >= 2.
        state: the buckets of levels 1 to ``K - 1``, ``(B, H, K - 1, N, P)``, or ``None`` from the beginning.
        passed: int64 ``(B,)``, tokens that the document of ``state`` has had; beside it, or ``None`` from the beginning.
        layout: lengths and resets are honoured; a reset begins a new count.
        chunk: tokens a chunk, ``CHUNK`` by default.

    Returns:
        ``(y, state, passed)``: ``y (B, L, H, P)`` like ``v``; the state, in at least float32, and the count at each row's own length.

    Raises:
        ValueError: shapes that do not fit, or a state without its count.
    """
    (B, L, H, P), (G, N), K = v.shape, k.shape[2:], weights.shape[-1]
    if q.shape != k.shape or k.shape[:2] != (B, L) or H % G:
        raise ValueError(
            f"log_linear_attention: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, L, G, N) with G dividing "
            f"the H = {H} heads of v {tuple(v.shape)}"
        )
    if tuple(g.shape) != (B, L, H) or weights.shape[:3] != g.shape or K < 2:
        raise ValueError(
            f"log_linear_attention: g {tuple(g.shape)} and weights {tuple(weights.shape)} must be (B, L, H) = "
            f"{(B, L, H)} and (B, L, H, K) with K >= 2"
        )
    if (state is None) != (passed is None):
        raise ValueError("log_linear_attention: a state and the count of tokens that made it go together")
    if state is not None and tuple(state.shape) != (B, H, K - 1, N, P):
        raise ValueError(f"log_linear_attention: state is {tuple(state.shape)}, expected {(B, H, K - 1, N, P)}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    passed = torch.zeros(B, dtype=torch.int64, device=v.device) if passed is None else passed
    state = v.new_zeros(B, H, K - 1, N, P, dtype=dtype) if state is None else state.to(dtype)
    with torch.autocast(v.device.type, enabled=False):
        given = Tokens(*(t.to(dtype) for t in (q, k, v, g.clamp_min(LEAST), weights)))
        return _run(given, state, passed, layout, chunk or CHUNK, v.dtype)


def _run(
    given: Tokens, state: Tensor, passed: Tensor, layout: Layout | None, size: int, out: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    L = given.v.shape[1]
    index, final = document_index(passed, L, layout), counts_after(layout, L, passed)
    valid = None if layout is None else layout.valid(L)
    counts = index + 1
    if valid is not None:
        # A position that decays nothing and writes nothing hands the state on; nor is it counted.
        there = valid[..., None]
        counts = torch.where(valid, counts, final[:, None])
        k, v = (torch.where(there[..., None], t, 0) for t in (given.k, given.v))
        given = given._replace(k=k, v=v, g=torch.where(there, given.g, 0))
    span = Span(index, counts, documents_of(layout, L), passed)
    compiling = torch.compiler.is_compiling()
    if compiling and (given.v.device.type == "cpu" or torch.compiler.is_exporting()):
        n = (L + size - 1) // size
        if not isinstance(L, int):
            n = n + 1  # of an unknown number of chunks, 1 would be traced as a special case
        y, state = plain(*_padded(given, span, n * size - L), state, n)
        return y[:, :L].to(out), state, final
    first = 0
    if given.v.device.type == "cpu" and (layout is None or (layout.lengths is None and layout.resets is None)):
        begun = passed.tolist()
        if len(set(begun)) == 1:
            # All rows walk alike; and chunks begin at round counts from the first of those on.
            span = Span(index[:1], counts[:1], None, passed[:1])
            first = -begun[0] % size
    cuts = _cuts(L, first, size)
    sizes = [n * T for n, T in cuts]
    outputs, stop = [], 0
    for parts, (n, T) in zip(zip(*(t.split(sizes, 1) for t in given), strict=True), cuts, strict=True):
        start, stop = stop, stop + n * T
        part, inside = Tokens(*parts), span.part(start, stop)
        if given.v.device.type == "cpu":
            y, state = blocked(part, inside, state, n, keep=L <= SPAN)
        elif L > SPAN and torch.is_grad_enabled():
            y, state = checkpoint(plain, part, inside, state, n, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = plain(part, inside, state, n)
        outputs.append(y.to(out))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state, final


def _cuts(L: int, first: int, size: int) -> list[tuple[int, int]]:
    """Spans as (chunks, tokens a chunk): what is left to a round count, whole chunks, what is left over."""
    first = min(first, L)
    cuts = [(1, first)] if first else []
    whole, rest = divmod(L - first, size)
    most = max(1, SPAN // size)
    cuts += [(min(most, whole - i), size) for i in range(0, whole, most)]
    return cuts + ([(1, rest)] if rest else [])


def _padded(given: Tokens, span: Span, short: int) -> tuple[Tokens, Span]:
    """With so many positions more that do nothing."""
    L = given.v.shape[1]
    there = torch.arange(L + short, device=given.v.device) < L

    def longer(t: Tensor) -> Tensor:
        return F.pad(t, [0, 0] * (t.ndim - 2) + [0, short])

    def last(t: Tensor) -> Tensor:
        return torch.where(there, longer(t), t[:, -1:])

    documents = None if span.documents is None else last(span.documents)
    return Tokens(*map(longer, given)), Span(last(span.place), last(span.counts), documents, span.passed)
