"""Synthesizers: attention weights that no pair of tokens is compared for.

Follow Tay et al. 2020 (arXiv 2005.00743). For every head, with ``G`` the projection of values and ``n`` the longest document,

    y = softmax(B) G(x)

| mixer | row i of B |
|---|---|
| dense | ``W_2 relu(W_1 x_i + b_1) + b_2`` in R^n |
| dense, factorised | ``a_i[j // b] b_i[j mod b]``, ``a_i`` in R^a and ``b_i`` in R^b each made as above, ``a b = n`` |
| random | row i of a matrix R in R^{n x n}, learned or frozen |
| random, factorised | ``R_1[i] . R_2[j]``, R_1 and R_2 in R^{n x k} |

A shorter document uses the first columns. Causal, later columns are masked. Since ``W_2`` is a row for every position, dense weights are those of softmax attention with ``W_2`` for keys, and factorised random ones those with ``R_1``
for queries and ``R_2`` for keys: they run by the house's attention. The state is the values so far, since a row of B needs its token and position only.

Random matrices are factorised by default (k = 8, the paper's): a whole R has ``n^2`` numbers a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.attention import attention
from mmlong.ops.cross_attention import from_heads, to_heads
from mmlong.ops.given_scores import attention_of_scores
from mmlong.ops.visible import Visible


class _Synthesizer(DocumentMixer):
    """Values, their state, and the output; subclasses define :meth:`weighed`."""

    def __init__(
        self, dim: int, name: str, causal: bool, heads: int | None, head_dim: int | None, max_length: int
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes(name, dim, heads, None, head_dim)
        if max_length < 1:
            raise ValueError(f"{name}: max_length must be at least 1, got {max_length}")
        self.name, self.max_length = name, max_length
        inner = self.heads * self.head_dim
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def slots(self, seen: int) -> dict[str, int]:
        return {"v": seen}

    def state_bytes(self, length: int) -> int:
        return 4 * self.heads * self.head_dim * length if self.streaming else 0

    def weighed(self, x: Tensor, v: Tensor, past: int) -> Tensor:
        """The values ``(N, heads, S, head_dim)`` by the weights of tokens ``x (N, T, D)``, the last T of S: ``(N, heads, T, head_dim)``."""
        raise TypeError(f"{type(self).__name__} does not define weighed(x, v, past)")

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        if past + x.shape[1] > self.max_length:
            raise ValueError(
                f"{self.name}: a document of {past + x.shape[1]:,} tokens, but its weights are made for max_length={self.max_length:,}: "
                "build it with a larger max_length, or cut the document"
            )
        v = to_heads(self.v_proj(x), self.heads)
        if state is not None:
            v = torch.cat([state["v"].to(v.dtype), v], 2)
        y = self.out_proj(from_heads(self.weighed(x, v, past)))
        return y, {"v": v} if self.causal else None

    def _by_products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores ``q_i . k_j`` of ``q (N, heads, T, r)`` and ``k (heads, S, r)``."""
        d = v.shape[-1]
        width = max(q.shape[-1], d)
        # Keys as wide as values: only then do torch's own kernels keep no scores.
        q, k, v = (F.pad(t.to(v.dtype), (0, width - t.shape[-1])) for t in (q * width**0.5, k, v))
        k = k.expand(v.shape[0], -1, -1, -1)
        return attention(q, k, v, Visible(right=0 if self.causal else None))[..., :d]


