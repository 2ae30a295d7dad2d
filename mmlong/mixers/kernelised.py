"""Kernelised attention: softmax's kernel replaced by one that factors, ``f(q) . h(k)``, normalised by the sum of its weights.

    y_t = sum_s (f(q_t) . h(k_s)) v_s / sum_s (f(q_t) . h(k_s))               (mmlong.ops.kernel_attention)

| mixer | features of a head's query or key ``x`` of ``d`` channels |
|---|---|
| Linear Transformer (Katharopoulos et al. 2020, arXiv 2006.16236) | ``elu(x) + 1`` |
| Performer, FAVOR+ (Choromanski et al. 2020, arXiv 2009.14794) | ``exp(w_i . x' - x'^2 / 2) / sqrt(m)``, ``x' = x / d^(1/4)``, ``w_i`` normal, orthogonal in blocks of ``d`` |
| Based (Arora et al. 2024, arXiv 2402.18668), its linear part | ``1, x', x'_i x'_j / sqrt(2)``: ``1 + s + s^2 / 2`` of ``s = q . k / sqrt(d)``, with few channels d |

Performer's exponents are shifted by their largest, which cancels in the quotient: over a query's features, and over all features of all keys that its state holds, by units that the state carries
(:mod:`mmlong.ops.log_scale`); the authors take the maximum over all keys, which a causal model may not know, and add a constant to the features.

Departures: projections have no bias. Based's window attention and convolutions are layers of their own (``local``, and a block's).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.state import State
from mmlong.mixers.weights import named_weights
from mmlong.ops.elu_features import elu_features
from mmlong.ops.kernel_attention import EPS, kernel_attention, kernel_attention_two_sided, read, written
from mmlong.ops.log_scale import NOTHING, log_scale

TWO_SIDED_TOKENS = 4096
"""Tokens whose features are there at a time where both sides are seen, on a CPU."""


class _Kernelised(CellMixer):
    """Projections to heads, features, and the quotient; subclasses define :meth:`features` and say how many there are."""

    has_sizes = False
    eps = EPS

    def __init__(
        self, dim: int, name: str, keys: int, heads: int | None, causal: bool, features: int, chunk: int | None
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.n_features, self.chunk = heads_of(name, heads, round(dim / 64), channels=dim), features, chunk
        self.P = dim // self.heads
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = 2 * keys + 2 * dim + 2 * self.heads * features

    def features(self, t: Tensor, key: bool) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, L, H, F)`` of queries or keys ``(B, L, H, d)``; of keys also the log of their size ``(B, L, H)``, if they are told apart."""
        raise TypeError(f"{type(self).__name__} does not define features(t, key)")

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, tuple[int, ...]] = {"log_scale": (self.heads,)} if self.has_sizes else {}
        return {"S": (self.heads, self.P + 1, self.n_features), **sizes}

    def initial_state(self, x: Tensor) -> Tensors:
        state = super().initial_state(x)
        if self.has_sizes:
            state["log_scale"].fill_(NOTHING)
        return state

    def queries(self, x: Tensor, w: Tensors) -> Tensor:
        return self.features(linear(x, w, "q_proj").unflatten(-1, (self.heads, -1)), key=False)[0]

    def keys(self, x: Tensor, w: Tensors) -> tuple[Tensor, Tensor | None]:
        return self.features(linear(x, w, "k_proj").unflatten(-1, (self.heads, -1)), key=True)

    def values(self, x: Tensor, w: Tensors) -> Tensor:
        return linear(x, w, "v_proj").unflatten(-1, (self.heads, -1))

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        k, size = self.keys(x, w)
        g: Tensor | None = None
        after: Tensors = {}
        if size is not None:
            scale, g, size = log_scale(size, None, state["log_scale"], layout)
            after["log_scale"] = scale[:, -1].clone()  # not a view of all the others
        y, after["S"] = kernel_attention(
            self.queries(x, w), k, self.values(x, w), g, size, state["S"], layout, self.eps, self.chunk, keep=True
        )
        return y.flatten(2), after

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        if self.causal:
            return super().mix(x, state, layout)
        w: Tensors = named_weights(self)
        if layout is not None and layout.resets is not None:
            k, size = self.keys(x, w)
            if size is not None:
                # At padding a size may be above all others.
                k = k * (size - self._largest(size, layout)).clamp_max(0).exp()[..., None]
            y = kernel_attention_two_sided(self.queries(x, w), k, self.values(x, w), layout, self.eps)
            return self.out_proj(y.flatten(2)), None
        L = x.shape[1]
        if x.device.type != "cpu" or torch.compiler.is_compiling() or L <= TWO_SIDED_TOKENS:
            everything, _ = self._write(x, None, None, layout, w)
            return self._read(x, everything, w), None
        # Features are many times the tokens: they are made for some at a time, and again in the backward.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        pieces = [(i, min(i + TWO_SIDED_TOKENS, L)) for i in range(0, L, TWO_SIDED_TOKENS)]
        S: Any = None
        scale: Any = None
        for i, j in pieces:
            S, scale = again(self._write, x[:, i:j], S, scale, layout and layout.slice(i, j), w)
        return torch.cat([again(self._read, x[:, i:j], S, w) for i, j in pieces], 1), None

    def _write(
        self, x: Tensor, S: Tensor | None, scale: Tensor | None, layout: Layout | None, w: Tensors
    ) -> tuple[Tensor, Tensor | None]:
        """The state and its units after these tokens too."""
        k, size = self.keys(x, w)
        if size is not None:
            valid = None if layout is None else layout.valid(x.shape[1])
            size = size if valid is None else torch.where(valid[..., None], size, NOTHING)
            before, largest = scale, size.amax(1)
            scale = largest if before is None else torch.maximum(largest, before)
            k = k * (size - scale[:, None]).exp()[..., None]
            if S is not None and before is not None:
                S = S * (before - scale).exp()[..., None, None]
        more = written(k, self.values(x, w), layout)
        return more if S is None else S + more, scale

    def _read(self, x: Tensor, S: Tensor, w: Tensors) -> Tensor:
        return linear(read(self.queries(x, w), S, self.eps).flatten(2).to(x.dtype), w, "out_proj")

    def _largest(self, size: Tensor, layout: Layout) -> Tensor:
        """The largest size in each token's document."""
        nothing = size.new_full(size[:, 0].shape, NOTHING)
        past, _, _ = log_scale(size, None, nothing, layout)
        future, _, _ = log_scale(layout.flip_tokens(size), None, nothing, layout.flip(size.shape[1]))
        return torch.maximum(past, layout.flip_tokens(future))


