"""Feedback memory: every layer reads one merged memory of each past token, made of all layers of that token, so that the lowest layer sees what the highest one found.

Follows the Feedback Transformer, Fan et al. 2020 (arXiv 2002.09402). With ``x_t^0`` the token, layers ``l = 1 .. N``, and everything about time running from the document's first token:

    h = x_t^{l-1} + W_o^l attn(W_q^l norm(x_t^{l-1});  k_j, v_j,  t - window <= j < t)
    x_t^l = h + ffn^l(norm(h))
    m_t = sum_{l=0}^N softmax(w)_l x_t^l;      k_t, v_t = W_k norm(m_t), W_v norm(m_t)

Keys and values are made once, for all layers; positions are the authors' too, a learned vector for every distance, shared by layers and heads: ``s_tj = q_t . (k_j + p_{t-j}) / sqrt(head_dim)``.

A token needs all layers of the one before it, so tokens come one after another, in training too: ``N`` layers of ``L`` tokens are ``N L`` small steps, not ``N`` large ones. What can be done for all tokens at once (the lowest layer's queries) is; keys are gathered once every :data:`BLOCK` tokens, and not once a token, which would keep a
copy of the window for each.

Departures: the memory has a norm of its own, where the authors' code has the layers share theirs; feed-forwards are the house's SwiGLU; the first token of a document, which has no past, reads zero. The state is keys and values of the last ``window`` memories.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.feedforward import SwiGLU
from mmlong.backbone.part import register_part
from mmlong.layout import Layout, document_index
from mmlong.mixers import State
from mmlong.ops.cross_attention import from_heads, to_heads
from mmlong.ops.kv_cache import counts_after, keep, ragged
from mmlong.ops.tiled_attention import HIDDEN

BLOCK = 32
"""Tokens between two gatherings of keys."""


class FeedbackLayer(nn.Module):
    """What is a layer's own: queries, the projection of what was read, and a feed-forward.

    Args:
        dim: width D.
        heads: of the queries.
        ffn_ratio: hidden width of the feed-forward over D.
        layers: of the stack, whose residual branches start the smaller the more there are.
    """

    def __init__(self, dim: int, heads: int, ffn_ratio: float, layers: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.ffn = SwiGLU(dim, ffn_ratio)
        self.heads = heads
        with torch.no_grad():
            for weight in (self.out_proj.weight, self.ffn.w_out.weight):
                weight.mul_((2 * layers) ** -0.5)

    def queries(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, heads, L, head_dim)``, scaled."""
        q = to_heads(self.q_proj(self.norm1(x)), self.heads)
        return q * q.shape[-1] ** -0.5

    def finish(self, x: Tensor, read: Tensor | None) -> Tensor:
        """The layer's output of its input and what its queries read; ``None``: nothing."""
        if read is not None:
            x = x + self.out_proj(from_heads(read))
        return x + self.ffn(self.norm2(x))


