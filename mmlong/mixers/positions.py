"""How attention knows the order of its tokens: parts of their own, that any softmax mixer takes by name.

    name             what it does to a query at i and a key at j                          paper
    rope             turns both by their positions: the product knows i - j               Su et al. 2021, arXiv 2104.09864
    xpos             rope, and every channel fades with i - j                             Sun et al. 2022, arXiv 2212.10554
    alibi            takes a slope, of each head, times abs(i - j) off the score          Press et al. 2021, arXiv 2108.12409
    t5               adds a learned number, of each head and bucket of distances          Raffel et al. 2019, arXiv 1910.10683
    transformer_xl   adds products of the query with a vector for each distance           Dai et al. 2019, arXiv 1901.02860
    none             nothing: a causal model can still count what it sees                 Haviv et al. 2022, arXiv 2203.16634

A part may change queries and keys as they are made (:meth:`Positions.turn`), so that the cache holds changed keys; and it may change queries, and add terms to the scores, when keys are read
(:meth:`Positions.terms`). Terms are functions of distances alone, so nothing of them is kept: pieces, windows, padding and documents need no more care than without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.score_terms import Terms


class Positions(nn.Module):
    """Base of them all, and ``none``: no positions.

    Args:
        dim: width of the tokens.
        heads, head_dim: of the queries.
        causal: whether keys come after their queries, too.

    Attributes:
        placed: whether :meth:`turn` is to be called.
        causal_only: whether it has no two-sided form.
    """

    placed: ClassVar[bool] = False
    causal_only: ClassVar[bool] = False

    def __init__(self, dim: int, heads: int, head_dim: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, head_dim, causal

    def turn(self, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """New queries ``(B, L, heads, head_dim)`` and keys ``(B, L, kv_heads, head_dim)`` with their positions in them.

        Args:
            places: int64 ``(L,)`` or ``(B, L)``, in their documents.
        """
        return q, k

    def terms(self, q: Tensor, lowest: int, highest: int) -> tuple[Tensor, Terms]:
        """Queries as they meet the cached keys, and what is added to the scores.

        Args:
            q: ``(B, heads, L, head_dim)``, turned.
            lowest, highest: distances from a key back to the query's own that are seen.
        """
        return q, Terms()


class Rope(Positions):
    """Rotary positions, as in Llama (:mod:`mmlong.ops.rotary`).

    Args:
        base: longest wavelength over 2 pi.
        fraction: of a head's channels that are turned, the first ones (GPT-NeoX, Gemma's Griffin).
    """

    placed = True

    def __init__(
        self, dim: int, heads: int, head_dim: int, causal: bool, *, base: float = 10000.0, fraction: float = 1.0
    ) -> None:
        super().__init__(dim, heads, head_dim, causal)
        if not 0 < fraction <= 1:
            raise ValueError(f"positions rope: fraction must be above 0 and at most 1, got {fraction}")
        self.base, self.turned = base, int(head_dim * fraction)

    def turn(self, q: Tensor, k: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        table = rotary_table(places, self.turned, self.base, q.dtype)
        return rotate(q, table), rotate(k, table)


class XPos(Rope):
    """Rotary positions of which every pair ``c`` of ``n`` fades by ``((c / n + gamma) / (1 + gamma)) ** (d / scale_base)`` over a distance ``d``. Causal only: what fades into the past would grow into the future.

    Args:
        base: longest wavelength over 2 pi.
        scale_base: tokens over which the fades above apply.
        gamma: the larger, the less they fade.
    """

    causal_only = True

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        causal: bool,
        *,
        base: float = 10000.0,
        scale_base: float = 512.0,
        gamma: float = 0.4,
    ) -> None:
        super().__init__(dim, heads, head_dim, causal, base=base)
        half = head_dim // 2
        rates = ((torch.arange(half).double() / max(half, 1) + gamma) / (1 + gamma)).log() / scale_base
        # An odd last channel is not turned, and does not fade.
        whole = torch.cat([rates, rates, rates.new_zeros(head_dim - 2 * half)])
        self.register_buffer("rates", whole.float(), persistent=False)
        self.rates: Tensor

    def terms(self, q: Tensor, lowest: int, highest: int) -> tuple[Tensor, Terms]:
        return q, Terms(fade=self.rates)


class Alibi(Positions):
    """Attention with linear biases: no learned numbers. Slopes fall geometrically from head to head, for eight of them from 1/2 to 1/256; two-sided, distances count to both sides alike."""

    def __init__(self, dim: int, heads: int, head_dim: int, causal: bool) -> None:
        super().__init__(dim, heads, head_dim, causal)
        self.register_buffer("slopes", torch.tensor(alibi_slopes(heads)), persistent=False)
        self.slopes: Tensor

    def terms(self, q: Tensor, lowest: int, highest: int) -> tuple[Tensor, Terms]:
        distance = torch.arange(lowest, highest + 1, device=q.device).abs()
        return q, Terms(bias=-self.slopes[:, None] * distance, lowest=lowest)


def alibi_slopes(heads: int) -> list[float]:
    """The authors' slopes: of ``n = 2 ** m`` heads ``2 ** (-8 h / n)``; of another number those of the power of two below, and then every other one of twice as many."""
    most = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (h + 1) / most) for h in range(most)]
    return first + [2.0 ** (-4 * (h + 1) / most) for h in range(0, 2 * (heads - most), 2)]


