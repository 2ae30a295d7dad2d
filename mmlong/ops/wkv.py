"""WKV: a decaying average of values weighed by the exponentials of keys, channel by channel, with a bonus for the present token.

Definition (Peng et al. 2023, RWKV, arXiv 2305.13048, section 3.1), for every channel, with a decay ``w <= 0`` a token and a bonus ``u``:

    y_t = (sum_{s<t} exp((t-1-s) w + k_s) v_s + exp(u + k_t) v_t) / (the same without v)

Without decay and bonus (``w = u = 0``) it is the attention-free transformer's AFT-simple (Zhai et al. 2021, arXiv 2105.14103, section 3.3).

The exponentials of keys overflow, so numerator and denominator are kept over ``exp(m)``, with ``m_t = max(m_{t-1} + w, k_t)`` the largest exponent so far:

    num_t = exp(m_{t-1} + w - m_t) num_{t-1} + exp(k_t - m_t) v_t,     den_t likewise with v = 1

in which no exponent is positive, and the denominator is at least 1 (rounding of ``m`` aside, which the other exponents make up for). Given ``m``, that is the recurrence of :mod:`mmlong.ops.scan`; and ``m`` itself is found by the same
walk, with maxima for sums. ``m`` cancels from the output whatever it is, so no gradient goes through it, but for the one in the state that is returned, which
has that of the token it came from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.scan import MAXIMA, maxima, scan

Sums = tuple[Tensor, Tensor, Tensor]
"""``num, den, m``, each ``(B, D)``."""

NOTHING = MAXIMA.zero
"""The largest exponent where there is no token yet: so low that it never counts."""


def wkv_reference(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Sums | None = None, layout: Layout | None = None
) -> tuple[Tensor, Sums]:
    """The definition over ``exp(m)``, token by token; arguments and results as :func:`wkv`."""
    num, den, m = _begin(k) if state is None else state
    valid = None if layout is None else layout.valid(k.shape[1])
    outputs = []
    for t in range(k.shape[1]):
        before: tuple[Tensor, ...] = (num, den, m)
        if layout is not None and layout.resets is not None:
            first = layout.resets[:, t, None]
            before = tuple(torch.where(first, a, b) for a, b in zip(_begin(k), before, strict=True))
        top = torch.maximum(before[2], u + k[:, t])
        past, own = (before[2] - top).exp(), (u + k[:, t] - top).exp()
        outputs.append((past * before[0] + own * v[:, t]) / (past * before[1] + own))
        top = torch.maximum(before[2] + w, k[:, t])
        past, own = (before[2] + w - top).exp(), (k[:, t] - top).exp()
        after = (past * before[0] + own * v[:, t], past * before[1] + own, top)
        there = None if valid is None else valid[:, t, None]
        num, den, m = (
            a if there is None else torch.where(there, a, b) for a, b in zip(after, (num, den, m), strict=True)
        )
    return torch.stack(outputs, 1), (num, den, m)


def wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Sums | None = None, layout: Layout | None = None
) -> tuple[Tensor, Sums]:
    """The average over a piece of a sequence.

    Args:
        k: keys ``(B, L, D)``, of any size.
        v: values ``(B, L, D)``.
        w: log decay a token ``(D,)``, <= 0.
        u: bonus of the present token's key ``(D,)``.
        state: what an earlier call returned, or ``None`` from the beginning.
        layout: lengths and resets are honoured.

    Returns:
        ``(y, (num, den, m))``: ``y`` like ``v``, and the sums at each row's own length, in at least float32 (as all the arithmetic is).

    Raises:
        ValueError: shapes that do not fit.
    """
    B, L, D = k.shape
    if v.shape != k.shape or tuple(w.shape) != (D,) or tuple(u.shape) != (D,):
        raise ValueError(
            f"wkv: k {tuple(k.shape)} and v {tuple(v.shape)} must be alike, w {tuple(w.shape)} and u {tuple(u.shape)} be (D,)"
        )
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        key, value, w, u = (t.to(dtype) for t in (k, v, w, u))
        num, den, m = _begin(key) if state is None else (t.to(dtype) for t in state)
        valid = None if layout is None else layout.valid(L)
        resets = None if layout is None else layout.resets
        decay = w.expand(B, L, D)
        if valid is not None:
            key, value = torch.where(valid[..., None], key, NOTHING), torch.where(valid[..., None], value, 0)
            decay = torch.where(valid[..., None], decay, 0)
            resets = None if resets is None else resets & valid
        lost = decay if resets is None else torch.where(resets[..., None], NOTHING, decay)
        tops = maxima(lost.detach(), key.detach(), m.detach())
        before = torch.cat([m[:, None], tops[:, :-1]], 1)
        if resets is not None:
            before = torch.where(resets[..., None], NOTHING, before)
        # The difference first: what a large maximum rounds off a small decay would add up over the tokens.
        past, own = (before - tops + decay).exp(), (key - tops).exp()
        (nums, num_last), (dens, den_last) = scan(past, own * value, num, layout), scan(past, own, den, layout)
        top = torch.maximum(before, u + key).detach()
        past, own = (before - top).exp(), (u + key - top).exp()
        num, den = (torch.cat([t[:, None], all_[:, :-1]], 1) for t, all_ in ((num, nums), (den, dens)))
        if resets is not None:
            num, den = (torch.where(resets[..., None], 0, t) for t in (num, den))
        y = (past * num + own * value) / (past * den + own)
        last = tops[:, -1].clone()
        if torch.is_grad_enabled():
            last = _with_gradient(last, key, decay, m, resets)
            # What the sums are over has a gradient, so what they are must have the opposite.
            scale = (last.detach() - last).exp()
            if valid is not None:
                scale = torch.where(valid[:, :1], scale, 1)  # a row without a token hands on what came in
            num_last, den_last = num_last * scale, den_last * scale
        return y.to(v.dtype), (num_last, den_last, last)


def _begin(k: Tensor) -> Sums:
    return torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], NOTHING)


def _with_gradient(top: Tensor, k: Tensor, w: Tensor, m: Tensor, resets: Tensor | None) -> Tensor:
    """The last ``m``, ``top``, as a function of the token it came from, that many decays ago, or of the ``m`` that came in."""
    passed = w.flip(1).cumsum(1).flip(1)  # decays from a token on, its own included
    from_token = k + torch.nn.functional.pad(passed[:, 1:], (0, 0, 0, 1))
    from_state = m + passed[:, 0]
    if resets is not None:
        later = resets.flip(1).long().cumsum(1).flip(1)
        own = later - resets.long()  # resets after a token
        from_token = torch.where(own[..., None] > 0, NOTHING, from_token)
        from_state = torch.where(later[:, :1] > 0, NOTHING, from_state)
    chosen = torch.maximum(from_token.amax(1), from_state)
    return top + (chosen - chosen.detach())
