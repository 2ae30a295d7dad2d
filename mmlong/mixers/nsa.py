"""Native Sparse Attention: every query sees the past compressed, the parts of it that the compressed view points to, and the last tokens.

Follows Yuan et al. 2025 (arXiv 2502.11089), section 3. Three branches, each with keys and values of its own, for the same queries; blocks of ``l`` = 32 tokens are compressed every ``d`` = 16, blocks of ``l'`` = 64 are selected. For a query at
``t`` of head ``h``, of the group ``g`` of heads that shares keys:

    compressed   k~_i = phi(k_{id} .. k_{id+l-1}), v~_i likewise, for all i with id + l - 1 <= t;      p_t = softmax_i(q_t . k~_i);      o1 = sum_i p_ti v~_i
    selected     s_tJ = sum of p_ti over the heads of g and over the shared stretches of d tokens of the blocks i and J
                 T_t = the first block, the own and the one before it, and of the others the n - 3 with the largest s_tJ
                 o2 = softmax over the keys of T_t up to t
    window       o3 = softmax over the last w = 512 keys, the own among them
    out = W_o (g1 o1 + g2 o2 + g3 o3),          g = sigmoid(W_g x + b_g), one for each head and branch

``phi`` adds a learned position within the block and is an MLP of one hidden layer, one for keys and one for values. The shared stretches are the paper's equation 9, whose sums run over ``l'/d`` and ``l/d`` stretches. All blocks to choose from
lie in the past, compressed blocks over them too. Where softmaxes are so sharp that what is to be compared is equal but for roundings, or no number any more, it
is compared again by its logarithm in float64 (on a CPU; elsewhere always by the logarithm). The selection passes no gradient. Where a query has no compressed block yet ``o1`` is zero.

What the paper leaves open: positions are rotary for the selected and the window branch, and none but those within the block for the compressed one; ``phi`` has ``4 head_dim`` hidden units and a GELU; 16 heads share keys, or all where there are
fewer.

The compressed branch looks at all of ``n / d`` blocks, so the work is quadratic, a sixteenth of dense; scores are made for a few queries at a time. The selected blocks are computed by :mod:`mmlong.ops.chosen_blocks`. The state is the keys and values for
the selection ``k, v (B, G, S, D)``, the compressed ``k_cmp, v_cmp``, those for the next compressed block ``k_open, v_open`` and the window ``k_win, v_win``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.mixers.selecting import so_far, stretches
from mmlong.ops.attention import attention
from mmlong.ops.block_attention import merge_parts
from mmlong.ops.chosen_blocks import chosen_blocks
from mmlong.ops.interval_attention import interval_part
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.top import can_ask, top_indices
from mmlong.ops.visible import Visible

FORCED = 3
"""Blocks that are always selected: the first, the own, and the one before that."""

SHARED = 16
"""Heads that share keys and values, as in the paper."""

ROUNDINGS = 8
"""By how many roundings two blocks may differ and still be compared more exactly."""

PROJECTED = ("k_cmp", "v_cmp", "k", "v", "k_win", "v_win")
"""Keys and values of the compressed, the selected and the window branch."""


class Compression(nn.Module):
    """``phi``: a block of ``length`` keys, every ``stride``, as one.

    Args:
        groups: heads of keys G, each with positions of its own; the MLP is one for all.
        head_dim: channels D.
        length, stride: of the blocks.
        hidden: units.
    """

    def __init__(self, groups: int, head_dim: int, length: int, stride: int, hidden: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.positions = nn.Parameter(torch.randn(groups, length, head_dim) * 0.02)
        self.first = nn.Linear(length * head_dim, hidden)
        self.second = nn.Linear(hidden, head_dim)

    def forward(self, t: Tensor) -> Tensor:
        """``(N, G, S, D)`` as ``(N, G, n, D)``, the whole blocks of it, at least one."""
        D, parts = t.shape[3], self.length // self.stride
        n = (t.shape[2] - self.length) // self.stride + 1
        # Each stretch of d tokens is multiplied once, by what every place in a block would do with it.
        pieces = t[:, :, : (n - 1 + parts) * self.stride].unflatten(2, (-1, self.stride)).flatten(3)
        weight = self.first.weight.view(-1, parts, self.stride * D)
        made = F.linear(pieces, weight.transpose(0, 1).flatten(0, 1)).unflatten(3, (parts, -1))
        bias = F.linear(self.positions.flatten(1), self.first.weight, self.first.bias)
        units = bias[:, None] + made[:, :, :n, 0]
        for j in range(1, parts):
            units = units + made[:, :, j : j + n, j]
        out: Tensor = self.second(F.gelu(units))
        return out


@register_mixer(
    "nsa",
    paper="Yuan et al. 2025, arXiv 2502.11089",
    state="growing",
    cost="n^2",
    note="positions, the compression's hidden layer and heads per group are not given in the paper, see the file; proved against flash-linear-attention's selection, compression and top-n with blocks alike, "
    "native-sparse-attention-pytorch's compression, and its definition in float64",
)
class NSA(DocumentMixer):
    """Native Sparse Attention.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: heads of queries; ``None`` for about one per 64 channels.
        kv_heads: heads of keys and values; ``None`` for one for 16 heads.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        compress: tokens ``l`` of a compressed block.
        stride: tokens ``d`` from one to the next; divides ``compress`` and ``block``.
        hidden: units of the compression; ``None`` for ``4 head_dim``.
        block: tokens ``l'`` of a block to select, at least ``compress``.
        blocks: how many are selected, at least 3: the first, the own and the one before it always are.
        window: keys that the window branch sees, the own among them.
        rope: turn queries and keys of the selected and the window branch by their positions.
        rope_base: longest wavelength over 2 pi.
        bias: of the projections.

    Raises:
        ValueError: sizes that do not divide, or too few of something.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        compress: int = 32,
        stride: int = 16,
        hidden: int | None = None,
        block: int = 64,
        blocks: int = 16,
        window: int = 512,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("nsa", dim, heads, kv_heads, head_dim)
        if kv_heads is None:
            kv_heads = self.heads // next(n for n in range(min(SHARED, self.heads), 0, -1) if self.heads % n == 0)
        self.kv_heads = kv_heads
        hidden = 4 * self.head_dim if hidden is None else hidden
        for option, n, least in (
            ("stride", stride, 1),
            ("compress", compress, 1),
            ("hidden", hidden, 1),
            ("blocks", blocks, FORCED),
            ("window", window, 1),
        ):
            if n < least:
                raise ValueError(f"nsa: {option} must be at least {least}, got {n}")
        if compress % stride or block % stride or block < compress:
            raise ValueError(
                f"nsa: stride {stride} must divide compress {compress} and block {block}, and block be at least compress"
            )
        self.compress, self.stride, self.block, self.blocks, self.window = compress, stride, block, blocks, window
        self.rope, self.rope_base = rope, rope_base
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.kv_proj = nn.ModuleDict(
            {name: nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias) for name in PROJECTED}
        )
        self.gate_proj = nn.Linear(dim, 3 * self.heads)
        self.k_compress, self.v_compress = (
            Compression(self.kv_heads, self.head_dim, compress, stride, hidden) for _ in range(2)
        )
        self.out_proj = nn.Linear(self.heads * self.head_dim, dim, bias=bias)

    def compressed(self, seen: int) -> int:
        """Compressed blocks of so many tokens."""
        return max(0, (seen - self.compress) // self.stride + 1)

    def slots(self, seen: int) -> dict[str, int]:
        n = self.compressed(seen)
        sizes = {"": seen, "_win": min(seen, self.window - 1), "_open": seen - n * self.stride, "_cmp": n}
        return {kind + name: size for name, size in sizes.items() for kind in "kv"}

    def state_bytes(self, length: int) -> int:
        return 4 * self.kv_heads * self.head_dim * sum(self.slots(length).values()) if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        T = x.shape[1]
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        kv = [proj(x).unflatten(-1, (self.kv_heads, self.head_dim)) for proj in self.kv_proj.values()]
        plain, (kc, vc, ks, vs, kw, vw) = q, kv
        if self.rope:
            positions = torch.arange(past, past + T, device=x.device)
            table = rotary_table(positions, self.head_dim, self.rope_base, x.dtype)
            q, ks, kw = (rotate(t, table) for t in (q, ks, kw))
        q, plain, kc, vc, ks, vs, kw, vw = (t.transpose(1, 2) for t in (q, plain, kc, vc, ks, vs, kw, vw))
        new = {"k": ks, "v": vs, "k_win": kw, "v_win": vw, "k_open": kc, "v_open": vc}
        ks, vs, kw, vw, kc, vc = so_far(state, new)
        ready = self.compressed(past + T) - self.compressed(past)
        k_cmp, v_cmp = (self.k_compress(kc), self.v_compress(vc)) if ready else (kc[:, :, :0], vc[:, :, :0])
        k_cmp, v_cmp = so_far(state, {"k_cmp": k_cmp, "v_cmp": v_cmp})
        after = {"k": ks, "v": vs, "k_win": kw, "v_win": vw, "k_open": kc, "v_open": vc, "k_cmp": k_cmp, "v_cmp": v_cmp}
        sizes = self.slots(past + T)
        after = {name: _newest(t, sizes[name]) for name, t in after.items()}
        gates = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (self.heads, 3)).transpose(1, 2)
        y = gates[..., 2:] * attention(q, kw, vw, Visible(left=self.window - 1, right=0))
        y = y + gates[..., 1:2] * self.selected(q, ks, vs, plain, k_cmp, past)
        if k_cmp.shape[2]:
            y = y + gates[..., :1] * self.coarse(plain, k_cmp, v_cmp, past)
        y = self.out_proj(y.transpose(1, 2).flatten(2).to(self.out_proj.weight.dtype))
        return y, after

    def coarse(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """The compressed branch."""
        stop = self.ends(past, q.shape[2])
        y, _ = interval_part(q, k, v, np.zeros_like(stop)[None], stop[None], 1 / math.sqrt(self.head_dim))
        if stop[0]:
            return y
        return y * torch.from_numpy(stop > 0).to(q.device)[:, None]

    def selected(self, q: Tensor, k: Tensor, v: Tensor, plain: Tensor, k_cmp: Tensor, past: int) -> Tensor:
        """The selected branch: the own block and the one before it are an interval, the others a list."""
        place = np.arange(past, past + q.shape[2])[None]
        before = np.maximum(place // self.block - 1, 0) * self.block
        scale = 1 / math.sqrt(self.head_dim)
        parts = [interval_part(q, k, v, before, place + 1, scale)]
        if place[0, -1] >= 2 * self.block:
            chosen = self.choose(plain, k_cmp, past)
            parts.append(chosen_blocks(q, k, v, chosen, self.block, scale=scale))
        return merge_parts(parts)[0]

    def ends(self, past: int, length: int) -> np.ndarray:
        """How many compressed blocks each query sees."""
        seen = np.arange(past + 1, past + length + 1)
        return np.maximum((seen - self.compress) // self.stride + 1, 0)

    @torch.no_grad()
    @torch.compiler.disable
    def choose(self, q: Tensor, k: Tensor, past: int) -> Tensor:
        """The blocks that are neither a query's own nor the one before it: the first, and those that are chosen.

        Args:
            q: ``(N, H, T, D)`` of the compressed branch.
            k: ``(N, G, n, D)``, compressed.
            past: tokens before.

        Returns:
            int64 ``(N, G, T, blocks - 2)``; -1 where there are fewer.
        """
        (N, H, T, _), G = q.shape, k.shape[1]
        dtype = torch.promote_types(q.dtype, torch.float32)
        own = torch.arange(past, past + T, device=q.device) // self.block
        chosen = torch.full((N, G, T, self.blocks - FORCED + 1), -1, device=q.device)
        chosen[..., 0] = torch.where(own >= 2, 0, -1)
        begin = max(0, FORCED * self.block - past)
        if begin >= T or self.blocks == FORCED:
            return chosen
        ends = self.ends(past, T)
        stop = torch.from_numpy(ends).to(q.device)
        asked = q.unflatten(1, (G, -1))
        wide, deep, most = self.block // self.stride, self.compress // self.stride, self.blocks - FORCED
        with torch.autocast(q.device.type, enabled=False):
            for i, j in stretches(T - begin, N * H * int(ends[-1])):
                i, j = i + begin, j + begin
                n, last = int(ends[j - 1]), (past + j - 1) // self.block - 2
                number = torch.arange(last + 1, device=q.device)
                closed = (number == 0) | (number > own[i:j, None] - 2)
                here, keys = asked[:, :, :, i:j].to(dtype), k[:, :, None, :n].to(dtype)
                if not can_ask(q):
                    logs = seen_scores(here, keys, stop[i:j]).log_softmax(-1).logsumexp(2)
                    worth = block_log_worth(logs, last + 1, wide, deep).masked_fill_(closed, -math.inf)
                    chosen[:, :, i:j, 1:] = top_indices(worth, most)
                    continue
                share = seen_scores(here, keys, stop[i:j]).softmax(-1).sum(2)
                worth = block_worth(share, last + 1, wide, deep).masked_fill_(closed, -math.inf)
                found = top_indices(worth, most)
                again = unsure(worth, most).flatten(0, 1).any(0).nonzero()[:, 0]
                if len(again):
                    scores = seen_scores(here[:, :, :, again].double(), keys.double(), stop[i:j][again])
                    logs = block_log_worth(scores.log_softmax(-1).logsumexp(2), last + 1, wide, deep)
                    found[:, :, again] = top_indices(logs.masked_fill_(closed[again], -math.inf), most)
                chosen[:, :, i:j, 1:] = found
        return chosen


def seen_scores(q: Tensor, k: Tensor, stop: Tensor) -> Tensor:
    """Scores ``(N, G, r, t, n)`` of queries ``(N, G, r, t, D)`` and compressed keys ``(N, G, 1, n, D)``, of which each query sees those before ``stop (t,)``."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    return scores.masked_fill_(torch.arange(k.shape[3], device=q.device) >= stop[:, None], -math.inf)


def unsure(worth: Tensor, most: int) -> Tensor:
    """Bool ``(..)``: whether the last of the ``most`` best of ``worth (.., n)`` and the next differ by no more than roundings, or are smaller than those."""
    if worth.shape[-1] <= most:
        return torch.zeros_like(worth[..., 0], dtype=torch.bool)
    values = worth.topk(most + 1).values
    least, other = values[..., -2], values[..., -1]
    finfo = torch.finfo(worth.dtype)
    close = (least - other <= ROUNDINGS * finfo.eps * least) | (least < finfo.tiny / finfo.eps)
    return close & (other > -math.inf)


def block_worth(share: Tensor, blocks: int, wide: int, deep: int) -> Tensor:
    """What each block to select is worth, ``(.., blocks)``: the sum over its ``wide`` stretches of the compressed blocks that have it among their ``deep``, from the worth of those ``(.., n)``."""
    share, size = F.pad(share, (deep - 1, 0)), blocks * wide
    stretches = share[..., :size]
    for e in range(1, deep):
        stretches = stretches + share[..., e : e + size]
    return stretches.unflatten(-1, (blocks, wide)).sum(-1)


def block_log_worth(logs: Tensor, blocks: int, wide: int, deep: int) -> Tensor:
    """The logarithm of the same from logarithms, where the worth itself may be smaller than any number."""
    logs, size = F.pad(logs, (deep - 1, 0), value=-math.inf), blocks * wide
    stretches = torch.stack([logs[..., e : e + size] for e in range(deep)]).logsumexp(0)
    return stretches.unflatten(-1, (blocks, wide)).logsumexp(-1)


def _newest(t: Tensor, slots: int) -> Tensor:
    """The last slots of axis -2, in memory of their own if they are not all."""
    return t if slots == t.shape[2] else t[:, :, t.shape[2] - slots :].clone()
