"""Causal attention to the last members of a query's group, where every token says which group it joins.

    y_i = softmax over j of scale q_i . k_j,   j <= i of the group of i, and fewer than w (or, without itself, at most w) members from i back

the union over rounds where tokens have a group in each of several. It is the causal form of a selection by hash or by centroid: which keys a query sees is decided by tokens up to its own alone, since only members are
counted, from the query back. (Chunks of a sorted sequence, as the papers have them, begin where the number of *all* tokens in earlier groups says, later ones included.) So it runs in pieces too: a query needs, of the past,
the last w members of each group.

Whole sequences and long pieces are sorted by group and go through :mod:`mmlong.ops.selection`; a few queries are held against all keys at once, since to read the cache is the greater part of the work anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.selection import FAR, member_codes, order_by, selected_attention
from mmlong.ops.tiled_attention import HIDDEN

FEW = 8
"""Queries that are held against all keys."""


def members_seen(groups: Tensor, queries: int, reach: int, with_self: bool) -> Tensor:
    """Bool ``(.., queries, S)`` for the last queries of ``groups (.., S)``: which keys they see; quadratic, for few queries and tests."""
    S = groups.shape[-1]
    place = torch.arange(S, device=groups.device)
    own = place[S - queries :, None]
    seen = groups[..., None, :] == groups[..., S - queries :, None]
    seen = seen & ((place <= own) if with_self else (place < own))
    # How many members from the query back, this one included.
    rank = seen.flip(-1).cumsum(-1).flip(-1)
    return seen & (rank <= reach)


def member_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, count: int, reach: int, *, scale: float, with_self: bool
) -> tuple[Tensor, Tensor]:
    """Attention to the last members of a query's groups.

    Args:
        q: ``(B, H, T, D)``; the last query is of the last key.
        k: ``(B, H, S, D)``.
        v: ``(B, H, S, E)``.
        groups: int64 ``(R, B, H, S)``, the group that a key's token joins in each round, less than ``count``.
        count: groups there are.
        reach: w, members that are seen.
        scale: of the scores.
        with_self: the query's own key is one of them; otherwise it is not seen.

    Returns:
        ``y (B, H, T, E)`` and ``log_sums (B, H, T)``; a query without a key has any finite ``y`` and a log sum below ``HIDDEN / 2``.

    Raises:
        ValueError: more tokens and groups than can be told apart.
    """
    T, S = q.shape[2], k.shape[2]
    if T <= FEW:
        seen = members_seen(groups, T, reach, with_self).any(0)
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = (scale * q.to(dtype) @ k.to(dtype).mT).masked_fill(~seen, HIDDEN)
            y = scores.softmax(-1) @ v.to(dtype)
        return y.to(v.dtype), scores.detach().logsumexp(-1)
    if (most := S + (reach + 1) * count) >= FAR // 4:
        raise ValueError(
            f"member_attention: {S} tokens, {count} groups and a reach of {reach} make codes up to {most}: {FAR // 4} is the end"
        )
    past = S - T
    if past > count * reach:
        tokens = recent(groups[..., :past], count, reach)
        new = torch.arange(past, S, device=q.device).expand(*groups.shape[:3], T)
        tokens = torch.cat([tokens, new], -1)
        orders = tokens.gather(-1, order_by(groups.gather(-1, tokens)))
    else:
        orders = order_by(groups)
    codes = member_codes(groups, orders, reach)
    queries = F.pad(q, (0, 0, past, 0)) if past else q
    met = (0, reach - 1) if with_self else (1, reach)
    y, log_sums = selected_attention(queries, k, v, orders, codes, reach, met, scale=scale)
    return y[:, :, past:], log_sums[:, :, past:]


def recent(groups: Tensor, count: int, reach: int) -> Tensor:
    """Of tokens with ``groups (.., P)``, ``P > count * reach``: the last ``reach`` members of each group, and as many others as make it ``count * reach``, ascending."""
    order = order_by(groups)
    key = groups.gather(-1, order)
    later = F.pad(key[..., reach:], (0, reach), value=-1)
    followed = (key == later).to(torch.uint8)
    kept = order.gather(-1, order_by(followed)[..., : count * reach])
    return kept.sort(-1).values