@register_part("feedback")
class Feedback(nn.Module):
    """Layers that share one memory of the past, causal; a part without parts.

    Args:
        layers: N.
        dim: width D.
        window: memories that a token reads, the newest.
        heads: of the attention; ``None`` for about one per 64 channels.
        ffn_ratio: hidden width of the feed-forwards over D.

    Raises:
        ValueError: sizes below 1, or heads that do not divide ``dim``.
    """

    causal = streaming = True
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"places": {"weight_decay": 0.0}}

    def __init__(
        self, layers: int, dim: int, window: int = 512, heads: int | None = None, ffn_ratio: float = 8 / 3
    ) -> None:
        super().__init__()
        heads = max(1, dim // 64) if heads is None else heads
        if layers < 1 or window < 1 or heads < 1 or dim % heads:
            raise ValueError(
                f"feedback needs at least 1 layer, a window of at least 1, and heads that divide the width; got {layers}, {window}, and {heads} of {dim}"
            )
        self.window, self.heads = window, heads
        self.layers = nn.ModuleList(FeedbackLayer(dim, heads, ffn_ratio, layers) for _ in range(layers))
        self.merge = nn.Parameter(torch.zeros(layers + 1))
        self.norm = nn.LayerNorm(dim)
        self.k_proj, self.v_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        # Of distances 1 to `window`, the longest first, as keys stand in the cache.
        self.places = nn.Parameter(torch.randn(window, dim // heads))

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        (B, L, D), W = x.shape, self.window
        layout = layout if ragged(layout) else None
        if state is None:
            k = v = x.new_zeros(B, self.heads, 0, D // self.heads)
        else:
            k, v = state["k"], state["v"]
        S = k.shape[2]
        counts = None if state is None else state.get("count")
        if counts is None and layout is not None:
            counts = torch.full((B,), S, dtype=torch.long, device=x.device)
        # How many memories of its own document each token has before it, where rows differ.
        known = None if counts is None else document_index(counts, L, layout)
        asked = self.layers[0].queries(x)  # type: ignore[operator]
        outputs, keys, values = [], [k], [v]
        for i in range(0, L, BLOCK):
            j = min(i + BLOCK, L)
            part = None if known is None else known[:, i:j]
            y, own_k, own_v = self._block(x[:, i:j], asked[:, :, i:j], k, v, part)
            outputs.append(y)
            keys.append(own_k)
            values.append(own_v)
            if j < L:
                k, v = (torch.cat(t, 2)[:, :, -W:] for t in ((k, own_k), (v, own_v)))
        k, v = torch.cat(keys, 2), torch.cat(values, 2)
        slots = min(W, S + L)
        if counts is None:
            return torch.cat(outputs, 1), {name: keep(t, slots, None, L, None) for name, t in (("k", k), ("v", v))}
        after = counts_after(layout, L, counts).clamp_max(W)
        kept = {name: keep(t, slots, layout, L, after) for name, t in (("k", k), ("v", v))}
        return torch.cat(outputs, 1), {**kept, "count": after}

    def _block(
        self, x: Tensor, asked: Tensor, k: Tensor, v: Tensor, known: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Some tokens, one after another.

        Args:
            x: ``(B, n, D)``.
            asked: the lowest layer's queries ``(B, H, n, head_dim)``.
            k, v: ``(B, H, S, head_dim)``, of the memories before them.
            known: int64 ``(B, n)``, how many of the memories before it a token may see; ``None``: all.

        Returns:
            outputs, and keys and values of the tokens' own memories.
        """
        weights = self.merge.softmax(0).to(x.dtype)
        outputs: list[Tensor] = []
        own: tuple[list[Tensor], list[Tensor]] = ([], [])
        for n, (h, q) in enumerate(zip(x.split(1, 1), asked.split(1, 2), strict=True)):
            merged = weights[0] * h
            mine = None if n == 0 else tuple(torch.cat(t, 2) for t in own)
            seen = None if known is None else known[:, n]
            for number, layer in enumerate(self.layers):
                queries = q if number == 0 else layer.queries(h)  # type: ignore[operator]
                h = layer.finish(h, self._read(queries, k, v, mine, seen))  # type: ignore[operator]
                merged = merged + weights[number + 1] * h
            memory = self.norm(merged)
            for list_, proj in zip(own, (self.k_proj, self.v_proj), strict=True):
                list_.append(to_heads(proj(memory), self.heads))
            outputs.append(h)
        return torch.cat(outputs, 1), torch.cat(own[0], 2), torch.cat(own[1], 2)

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, own: tuple[Tensor, ...] | None, seen: Tensor | None
    ) -> Tensor | None:
        """What queries ``(B, H, 1, head_dim)`` read of the memories of earlier blocks and of this one; ``None`` where there are none."""
        n = 0 if own is None else own[0].shape[2]
        total = min(self.window, k.shape[2] + n)
        if not total:
            return None
        # Memories that are out of the window by now, of earlier blocks and of this one.
        gone, late = k.shape[2] - max(0, total - n), max(0, n - total)
        # Scores are cut, and not keys, whose gradients would each be as long as all of them.
        scores = [(q @ k.transpose(-1, -2))[..., gone:]]
        if own is not None:
            scores.append((q @ own[0].transpose(-1, -2))[..., late:])
        s = torch.cat(scores, -1) + q @ self.places[self.window - total :].to(q.dtype).T
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        if seen is None:
            weights = s.softmax(-1)
        else:
            far = torch.arange(total, 0, -1, device=q.device) > seen[:, None]
            weights = s.masked_fill(far[:, None, None], HIDDEN).softmax(-1)
            # A document's first token sees nothing, whatever stands before it.
            weights = torch.where((seen > 0)[:, None, None, None], weights, 0)
        earlier, here = weights.to(v.dtype).split([k.shape[2] - gone, n - late], -1)
        read = F.pad(earlier, (gone, 0)) @ v
        return read if own is None else read + F.pad(here, (late, 0)) @ own[1]
