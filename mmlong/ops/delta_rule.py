"""The delta rule: a matrix state from which each token erases what is stored at its key before it writes there.

Definition, for every head, with log decay ``g_t <= 0`` (none, one a head, or one a key channel), a rate ``beta_t``, and an erasing key ``e_t`` that is ``k_t`` unless given:

    S' = Diag(exp(g_t)) S_{t-1}                       (N x P)
    S_t = S' + k_t (beta_t (v_t - S'^T e_t))^T
    y_t = S_t^T q_t                                   (P)

so that ``S_t = (I - beta_t k_t e_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T``: a diagonal plus rank one. Without decay it is DeltaNet (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484), a
step of gradient descent on ``|S^T k - v|^2 / 2``; with a decay a head Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), with one a channel Kimi delta attention (Kimi team 2025, arXiv
2510.26692). With keys of length one the transition's eigenvalues lie in [0, 1] for ``beta`` in [0, 1], and in [-1, 1] up to 2 (Grazzi et al. 2024, arXiv 2411.12537).

Several steps a token (DeltaProduct, Siems et al. 2025, arXiv 2502.10297) are the same op on a sequence that many times as long, which decays at the first of a token's steps and is read
after the last (:func:`delta_product`). A transition ``D - a f^T`` with a separate write ``k v^T``, as RWKV-7's, is two steps: erase by ``(k, e) = (a, D^{-1} f)`` with a value of zero, then write with ``e = 0``.

Fast form: chunks (:mod:`mmlong.ops.delta_chunks`), which follow one another as :mod:`mmlong.ops.chunk_forms` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.chunk_forms import Given, begins, documents_of, run_chunks
from mmlong.ops.decayed_pairs import LEAST
from mmlong.ops.delta_chunks import Decayed, DecayedTwoKeys, DeltaChunks, TwoKeys


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token; arguments and results as :func:`delta_rule`."""
    (B, L, H, P), N = v.shape, k.shape[-1]
    erase = k if erase is None else erase
    S = v.new_zeros(B, H, N, P) if state is None else state
    valid = None if layout is None else layout.valid(L)
    outputs = []
    for t in range(L):
        before = S
        if layout is not None and layout.resets is not None:
            before = torch.where(layout.resets[:, t, None, None, None], 0, before)
        if g is not None:
            before = g[:, t].exp().reshape(B, H, -1, 1) * before
        missing = v[:, t] - (before * erase[:, t, :, :, None]).sum(-2)
        after = before + k[:, t, :, :, None] * (beta[:, t, :, None] * missing)[:, :, None]
        S = after if valid is None else torch.where(valid[:, t, None, None, None], after, S)
        outputs.append((after * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1), S


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
    chunk: int | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """The delta rule, tokens before heads as projections give them.

    Args:
        q: queries ``(B, L, H, N)``.
        k: keys ``(B, L, H, N)``; the recurrence is bounded where ``|beta k.e| <= 2``, as for keys of length one.
        v: values ``(B, L, H, P)``.
        beta: rates ``(B, L, H)``.
        g: log decay a head ``(B, L, H)`` or a key channel ``(B, L, H, N)``, <= 0, or ``None`` for no decay;
            anything below ``LEAST`` counts as that.
        erase: keys at which is erased ``(B, L, H, N)``, or ``None`` for ``k``.
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
    keys, heads = (B, L, H, N), (B, L, H)
    for name, t, allowed in (
        ("q", q, [keys]),
        ("k", k, [keys]),
        ("beta", beta, [heads]),
        ("g", g, [heads, keys]),
        ("erase", erase, [keys]),
        ("state", state, [(B, H, N, P)]),
    ):
        if t is not None and tuple(t.shape) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"delta_rule: {name} is {tuple(t.shape)}, expected {expected} beside v {tuple(v.shape)}")
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ValueError(f"delta_rule: chunk must be a power of two, got {chunk}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    beta = beta.to(dtype)[..., None]
    state = v.new_zeros(B, H, N, P, dtype=dtype) if state is None else state.to(dtype)
    if g is not None:
        g = g.to(dtype).clamp_min(LEAST)
        g = g[..., None] if g.ndim == 3 else g
    valid = None if layout is None else layout.valid(L)
    if valid is not None:
        # A position that decays, erases and writes nothing hands the state on.
        there = valid[..., None, None]
        q, k, v, beta = (torch.where(there, t, 0) for t in (q, k, v, beta))
        g, erase = (None if t is None else torch.where(there, t, 0) for t in (g, erase))
    documents = documents_of(layout, L)
    if documents is not None and g is not None:
        # Nothing passes the decay of a document's first token.
        g = g.masked_fill(begins(documents)[..., None, None], 0)
    if L == 1 and documents is None and not torch.is_grad_enabled():
        with torch.autocast(v.device.type, enabled=False):
            return _one_token(q, k, v, beta, g, erase, state)
    size = chunk or default_chunk(N, P)
    kind: type[DeltaChunks]
    given: Given
    if erase is None:
        kind, given = (DeltaChunks, (q, k, beta, v)) if g is None else (Decayed, (q, k, beta, g, v))
    elif g is None:
        kind, given = TwoKeys, (q, k, beta, erase, v)
    else:
        kind, given = DecayedTwoKeys, (q, k, beta, g, erase, v)
    return run_chunks(kind, given, state, documents, size, keep)


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    erase: Tensor | None = None,
    state: Tensor | None = None,
    layout: Layout | None = None,
    chunk: int | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Several steps of the delta rule a token: decay, then ``n`` times erase and write, then read.

    Args:
        q: queries ``(B, L, H, N)``.
        k, v, beta, erase: as for :func:`delta_rule`, with the steps of a token after ``L``: ``(B, L, n, H, ...)``.
        g, state, layout, chunk, keep: as for :func:`delta_rule`.

    Returns:
        as :func:`delta_rule`.

    Raises:
        ValueError: shapes that do not fit, or a chunk that is no power of two.
    """
    n = k.shape[2]

    def only(t: Tensor, step: int) -> Tensor:
        """``t (B, L, ...)`` at one of a token's steps, zero at the others."""
        return F.pad(t.unsqueeze(2), [0, 0] * (t.ndim - 2) + [step, n - 1 - step]).flatten(1, 2)

    if layout is not None:
        lengths = None if layout.lengths is None else layout.lengths * n
        resets = None if layout.resets is None else F.pad(layout.resets[..., None], (0, n - 1)).flatten(1)
        layout = Layout(lengths=lengths, resets=resets)
    k, v, beta = k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2)
    g, erase = None if g is None else only(g, 0), None if erase is None else erase.flatten(1, 2)
    y, state = delta_rule(only(q, n - 1), k, v, beta, g, erase, state, layout, chunk, keep)
    return y.unflatten(1, (-1, n))[:, :, -1], state


def default_chunk(N: int, P: int) -> int:
    """Tokens a chunk: the state's work falls with it and the pairs' work grows."""
    return 32 if N * P <= 4096 else 64


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = state.dtype
    state = state if g is None else state * g[:, 0].exp()[..., None]
    key, value = k[:, 0].to(dtype), v[:, 0].to(dtype)
    forget = key if erase is None else erase[:, 0].to(dtype)
    write = beta[:, 0, :, :, None] * (value[:, :, None] - forget[:, :, None] @ state)
    state = torch.addcmul(state, key[..., None], write)
    return (q[:, 0, :, None].to(dtype) @ state)[:, None, :, 0].to(v.dtype), state
