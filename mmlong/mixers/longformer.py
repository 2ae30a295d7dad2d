"""Longformer: a sliding window, dilated on some heads, and a few tokens that see all and are seen by all.

Follows Beltagy et al. 2020 (arXiv 2004.05150). Of ``window`` 1 and one global token, who sees whom, two-sided and causal (dilation 1, then 2)::

    # # # # # #     # . . . . .     # . . . . .
    # # # . . .     # # . . . .     . # . . . .
    # # # # . .     . # # . . .     # . # . . .
    # . # # # .     . . # # . .     . # . # . .
    # . . # # #     . . . # # .     . . # . # .
    # . . . # #     . . . . # #     . . . # . #

- **window**: a token sees ``window`` keys to each side of its own (causal: before it), ``dilation`` apart. Dilation is one number, or one for each head, as the paper has it on two heads of its upper layers.
- **global tokens**, two-sided only: the first ``globals`` of a document, as for classification. All tokens see them, beside their window, by the same projections. They themselves see every token, by a second set of
  projections of queries, keys and values, as in the authors' code.
- **causal**, the paper's language model has dilation and no global tokens; so has this.

With ``h`` the head's slices of the second projections, a global query's scores are ``(W_q x_i) . (W_k x_j) = (W_k^T W_q x_i) . x_j``, and its result ``W_v sum_j p_ij x_j``: the tokens themselves serve as keys and values,
and no second keys and values of a long sequence are made. (A bias of those keys would add the same to all scores of a query, so there is none.)

Departures: positions are rotary, in the window; the second projections go without, since they are to look at any distance. ``rope=False`` is the code's form, which has them in the tokens. The causal state is the keys and
values of the last ``window * dilation`` tokens, of the largest dilation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.few_keys import with_few_keys
from mmlong.ops.strided_attention import strided_attention, strided_part


@register_mixer(
    "longformer",
    paper="Beltagy et al. 2020, arXiv 2004.05150",
    bidirectional=True,
    state="constant",
    cost="n",
    note="RoPE in the window (rope=False: none); proved against transformers' LongformerSelfAttention, weights copied, with and without global tokens; dilation against the formula in float64",
    survey=(("Longformer", ""),),
)
class Longformer(DocumentAttention):
    """Dilated sliding windows with global tokens.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        window: keys seen to each side of a token's own (the authors' ``attention_window`` counts both).
        dilation: positions from one key to the next, for all heads or one for each.
        globals: how many tokens at the beginning of a document are global; ``None``: 1 two-sided, 0 causal.
        heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not fit, or global tokens of a causal mixer.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        window: int = 256,
        dilation: int | Sequence[int] = 1,
        globals: int | None = None,
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        if window < 1:
            raise ValueError(f"Longformer: window must be at least 1, got {window}")
        self.dilation = [dilation] * self.heads if isinstance(dilation, int) else list(dilation)
        if len(self.dilation) != self.heads or min(self.dilation) < 1:
            raise ValueError(
                f"Longformer: dilation must be at least 1, one number or one for each of the {self.heads} heads, got {dilation}"
            )
        self.globals = int(not causal) if globals is None else globals
        if self.globals < 0:
            raise ValueError(f"Longformer: globals must be at least 0, got {globals}")
        if causal and self.globals:
            raise ValueError(
                f"Longformer: a causal one has no global tokens, got globals={globals}: set 0, or causal=False"
            )
        self.window = window
        self.reach = window * max(self.dilation)
        if self.globals:
            inner = self.heads * self.head_dim
            self.q_global = nn.Linear(dim, inner, bias=bias)
            self.k_global = nn.Linear(dim, inner, bias=False)
            self.v_global = nn.Linear(dim, inner, bias=bias)

    def slots(self, seen: int) -> dict[str, int]:
        return {"k": min(seen, self.reach), "v": min(seen, self.reach)}

    def state_bytes(self, length: int) -> int:
        return self.kept_bytes(min(length, self.reach)) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project(x, past)
        begin = past
        if state is not None:
            begin -= state["k"].shape[2]
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        y = self._window(q, k, v, begin)
        if self.globals:
            y = torch.cat([self._of_globals(x), y.to(x.dtype).transpose(1, 2)], 1).transpose(1, 2)
        if not self.causal:
            return self.leave(y), None
        slots = min(past + x.shape[1], self.reach)
        return self.leave(y), {"k": k[:, :, -slots:].clone(), "v": v[:, :, -slots:].clone()}

    def _window(self, q: Tensor, k: Tensor, v: Tensor, begin: int) -> Tensor:
        """``(N, H, T - g, head_dim)``, what all but the global tokens see."""
        g = min(self.globals, q.shape[2])
        q = q[:, :, g:]
        if not q.shape[2]:
            return q
        right = 0 if self.causal else self.window
        results: list[Tensor] = []
        log_sums: list[Tensor] = []
        h = 0
        for dilation, run in itertools.groupby(self.dilation):
            some = slice(h, h + len(list(run)))
            h = some.stop
            heads = (t[:, some] for t in (q, k, v))
            if g:
                y, logs = strided_part(*heads, stride=dilation, left=self.window, right=right, begin=begin, start=g)
                log_sums.append(logs)
            else:
                y = strided_attention(*heads, stride=dilation, left=self.window, right=right, begin=begin)
            results.append(y)
        y = results[0] if len(results) == 1 else torch.cat(results, 1)
        if g:
            part = y, torch.cat(log_sums, 1)
            y, _ = with_few_keys(part, q, k[:, :, :g], v[:, :, :g], self.head_dim**-0.5)
        return y

    def _of_globals(self, x: Tensor) -> Tensor:
        """``(N, g, H, head_dim)``, what the global tokens see."""
        N, T, D = x.shape
        g, H = min(self.globals, T), self.heads
        q = self.q_global(x[:, :g]).unflatten(-1, (H, -1))
        into, out = (p.weight.unflatten(0, (H, -1)) for p in (self.k_global, self.v_global))
        folded = torch.einsum("nghd,hdc->nhgc", q, into).reshape(N, 1, H * g, D)
        keys = x[:, None].to(folded.dtype)
        mean = F.scaled_dot_product_attention(folded, keys, keys, scale=self.head_dim**-0.5)
        y = torch.einsum("nhgc,hdc->nghd", mean.view(N, H, g, D), out)
        return y if self.v_global.bias is None else y + self.v_global.bias.unflatten(0, (H, -1))