@register_mixer(
    "linear_transformer",
    paper="Katharopoulos et al. 2020, arXiv 2006.16236",
    bidirectional=True,
    note="proved against flash-linear-attention's normalised recurrence with the layer around it written out; no biases",
    survey=(("Linear Transformers", ""),),
)
class LinearTransformer(_Kernelised):
    """Linear attention with features ``elu + 1``.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: ``None`` for about 64 channels a head.
        chunk: tokens a chunk of the recurrence's fast form; ``None`` chooses by the sizes.

    Raises:
        ValueError: a width that does not divide into the heads.
    """

    def __init__(self, dim: int, *, causal: bool = True, heads: int | None = None, chunk: int | None = None) -> None:
        width = dim // heads_of("linear_transformer", heads, round(dim / 64), channels=dim)
        super().__init__(dim, "linear_transformer", dim, heads, causal, width, chunk)

    def features(self, t: Tensor, key: bool) -> tuple[Tensor, Tensor | None]:
        return elu_features(t.to(torch.promote_types(t.dtype, torch.float32))), None


@register_mixer(
    "performer",
    paper="Choromanski et al. 2020, arXiv 2009.14794",
    bidirectional=True,
    note="proved against performer-pytorch with its constant in the features set to 0; exponents shifted by a running maximum; no biases",
    survey=(("Performer", ""),),
)
class Performer(_Kernelised):
    """FAVOR+: positive orthogonal random features of the softmax kernel.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: ``None`` for about 64 channels a head.
        features: random features m; ``None`` for ``d ln d`` of a head's ``d`` channels, at least 8.
        chunk: tokens a chunk of the recurrence's fast form; ``None`` chooses by the sizes.

    Attributes:
        projection: the directions ``w (m, d)``, a buffer that is saved; :meth:`redraw` draws others.

    Raises:
        ValueError: a width that does not divide into the heads, or no features.
    """

    projection: Tensor
    has_sizes = True
    eps = 1e-8  # the shifted exponentials of a query and keys far from it are small

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        features: int | None = None,
        chunk: int | None = None,
    ) -> None:
        d = dim // heads_of("performer", heads, round(dim / 64), channels=dim)
        features = max(8, int(d * math.log(d))) if features is None else features
        if features < 1:
            raise ValueError(f"performer: features must be at least 1, got {features}")
        super().__init__(dim, "performer", dim, heads, causal, features, chunk)
        self.register_buffer("projection", orthogonal_features(features, d))

    @torch.no_grad()
    def redraw(self) -> None:
        """New directions, as the paper does from time to time in training; a state under the old ones is of no use afterwards."""
        self.projection.copy_(orthogonal_features(*self.projection.shape))

    def features(self, t: Tensor, key: bool) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(t.dtype, torch.float32)
        d = t.shape[-1]
        t = t.to(dtype) * d**-0.25
        with torch.autocast(t.device.type, enabled=False):
            raw = t @ self.projection.to(dtype).mT
        largest = raw.amax(-1, keepdim=True)
        found = (raw - largest).exp() * self.n_features**-0.5
        # The square of the length is the same for all features, and for long keys so large that differences would drown in it.
        return found, (largest - 0.5 * t.square().sum(-1, keepdim=True)).squeeze(-1) if key else None


