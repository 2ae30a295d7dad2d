"""Sparse Sinkhorn attention: blocks of keys are sorted, softly, to the blocks of queries that want them.

Tay, Bahri, Yang, Metzler & Juan 2020, "Sparse Sinkhorn Attention" (arXiv 2002.11296). For every head, in blocks of ``b`` tokens, with ``K_j``, ``V_j`` the keys and values of block j:

    R_ij = mean(q of block i) . mean(k of block j) / sqrt(d)
    S    = balanced((R + noise) / temperature)                     rows and columns sum to 1 (:mod:`mmlong.ops.sinkhorn`)
    K'_i = sum_j S_ij K_j;   V'_i = sum_j S_ij V_j                  the block sorted to i
    y    = softmax(q [K'_i, K_i]^T / sqrt(d)) [V'_i, V_i]           for the queries of block i

The noise is Gumbel's, in training only.

**Causal**: block i has the blocks before it alone; its query is the mean of everything up to its first token, so that its row is known there; columns are balanced over the rows so far; and its own keys are masked. (The paper masks
the scores and balances columns over all rows, later ones included, which leaks.) The first block has only itself.

**The sorting network** of the paper has an output for each block, hence a fixed number of them; here scores are products of means, as in sinkhorn-transformer, and any length goes. What the end of the sequence leaves of the last
block stands for zeros in it when it is sorted elsewhere.

The soft sort is a product of an ``n / b`` square matrix with all keys: ``n^2 d / b``, and ``n sqrt(n)`` where blocks are about ``sqrt(n)``. The state is all keys and values, the columns' sums and the block
sorted to the one that is open.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.attention import attention
from mmlong.ops.sinkhorn import balanced, balanced_causal
from mmlong.ops.visible import Visible


@register_mixer(
    "sinkhorn",
    paper="Tay et al. 2020, arXiv 2002.11296",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="two-sided proved against sinkhorn-transformer's balancing and SinkhornAttention, weights copied; scores of blocks are products of means, as theirs are, where the paper has a network of a fixed number of blocks; causal, columns "
    "are balanced over the rows so far, since the paper's leak; cost n^2 / block, n sqrt n with blocks of sqrt n, as two-sided by default",
    survey=(("Sinkhorn Transformer", ""),),
)
class Sinkhorn(DocumentMixer):
    """Sparse Sinkhorn attention.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        block: tokens of a block; ``None``: two-sided about the root of the length, causal 128.
        iterations: of balancing.
        temperature: of the scores between blocks.
        noise: add Gumbel noise to these scores in training.

    Raises:
        ValueError: sizes that do not divide or make no sense.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        head_dim: int | None = None,
        block: int | None = None,
        iterations: int = 7,
        temperature: float = 0.75,
        noise: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("Sinkhorn", dim, heads, None, head_dim)
        for option, n in (("block", block), ("iterations", iterations)):
            if n is not None and n < 1:
                raise ValueError(f"Sinkhorn: {option} must be at least 1, got {n}")
        if not temperature > 0:
            raise ValueError(f"Sinkhorn: temperature must be above 0, got {temperature}")
        self.block = block or (128 if causal else None)
        self.iterations, self.temperature, self.noise = iterations, temperature, noise
        inner = self.heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def slots(self, seen: int) -> dict[str, int]:
        assert self.block is not None
        return {"k": seen, "v": seen, "columns": max(0, seen - 1) // self.block}

    def state_bytes(self, length: int) -> int:
        if not self.streaming or self.block is None:
            return 0
        d, rows = self.head_dim, self.slots(length)["columns"]
        return 4 * self.heads * (2 * length * d + rows * self.iterations + d + 2 * self.block * d)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y, after = self.behind(q, k, v, state, past) if self.causal else (self.around(q, k, v), None)
        return self.out_proj(y.to(x.dtype).transpose(1, 2).flatten(2)), after

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``(B, H, n, N)`` of means of queries and of keys, over the temperature, with noise in training."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = self.head_dim**-0.5 * q.to(dtype) @ k.to(dtype).mT
            if self.noise and self.training:
                scores = scores - torch.empty_like(scores).exponential_().clamp_min(1e-30).log()
            return scores / self.temperature

    def around(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The two-sided form."""
        L = q.shape[2]
        b = min(L, self.block or max(1, round(math.sqrt(L))))
        short = -L % b
        blocks = [F.pad(t, (0, 0, 0, short)).unflatten(2, (-1, b)) for t in (q, k, v)]
        n = blocks[0].shape[2]
        size = torch.full((n, 1), b, device=q.device)
        size[-1] = b - short
        weights = balanced(self.scores(*(t.sum(3) / size for t in blocks[:2])), self.iterations)
        queries, keys, values = blocks[0], *(torch.cat([_sorted(weights, t), t], 3) for t in blocks[1:])
        full = n - (short > 0)
        parts = []
        if full:
            parts.append(_attend(queries[:, :, :full], keys[:, :, :full], values[:, :, :full], Visible()))
        if short:
            own = b - short
            queries, keys, values = (
                queries[:, :, full:, :own],
                keys[:, :, full:, : b + own],
                values[:, :, full:, : b + own],
            )
            parts.append(_attend(queries, keys, values, Visible()))
        return torch.cat(parts, 2)

    def behind(self, q: Tensor, k: Tensor, v: Tensor, state: Parts | None, past: int) -> tuple[Tensor, Parts]:
        """The causal form."""
        (B, H, T, d), b = q.shape, self.block
        assert b is not None
        dtype = torch.promote_types(q.dtype, torch.float32)  # of sums over all tokens
        if state is None:
            columns, total = (q.new_zeros(B, H, *shape, dtype=dtype) for shape in ((0, self.iterations), (1, d)))
            sorted_k = sorted_v = q.new_zeros(B, H, b, d)
        else:
            columns, total, sorted_k, sorted_v = (state[key] for key in ("columns", "total", "sorted_k", "sorted_v"))
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        seen = past + T
        first, last = past // b, (seen - 1) // b
        into = past - first * b  # tokens of the open block that came earlier
        # Blocks from the open one on, with room where tokens are of other pieces; one that is alone has none after it.
        size = b if last > first else into + T
        room = -(into + T) % size
        queries = F.pad(q, (0, 0, into, room)).unflatten(2, (-1, size))
        own_k, own_v = (F.pad(t[:, :, first * b :], (0, 0, 0, room)).unflatten(2, (-1, size)) for t in (k, v))
        new = first if into == 0 else first + 1  # the first block that begins here
        mixed_k, mixed_v = sorted_k[:, :, None], sorted_v[:, :, None]
        sums = queries.sum(3, dtype=dtype)
        if new <= last:
            before = total + sums.cumsum(2) - sums
            starts = torch.arange(new, last + 1, device=q.device)[:, None] * b + 1
            means = (before[:, :, new - first :] + queries[:, :, new - first :, 0]) / starts
            whole = [t[:, :, : last * b].unflatten(2, (last, b)) for t in (k, v)]
            scores = self.scores(means, whole[0].mean(3))
            weights, columns = balanced_causal(scores, columns.to(scores.dtype), new)
            more = [_sorted(weights, t) for t in whole]
            mixed_k, mixed_v = (
                more if into == 0 else (torch.cat(pair, 2) for pair in zip((mixed_k, mixed_v), more, strict=True))
            )
        after = {
            "k": k,
            "v": v,
            "columns": columns,
            "total": total + sums.sum(2, keepdim=True),
            "sorted_k": mixed_k[:, :, -1].clone(),
            "sorted_v": mixed_v[:, :, -1].clone(),
        }
        parts = []
        if first == 0:
            parts.append(_attend(queries[:, :, :1], own_k[:, :, :1], own_v[:, :, :1], Visible(None, 0)))
        rest = slice(1 if first == 0 else 0, None)
        if first or last:
            keys, values = (torch.cat([m, own], 3)[:, :, rest] for m, own in ((mixed_k, own_k), (mixed_v, own_v)))
            parts.append(_attend(queries[:, :, rest], keys, values, Visible(None, 0)))
        return torch.cat(parts, 2)[:, :, into : into + T], after


def _sorted(weights: Tensor, blocks: Tensor) -> Tensor:
    """``sum_j weights_ij blocks_j`` of ``(B, H, N, b, d)``."""
    mixed: Tensor = weights.to(blocks.dtype) @ blocks.flatten(3)
    return mixed.unflatten(3, blocks.shape[3:]).to(blocks.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Of each block by itself: ``(B, H, n, b, d)`` to ``(B, H, n b, d)``."""
    B, H, n, b, d = q.shape
    q, k, v = (t.reshape(B * H * n, 1, -1, d) for t in (q, k, v))
    y = attention(q, k, v, visible)
    return y.view(B, H, n * b, d)
