"""ETC: a long sequence in a sliding window, and global tokens beside it that read all of it and that all of it reads.

Follows Ainslie et al. 2020 (arXiv 2004.08483). There are ``globals`` tokens ``g`` and the sequence ``x``, and four pieces of attention. Who sees whom, of two global tokens and a window of 1::

              g    x
    g    # # | # # # # #      global to global, global to long: all
         # # | # # # # #
    x    # # | # # . . .      long to global: all
         # # | # # # . .      long to long: |i - j| <= window
         # # | . # # # .
         # # | . . # # #
         # # | . . . # #

A query's two pieces are one softmax. Positions are labels of pairs, each a learned vector of a head that is added to the key (as Shaw et al. 2018, arXiv 1803.02155, have it):

    s_ij = q_i . (k_j + a_label(i, j)) / sqrt(head_dim)

Long to long, and global to global, the label is the distance ``j - i``, clipped to ``max_distance``: ``2 max_distance + 1`` labels each. Global to long and long to global have one label each, as for input without a structure. Nothing else knows a position. Global and
long tokens have projections of their own; the keys and values of a token are the same for all who read it (the code's ``share_kv_projections``).

**The global tokens are this mixer's own**: learned vectors, the same for every sequence, since a layer hands on the sequence alone. In the paper they come from the layer before and go to the next, and both directions of reading are one step. Here they must read first
and be read after:

    g' = norm(g + W_o y_g),     y_g from g and x;       y_x from g' and x

so what they gather is of this layer. Where distances are clipped, the label adds the same to a whole range of keys: those are intervals (:mod:`mmlong.ops.strided_attention`) with a number added to their log sums, and only the near keys are met one by one
(:mod:`mmlong.ops.labelled_attention`).

There is no causal form: global tokens read to the end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.block_attention import merge_parts
from mmlong.ops.few_keys import with_few_keys
from mmlong.ops.interval_attention import interval_part
from mmlong.ops.labelled_attention import labelled_part
from mmlong.ops.strided_attention import strided_part

INIT_STD = 0.02
"""Of global tokens and labels."""


@register_mixer(
    "etc",
    paper="Ainslie et al. 2020, arXiv 2004.08483",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="global tokens are learned vectors of this layer, which read first and are read after; proved against the formula in float64 under an explicit mask, and its window against xformers' LocalAttentionFromBottomRightMask",
    survey=(("ETC", ""),),
)
class ETC(DocumentMixer):
    """Sliding window with global tokens of its own and labels of relative position.

    Args:
        dim: width D.
        causal: must be ``False``.
        window: keys seen to each side of a token's own.
        globals: global tokens.
        max_distance: distances beyond it share a label.
        heads, head_dim: as :class:`~mmlong.mixers.attention.SoftmaxAttention`.
        bias: of the projections.

    Raises:
        ValueError: sizes that do not fit, or a causal one.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        window: int = 84,
        globals: int = 32,
        max_distance: int = 12,
        heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("ETC", dim, heads, None, head_dim)
        for name, n in (("window", window), ("globals", globals), ("max_distance", max_distance)):
            if n < 1:
                raise ValueError(f"ETC: {name} must be at least 1, got {n}")
        self.window, self.globals, self.max_distance = window, globals, max_distance
        inner = self.heads * self.head_dim
        self.global_tokens = nn.Parameter(INIT_STD * torch.randn(globals, dim))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.q_global, self.k_global, self.v_global = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.out_global = nn.Linear(inner, dim, bias=bias)
        self.norm = nn.LayerNorm(dim)
        labels = 2 * max_distance + 1
        self.long_labels = nn.Parameter(INIT_STD * torch.randn(self.heads, labels, self.head_dim))
        self.global_labels = nn.Parameter(INIT_STD * torch.randn(self.heads, labels, self.head_dim))
        self.global_to_long = nn.Parameter(INIT_STD * torch.randn(self.heads, self.head_dim))
        self.long_to_global = nn.Parameter(INIT_STD * torch.randn(self.heads, self.head_dim))

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        tokens = self._read(k, v)
        keys, values = self._heads(self.k_global(tokens)), self._heads(self.v_global(tokens))
        extra = self._label(q, self.long_to_global)[..., None]
        y, _ = with_few_keys(self._window(q, k, v), q, keys, values, self.head_dim**-0.5, extra)
        return self.out_proj(self._tokens(y)), None

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _tokens(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2).to(self.out_proj.weight.dtype)

    def _label(self, q: Tensor, label: Tensor) -> Tensor:
        """``(N, H, T)``: what one label ``(H, head_dim)`` adds to the scores of each query."""
        added = torch.einsum("nhtd,hd->nht", q, label) * self.head_dim**-0.5
        return added.to(torch.promote_types(added.dtype, torch.float32))

    def _read(self, k: Tensor, v: Tensor) -> Tensor:
        """The global tokens ``(N, g, D)`` after they have read keys and values ``(N, H, T, head_dim)`` and one another."""
        (N, _, T, _), g, scale = k.shape, self.globals, self.head_dim**-0.5
        q, keys, values = (
            self._heads(proj(self.global_tokens[None])).expand(N, -1, -1, -1)
            for proj in (self.q_global, self.k_global, self.v_global)
        )
        y, log_sums = interval_part(q, k, v, np.zeros((1, g), np.int64), np.full((1, g), T), scale)
        part = y, log_sums + self._label(q, self.global_to_long)
        place = torch.arange(g, device=k.device)
        label = (place - place[:, None]).clamp(-self.max_distance, self.max_distance) + self.max_distance
        by_label = q @ self.global_labels.to(q.dtype).transpose(1, 2)
        extra = scale * by_label.gather(3, label.expand(N, self.heads, g, g))
        y, _ = with_few_keys(part, q, keys, values, scale, extra)
        read: Tensor = self.norm(self.global_tokens + self.out_global(self._tokens(y)))
        return read

    def _window(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Long to long, and its log sums."""
        far, w = self.max_distance, self.window
        # Distances that no other shares a label with.
        near = min(w, far - 1)
        labels = self.long_labels[:, far - near : far + near + 1]
        parts = [labelled_part(q, k, v, labels, self.head_dim**-0.5)]
        if w >= far:
            for left, right, label in ((w, -far, 0), (-far, w, -1)):
                y, log_sums = strided_part(q, k, v, left=left, right=right)
                parts.append((y, log_sums + self._label(q, self.long_labels[:, label])))
        return merge_parts(parts)
