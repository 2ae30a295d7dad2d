"""Writes of any size under a decay, kept in range: a state in units that grow with the largest write it still holds.

A recurrence ``S_t = exp(g_t) S_{t-1} + exp(i_t) w_t`` overflows where ``i_t`` is large. Its largest term has the logarithm

    m_t = max(g_t + m_{t-1}, i_t)

and ``exp(-m_t) S_t`` is a recurrence of the same form with

    g'_t = g_t + m_{t-1} - m_t <= 0,   i'_t = i_t - m_t <= 0

which is how the mLSTM is stabilised (Beck et al. 2024, arXiv 2405.04517, section 2.3), and softmax kernels of random features can be (Choromanski et al. 2020, arXiv 2009.14794, subtract one maximum over all keys,
which a causal model may not know). What is read as a quotient of two sums over the same state does not depend on ``m``. Gradients pass through ``m``, so that those of a state with its units are right as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.chunk_forms import SCAN_PASSES, begins, documents_of

NOTHING = -1e30
"""The logarithm of no write at all. Not minus infinity, whose differences are no numbers."""

LEAST = -60.0
"""Smallest log decay that is told from smaller ones: nothing that matters is left, and sums of them stay exact."""


def log_scale_reference(
    log_input: Tensor, g: Tensor | None, m: Tensor, layout: Layout | None = None, empty: float = NOTHING
) -> Tensor:
    """The definition of ``m_t``, token by token; arguments as :func:`log_scale`."""
    scales = []
    for t in range(log_input.shape[1]):
        before = m
        if layout is not None and layout.resets is not None:
            before = torch.where(layout.resets[:, t, None], empty, before)
        after = torch.maximum(before if g is None else before + g[:, t], log_input[:, t])
        valid = None if layout is None or layout.lengths is None else (t < layout.lengths)[:, None]
        m = after if valid is None else torch.where(valid, after, m)
        scales.append(m)
    return torch.stack(scales, 1)


def log_scale(
    log_input: Tensor, g: Tensor | None, m: Tensor, layout: Layout | None = None, empty: float = NOTHING
) -> tuple[Tensor, Tensor, Tensor]:
    """The units of a state after each token, and the recurrence in them.

    Args:
        log_input: ``i``, log of the size of writes ``(B, L, H)``.
        g: log decay ``(B, L, H)``, <= 0, or ``None`` for none.
        m: log of the units before the first token ``(B, H)``.
        layout: lengths and resets are honoured; at padding nothing is written and nothing decays.
        empty: log of the units of an empty state, before a document.

    Returns:
        ``(scale, g', i')``, each ``(B, L, H)``: ``m_t``, and log decay and log size of writes in these units. ``scale[:, -1]`` are the
        units at each row's own length.
    """
    L = log_input.shape[1]
    dtype = torch.promote_types(log_input.dtype, torch.float32)
    size, m = log_input.to(dtype), m.to(dtype)
    decay = torch.zeros_like(size) if g is None else g.to(dtype)
    valid = None if layout is None else layout.valid(L)
    if valid is not None:
        # Less than nothing, so that an empty state's units are handed on, and their gradient.
        size = torch.where(valid[..., None], size, 2 * NOTHING)
        decay = torch.where(valid[..., None], decay, 0)
    documents = documents_of(layout, L)
    first = None if documents is None else begins(documents)[..., None]
    # The past is a write at the first token. Two stretches in a row decay by the sum, and the larger write is left of them.
    kept = decay if first is None else decay.masked_fill(first, NOTHING)
    largest = size if first is None else torch.where(first, torch.maximum(size, decay + empty), size)
    largest = torch.cat([torch.maximum(largest[:, :1], kept[:, :1] + m[:, None]), largest[:, 1:]], 1)
    for step in _steps(L):
        largest = torch.maximum(largest, _moved(largest, step, -math.inf) + kept)
        # Doubled again and again, "nothing" would run out of range.
        kept = (kept + _moved(kept, step, NOTHING)).clamp_min(NOTHING)
    scale = largest
    before = torch.cat([m[:, None], scale[:, :-1]], 1)
    held = before > NOTHING / 2
    if first is not None:
        held = held & ~first
    # Where nothing is held nothing decays. The difference first: what large units round off a small decay would add up over the tokens.
    log_decay = torch.where(held, before - scale + decay, 0).clamp_min(LEAST)
    written = torch.where(size > NOTHING / 2, size - scale, NOTHING)
    return scale, log_decay, written


def _steps(L: int) -> list[int]:
    passes = (L - 1).bit_length() if isinstance(L, int) else SCAN_PASSES
    return [1 << i for i in range(passes)]


def _moved(t: Tensor, step: int, fill: float) -> Tensor:
    """``t (B, L, H)`` moved ``step`` tokens on."""
    place = torch.arange(t.shape[1], device=t.device) - step
    return torch.where((place >= 0)[:, None], t.index_select(1, place.clamp_min(0)), fill)