@register_mixer(
    "based",
    paper="Arora et al. 2024, arXiv 2402.18668",
    bidirectional=True,
    note="the linear part of the paper's layers (put `local` beside it); proved against flash-linear-attention's parallel form with the layer around it written out",
)
class Based(_Kernelised):
    """Linear attention by the second-order Taylor expansion of softmax's exponential.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: ``None`` for about 64 channels a head.
        feature_dim: channels d of a head's queries and keys; there are ``1 + d + d (d + 1) / 2`` features.
        chunk: tokens a chunk of the recurrence's fast form.

    Raises:
        ValueError: a width that does not divide into the heads, or no features.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        feature_dim: int = 16,
        chunk: int = 128,
    ) -> None:
        if feature_dim < 1:
            raise ValueError(f"based: feature_dim must be at least 1, got {feature_dim}")
        count = heads_of("based", heads, round(dim / 64), channels=dim)
        features = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        super().__init__(dim, "based", count * feature_dim, heads, causal, features, chunk)

    def features(self, t: Tensor, key: bool) -> tuple[Tensor, Tensor | None]:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        d = t.shape[-1]
        t = t * d**-0.25
        # Of x_i x_j and x_j x_i one is enough, counted twice.
        squares = [t[..., i : i + 1] * torch.cat([t[..., i : i + 1] * 0.5**0.5, t[..., i + 1 :]], -1) for i in range(d)]
        return torch.cat([torch.ones_like(t[..., :1]), t, *squares], -1), None


def orthogonal_features(m: int, d: int) -> Tensor:
    """``(m, d)``: directions orthogonal in blocks of ``d``, with the lengths of ``d`` normal numbers' vectors."""
    blocks = [torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)) for _ in range(-(-m // d))]
    # The sign of R's diagonal makes Q uniform over rotations (Mezzadri 2007).
    directions = torch.cat([(Q * R.diagonal().sign()).T for Q, R in blocks])[:m]
    lengths = torch.randn(m, d, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (lengths * directions).float()