@register_mixer(
    "synthesizer_dense",
    paper="Tay et al. 2020, arXiv 2005.00743",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="documents up to max_length; proved against the formula in float64",
    survey=(("Synthesizer", ""),),
)
class SynthesizerDense(_Synthesizer):
    """Each token makes the weights of all positions by itself.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head's values; ``None`` for ``dim / heads``.
        hidden: units of a head between ``W_1`` and ``W_2``; ``None`` for ``head_dim``.
        max_length: tokens n of the longest document.
        factors: ``(a, b)`` with ``a b = max_length`` for the factorised form; ``None`` for the plain one.

    Raises:
        ValueError: sizes that do not divide, or are not at least 1; in a call, a document longer than ``max_length``.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        head_dim: int | None = None,
        hidden: int | None = None,
        max_length: int = 4096,
        factors: tuple[int, int] | list[int] | None = None,
    ) -> None:
        super().__init__(dim, "synthesizer_dense", causal, heads, head_dim, max_length)
        if hidden is not None and hidden < 1:
            raise ValueError(f"synthesizer_dense: hidden must be at least 1, got {hidden}")
        self.hidden = self.head_dim if hidden is None else hidden
        self.factors = None if factors is None else tuple(factors)
        sizes = (max_length,) if self.factors is None else self.factors
        if self.factors is not None and (
            len(self.factors) != 2 or min(self.factors) < 1 or self.factors[0] * self.factors[1] != max_length
        ):
            raise ValueError(
                f"synthesizer_dense: factors must be two numbers whose product is max_length={max_length}, got {self.factors}"
            )
        self.in_proj = nn.Linear(dim, len(sizes) * self.heads * self.hidden)
        bound = self.hidden**-0.5
        self.tables = nn.ParameterList(torch.empty(self.heads, n, self.hidden).uniform_(-bound, bound) for n in sizes)
        self.biases = nn.ParameterList(torch.empty(self.heads, n).uniform_(-bound, bound) for n in sizes)

    def weighed(self, x: Tensor, v: Tensor, past: int) -> Tensor:
        units = F.relu(self.in_proj(x)).unflatten(-1, (len(self.tables), self.heads, self.hidden))
        if self.factors is None:
            q = units[:, :, 0].transpose(1, 2)
            # The bias is one more product, with 1.
            k = torch.cat([self.tables[0], self.biases[0][..., None]], -1)[:, : v.shape[2]]
            return self._by_products(F.pad(q, (0, 1), value=1.0), k, v)
        made = units.permute(2, 0, 3, 1, 4)  # (2, N, heads, T, hidden)
        dtype = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            rows = [
                made[i].to(dtype) @ self.tables[i].to(dtype).mT + self.biases[i].to(dtype)[:, None] for i in range(2)
            ]
        return attention_of_scores(_outer, rows, v, past, self.causal)


def _outer(a: Tensor, b: Tensor, stop: int) -> Tensor:
    """``a[j // len(b)] b[j mod len(b)]`` of the first ``stop`` places."""
    columns = -(-stop // b.shape[-1])
    return (a[..., :columns, None] * b[..., None, :]).flatten(-2)[..., :stop]


@register_mixer(
    "synthesizer_random",
    paper="Tay et al. 2020, arXiv 2005.00743",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="factorised unless rank=None; documents up to max_length; proved against the formula in float64",
    survey=(("Synthesizer", ""),),
)
class SynthesizerRandom(_Synthesizer):
    """The same weights for whatever tokens there are, learned or left as drawn.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head's values; ``None`` for ``dim / heads``.
        max_length: rows and columns n of R.
        rank: k of the factors; ``None`` for a whole R of ``heads n^2`` numbers.
        learned: R is a parameter, or a buffer that stays as it was drawn.

    Attributes:
        R: ``(heads, n, n)``, where ``rank`` is ``None``; else ``R1, R2 (heads, n, k)``. Drawn so that scores are standard normal.

    Raises:
        ValueError: sizes that do not divide, or are not at least 1; in a call, a document longer than ``max_length``.
    """

    R: Tensor
    R1: Tensor
    R2: Tensor

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        head_dim: int | None = None,
        max_length: int = 4096,
        rank: int | None = 8,
        learned: bool = True,
    ) -> None:
        super().__init__(dim, "synthesizer_random", causal, heads, head_dim, max_length)
        if rank is not None and rank < 1:
            raise ValueError(f"synthesizer_random: rank must be at least 1, got {rank}")
        self.rank = rank
        for name in ("R",) if rank is None else ("R1", "R2"):
            t = torch.randn(self.heads, max_length, rank or max_length)
            t = t if rank is None else t * rank**-0.25
            if learned:
                self.register_parameter(name, nn.Parameter(t))
            else:
                self.register_buffer(name, t)

    def weighed(self, x: Tensor, v: Tensor, past: int) -> Tensor:
        T, S = x.shape[1], v.shape[2]
        if self.rank is not None:
            q = self.R1[:, past : past + T].expand(x.shape[0], -1, -1, -1)
            return self._by_products(q, self.R2[:, :S], v)
        rows = self.R[:, past : past + T]
        return attention_of_scores(
            _as_given, [rows.to(torch.promote_types(v.dtype, torch.float32))], v, past, self.causal
        )


def _as_given(rows: Tensor, stop: int) -> Tensor:
    return rows[None, :, :, :stop]
