"""Softmax attention whose scores are given, not made of queries and keys.

Definition, for every head, with ``s_ij`` a function of the row ``i``,

    y_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij),      over all j, or over j <= i

Rows are taken a few at a time, and each few again in the backward, so that no more than their scores are ever there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ELEMENTS = 1 << 20
"""Scores that are there at a time, of all heads and rows of the batch."""

Scores = Callable[..., Tensor]
"""``(*rows, stop) -> (B or 1, H, r, stop)`` in at least float32: what some rows' parameters say of the first ``stop`` keys."""


def attention_of_scores(scores: Scores, rows: Sequence[Tensor], v: Tensor, past: int, causal: bool) -> Tensor:
    """Attention from given scores; work quadratic, memory linear in the length beside the parameters.

    Args:
        scores: called on rows of each of ``rows``.
        rows: tensors ``(.., L, n)``: what the scores of a query are made of.
        v: ``(B, H, S, D)``.
        past: keys before the first query's own.
        causal: see no later key.

    Returns:
        ``(B, H, L, D)`` like ``v``.
    """
    (B, H, S, _), L = v.shape, rows[0].shape[-2]
    step = max(1, min(L, BLOCK_ELEMENTS // (B * H * S)))
    again: Callable[..., Tensor] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        again = _call
    outputs = []
    # Split all at once: a slice's gradient would be written into zeros of the whole's size each time.
    for n, parts in enumerate(zip(*(t.split(step, -2) for t in rows), strict=True)):
        outputs.append(again(_some_rows, scores, v, past + n * step, causal, *parts))
    return torch.cat(outputs, 2)


def _call(f: Callable[..., Tensor], *args: object) -> Tensor:
    return f(*args)


def _some_rows(scores: Scores, v: Tensor, first: int, causal: bool, *parts: Tensor) -> Tensor:
    """Of queries at ``first`` and after."""
    r = parts[0].shape[-2]
    stop = first + r if causal else v.shape[2]
    with torch.autocast(v.device.type, enabled=False):
        s = scores(*parts, stop)
        if causal and r > 1:
            own = torch.arange(first, first + r, device=v.device)[:, None]
            s = s.masked_fill(torch.arange(stop, device=v.device) > own, -math.inf)
        weights = s.softmax(-1).to(v.dtype)
        seen = v[:, :, :stop]
        if weights.shape[0] == 1 and v.shape[0] > 1:
            return torch.einsum("hrs,bhsd->bhrd", weights[0], seen)
        return weights @ seen
