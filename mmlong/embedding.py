"""What a model makes of raw data before it says anything: one vector a document, or one a token.

The vector is what the head's last linear layer sees (timm's ``pre_logits``). A model that streams reads a document piece by piece, so that only the features of it are held; any other reads it whole. Of an autoregressive
model a token's features are those that predict it, and know the tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmlong.generation import evaluating
from mmlong.heads.pooling import create_pool
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.models import Model
from mmlong.models.intermediates import on_grid

POOLS = ("mean", "last", "max")
"""Poolings without weights, for a head that has none of its own."""
PIECE = 16384


def check_pool(model: Model, pool: str | None) -> None:
    """Raise ``ValueError`` unless :func:`embed` would know how to pool."""
    if pool is not None and pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; it can be {', '.join(POOLS)}, or the head's own")
    if pool is None and model.head.per_token:
        raise ValueError(
            f"head {model.config['head']['name']!r} predicts every token and pools nothing: choose a pool ({', '.join(POOLS)}), or ask for each token's features"
        )


def features(model: Model, pieces: Iterable[Tensor], segment: int = PIECE) -> tuple[Tensor, Layout | None]:
    """Features of one document, and their layout.

    Args:
        model: the model; left in the mode it was in.
        pieces: raw tensors of the modality, ``(1, ...)`` each, that follow each other along the last axis.
        segment: tokens that a streaming model reads at a time.

    Returns:
        ``(1, L', num_features)`` after the final norm.

    Raises:
        ValueError: no pieces, an empty document, or a segment below 1.
        TypeError: pieces of another dtype than the modality's.
    """
    if segment < 1:
        raise ValueError(f"segment is at least 1, got {segment}")
    read = list(pieces)
    if not read or not (raw := torch.cat(read, -1)).numel():
        raise ValueError("the document is empty")
    with evaluating(model, torch.no_grad):
        device = next(model.parameters()).device
        tokens, layout = model.encode(raw.to(device))
        length = tokens.shape[1]
        if not model.streaming or model.modality.tokens_per_sample() is not None or length <= segment:
            x, _ = model.forward_features(tokens, None, layout)
        else:
            state: State = None
            parts = []
            for start in range(0, length, segment):
                stop = min(start + segment, length)
                part, state = model.forward_features(tokens[:, start:stop], state, layout.slice(start, stop))
                parts.append(part)
            x = torch.cat(parts, 1)
        return x, model.backbone.layout_out(layout, length)


def embed(model: Model, pieces: Iterable[Tensor], pool: str | None = None, segment: int = PIECE) -> Tensor:
    """One vector of one document ``(D,)``.

    Args:
        model, pieces, segment: see :func:`features`.
        pool: ``mean``, ``last`` or ``max`` over the features; ``None``: as the head does.

    Raises:
        ValueError: the head pools nothing and ``pool`` is not given; and see :func:`features`.
    """
    check_pool(model, pool)
    x, layout = features(model, pieces, segment)
    with evaluating(model, torch.no_grad):
        if pool is None:
            return model.forward_head(x, layout, pre_logits=True)[0]
        pooled: Tensor = create_pool(pool, x.shape[-1])(x, layout)[0]
        return pooled


def embed_tokens(model: Model, pieces: Iterable[Tensor], segment: int = PIECE) -> Tensor:
    """A vector of each token of one document: ``(L', D)``, or ``(*grid, D)`` in raster order where the tokens are a grid.

    Args:
        model, pieces, segment: see :func:`features`.
    """
    x, layout = features(model, pieces, segment)
    return x[0] if layout is None or layout.grid is None else on_grid(x, layout)[0]
