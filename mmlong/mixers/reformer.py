"""Reformer: attention among tokens whose queries, which are their keys too, fall into the same bucket of a random hash.

Kitaev, Kaiser & Levskaya 2020, "Reformer: The Efficient Transformer" (arXiv 2001.04451), section 2. For every head, with random rotations ``R`` for each of several rounds:

    q = W_qk x;   k = q / |q|;   v = W_v x
    h(x) = argmax [x R; -x R]                                     n buckets, R of n / 2 columns
    two-sided   tokens sorted by (h, position) are cut into chunks; a token sees those of its bucket in its own chunk and the one before
    causal      a token sees the last ``chunk`` tokens of its bucket before it
    y = softmax(q k^T / sqrt(d)) v over what any of the rounds lets it see; never itself, unless there is nothing else

Rounds are merged by the logarithms of their sums, and a pair that N rounds find weighs 1 / N in each: the softmax over their union, which is what is computed. Attention is
:mod:`mmlong.ops.selection`. The hash looks at the same numbers in whatever precision the rest is computed, since a bucket is not nearly right: it is in float32 under autocast too.

**Causal**: the paper sorts the whole sequence and hides later positions from the weights. But where a chunk begins is decided by the number of tokens in smaller buckets, later ones included, so which keys a
token sees changes with the future: it leaks, and does not stream. Here a token's own bucket is counted from the token back, which decides the same for everybody who has seen as much; the number of buckets is
an option, not a function of the length. This form keeps all keys (a later token may fall into any bucket), so its state grows.

Two-sided, rotations are drawn anew for every call in training, and are buffers in eval. Causal they are the buffers always: a bucket must be the same in every piece of a sequence, or training in segments would be another
function. More than 128 buckets are told apart by two hashes of about the root of their
number each, which cost less (as in the authors' code).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.mixers.exact import exact_linear
from mmlong.ops.members import member_attention
from mmlong.ops.selection import chunk_codes, inverse_of, order_by, selected_attention
from mmlong.ops.tiled_attention import HIDDEN

ONE_HASH = 128
"""Buckets that are told apart by one hash; more are by two."""

MOST = 1 << 14
"""Buckets at most, where they are a function of the length: 128 times 128."""

EPS = 1e-12
"""Under the root of a key's norm."""