class T5(Positions):
    """T5's relative positions: half the buckets hold one distance each, the others ever more, up to ``max_distance``; the last one holds all beyond.

    Two-sided, half of all the buckets are for keys after the query. Departures: scores are divided by ``sqrt(head_dim)``, which T5 leaves to the size of its initial queries; and every layer has a table of its own.

    Args:
        buckets: how many, causal at least 2, two-sided at least 4 and even.
        max_distance: where the last one begins; at least the number of single distances, and one more.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, causal: bool, *, buckets: int = 32, max_distance: int = 128
    ) -> None:
        super().__init__(dim, heads, head_dim, causal)
        side = buckets if causal else buckets // 2
        if side < 2 or (not causal and buckets % 2):
            raise ValueError(f"positions t5: buckets must be at least 2, two-sided at least 4 and even, got {buckets}")
        if max_distance <= side // 2:
            raise ValueError(
                f"positions t5: max_distance {max_distance} must be more than {side // 2}, which {buckets} buckets hold singly"
            )
        self.table = nn.Parameter(0.02 * torch.randn(heads, buckets))
        self.register_buffer("bucket", torch.tensor(t5_buckets(side, max_distance)), persistent=False)
        self.bucket: Tensor

    def terms(self, q: Tensor, lowest: int, highest: int) -> tuple[Tensor, Terms]:
        distance = torch.arange(lowest, highest + 1, device=q.device)
        bucket = self.bucket[distance.abs().clamp_max(self.bucket.shape[0] - 1)]
        if not self.causal:
            bucket = bucket + (distance < 0) * (self.table.shape[1] // 2)
        return q, Terms(bias=self.table.index_select(1, bucket), lowest=lowest)


def t5_buckets(buckets: int, max_distance: int) -> list[int]:
    """The bucket of every distance from 0 to ``max_distance``, from where on it is the last one."""
    single = buckets // 2
    found = list(range(min(single, max_distance + 1)))
    span = math.log(max_distance / single)
    for d in range(single, max_distance + 1):
        # Where a bucket begins at a whole distance, rounding may not put that into the one before.
        share = math.log(d / single) / span * (buckets - single)
        found.append(min(buckets - 1, single + int(share + 1e-6)))
    return found


class TransformerXL(Positions):
    """Transformer-XL's relative positions: ``(q + u) . k + (q + v) . W r_d``, with ``r_d`` sines and cosines of the distance, and ``u`` and ``v`` learned, of each head.

    Args:
        base: longest wavelength of ``r`` over 2 pi.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, causal: bool, *, base: float = 10000.0) -> None:
        super().__init__(dim, heads, head_dim, causal)
        if dim % 2:
            raise ValueError(f"positions transformer_xl: dim must be even, for sines and cosines, got {dim}")
        self.base, self.dim = base, dim
        self.proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.content_bias, self.place_bias = (nn.Parameter(0.02 * torch.randn(heads, head_dim)) for _ in range(2))

    def terms(self, q: Tensor, lowest: int, highest: int) -> tuple[Tensor, Terms]:
        distance = torch.arange(lowest, highest + 1, device=q.device)
        cos, sin = rotary_table(distance, self.dim, self.base, q.dtype)
        waves = torch.cat([sin, cos], -1).to(q.dtype)  # (N, dim)
        u, v = (t.to(q.dtype)[:, None] for t in (self.content_bias, self.place_bias))
        reads, L = q + v, q.shape[2]
        if self.head_dim > L and not torch.compiler.is_compiling():
            # Of a few queries it is less work to take them to the waves.
            weight = self.proj.weight.to(q.dtype).unflatten(0, (self.heads, self.head_dim))
            return q + u, Terms(reads=reads @ weight, rows=waves[None], lowest=lowest)
        rows = self.proj(waves).unflatten(-1, (self.heads, self.head_dim)).transpose(0, 1)
        return q + u, Terms(reads=reads, rows=rows, lowest=lowest)


POSITIONS: dict[str, type[Positions]] = {
    "rope": Rope,
    "xpos": XPos,
    "alibi": Alibi,
    "t5": T5,
    "transformer_xl": TransformerXL,
    "none": Positions,
}


def create_positions(
    mixer: str, name: str, dim: int, heads: int, head_dim: int, causal: bool, options: Mapping[str, Any] | None
) -> Positions:
    """The part of a mixer.

    Args:
        mixer: its name, for messages.
        name: one of ``POSITIONS``.
        options: of that class; ``None`` for none.

    Raises:
        ValueError: an unknown name, an option that it does not take or cannot have, or a two-sided mixer where it has no such form.
    """
    if name not in POSITIONS:
        raise ValueError(f"{mixer}: unknown positions {name!r}; use one of {', '.join(POSITIONS)}")
    kind = POSITIONS[name]
    if kind.causal_only and not causal:
        raise ValueError(f"{mixer}: positions {name!r} have no two-sided form: use others, or causal=True")
    try:
        return kind(dim, heads, head_dim, causal, **(options or {}))
    except TypeError as error:
        raise ValueError(f"{mixer}: position_options of {name!r}: {error}") from None