@register_mixer(
    "reformer",
    paper="Kitaev et al. 2020, arXiv 2001.04451",
    bidirectional=True,
    state="growing",
    cost="n log n",
    note="two-sided it is the paper's, proved against reformer-pytorch's LSHAttention and transformers' LSHSelfAttention, weights and rotations copied; causal, the last members of a token's bucket in place of chunks across "
    "buckets, which let the future decide what is seen, and one draw of rotations for good; the paper's reversible layers are the backbone's",
    survey=(("Reformer", ""),),
)
class Reformer(DocumentMixer):
    """LSH attention.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        rounds: hashes whose findings are united.
        chunk: tokens of a chunk; causal: members of its bucket that a token sees.
        buckets: even, or at least 2 and even times even above 128; ``None``: two-sided a power of two about ``2 L / chunk``, causal 64.
        across_buckets: two-sided only: everything in the two chunks is seen, and as often as rounds find it, as the published codes have it by default.
        scale: of the scores; ``None`` for ``1 / sqrt(head_dim)``.
        seed: of the rotations that are kept; ``None`` to draw them from torch's generator.

    Raises:
        ValueError: sizes that do not divide or make no sense.
    """

    rotations: Tensor

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        head_dim: int | None = None,
        rounds: int = 4,
        chunk: int = 64,
        buckets: int | None = None,
        across_buckets: bool = False,
        scale: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("Reformer", dim, heads, None, head_dim)
        for option, n in (("rounds", rounds), ("chunk", chunk)):
            if n < 1:
                raise ValueError(f"Reformer: {option} must be at least 1, got {n}")
        if across_buckets and causal:
            raise ValueError("Reformer: across_buckets is two-sided only: a causal token has no chunk to see all of")
        if buckets is None and causal:
            buckets = 64
        self.rounds, self.chunk, self.buckets, self.across_buckets = rounds, chunk, buckets, across_buckets
        self.scale = 1 / math.sqrt(self.head_dim) if scale is None else scale
        # Of each of the two hashes, the most columns that are ever used.
        columns = [n // 2 for n in hashes_of(MOST if buckets is None else buckets)]
        most = max(columns) if buckets is not None else max(ONE_HASH // 2, *columns)
        r = None if seed is None else torch.Generator().manual_seed(seed)
        shape = (len(columns), self.heads, self.head_dim, rounds, most)
        self.register_buffer("rotations", torch.randn(shape, generator=r))
        self.qk_proj = nn.Linear(dim, self.heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.heads * self.head_dim, dim, bias=False)

    def slots(self, seen: int) -> dict[str, int]:
        return {"k": seen, "v": seen, "buckets": seen}

    def state_bytes(self, length: int) -> int:
        return 4 * length * self.heads * (2 * self.head_dim + self.rounds) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q = exact_linear(self.qk_proj, x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = q * (q.square().sum(-1, keepdim=True) + EPS).rsqrt()
        after = None
        if self.causal:
            assert self.buckets is not None
            if state is not None:
                k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            known = None if state is None else state["buckets"].permute(3, 0, 1, 2).long()
            new = self.hash(k if known is None else k[:, :, past:], self.buckets)
            groups = new if known is None else torch.cat([known, new], -1)
            y, log_sums = member_attention(q, k, v, groups, self.buckets, self.chunk, scale=self.scale, with_self=False)
            after = {"k": k, "v": v, "buckets": groups.permute(1, 2, 3, 0).int()}
        else:
            y, log_sums = self.chunks(q, k, v)
        # A token without any other to see sees itself.
        y = torch.where(log_sums[..., None] > HIDDEN / 2, y, v[:, :, past:].to(y.dtype))
        y = self.out_proj(y.to(x.dtype).transpose(1, 2).flatten(2))
        return y, after

    def chunks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The two-sided form: own chunk and the one before."""
        L = q.shape[2]
        groups = self.hash(k, self.buckets or buckets_for(L, self.chunk))
        order = order_by(groups)
        if self.across_buckets:
            codes = (inverse_of(order, L) // self.chunk).int()
        else:
            codes = chunk_codes(groups, order, self.chunk)
        return selected_attention(
            q, k, v, order, codes, self.chunk, (0, 1), scale=self.scale, without_self=True, once=not self.across_buckets
        )

    @torch.no_grad()
    def hash(self, k: Tensor, buckets: int) -> Tensor:
        """The buckets of keys ``(B, H, S, d)`` in each round: int64 ``(R, B, H, S)``, less than ``buckets``."""
        drawn = self.training and not self.causal
        rotations = torch.randn_like(self.rotations) if drawn else self.rotations
        with torch.autocast(k.device.type, enabled=False):
            found = []
            for r in range(self.rounds):
                bucket, below = torch.zeros_like(k[..., 0], dtype=torch.long), 1
                for n, rotation in zip(hashes_of(buckets), rotations, strict=False):
                    turned = k @ rotation[:, :, r, : n // 2].to(k.dtype)
                    nearest = turned.abs().argmax(-1, keepdim=True)
                    opposite = turned.gather(-1, nearest) < 0
                    bucket += below * (nearest + n // 2 * opposite)[..., 0]
                    below *= n
                found.append(bucket)
        return torch.stack(found)


def buckets_for(length: int, chunk: int) -> int:
    """The greatest power of two up to twice the number of chunks, from 2 to :data:`MOST`: chunks hold two buckets on average."""
    return min(MOST, 1 << max(1, (2 * length // chunk).bit_length() - 1))


def hashes_of(buckets: int) -> list[int]:
    """How many buckets each of one or two hashes tells apart.

    Raises:
        ValueError: buckets that they cannot make up.
    """
    if buckets < 2 or buckets % 2:
        raise ValueError(
            f"Reformer: buckets must be even and at least 2, got {buckets}: a hash has opposite pairs of them"
        )
    if buckets <= ONE_HASH:
        return [buckets]
    for n in range(int(buckets**0.5), 1, -1):
        if buckets % n == 0 and n % 2 == 0 and buckets // n % 2 == 0:
            return [n, buckets // n]
    raise ValueError(
        f"Reformer: more than {ONE_HASH} buckets are told apart by two hashes of an even number each, which {buckets} is not the product of: choose a power of two"
    )
