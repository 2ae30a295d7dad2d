"""Transformer-XL and the Compressive Transformer: segments that see a memory of earlier ones, and a compressed memory of what that lets go.

Follows Dai et al. 2019 (arXiv 1901.02860) and Rae et al. 2019 (arXiv 1911.05507). A document is cut into segments of ``n_s`` tokens. With ``a`` the first token of a query's segment, the query sees, in this order,

    compressed   C_s, of which slot s is made of the tokens s c .. s c + c - 1, the last n_cm slots of those before a - n_m        (compressive only)
    memory       the n_m tokens before a
    own          its segment up to itself

with keys ``W_k h_j`` and values ``W_v h_j`` of the layer's inputs ``h``, and Transformer-XL's relative positions, in which a distance counts what lies between in that order, a slot as one. Keys and values of the memory are made of ``h`` without its
gradient, as in the paper: what a segment remembers is not taught by those that read it. ``exact=True`` lets the gradient through, which segmented training makes affordable.

Tokens leave the memory in whole segments and are compressed ``c`` to one: ``C = f(h)``, with ``f`` a mean or a maximum of the ``c`` tokens, a convolution of stride and width ``c``, or one that is dilated by two and so begins ``c - 1`` tokens earlier.
Only a loss of its own teaches ``f`` (:mod:`mmlong.mixers.own_loss`), and it teaches nothing else: attention by content alone over the tokens that the current segment pushes out, and over what they are compressed to, must agree,

    |attn(h, old) - attn(h, f(old))|^2,       the mean over channels and tokens, times ``reconstruction``

Departures: segments begin with the document, wherever a batch is cut, so pieces of any length give the same result; the paper's fourth compression, keeping the tokens that were used most, is left out. The state is keys and values of memory, slots and the open
segment, and what is still to be compressed.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked
from mmlong.mixers.positions import TransformerXL
from mmlong.ops.attention import attention
from mmlong.ops.cross_attention import cross_attention
from mmlong.ops.visible import Visible

COMPRESSIONS = ("mean", "max", "conv", "dilated_conv")


class Compression(nn.Module):
    """``rate`` tokens to one.

    Args:
        dim: width.
        rate: c.
        kind: of ``COMPRESSIONS``.

    Attributes:
        lead: tokens before a group that its slot is also made of.
    """

    def __init__(self, dim: int, rate: int, kind: str) -> None:
        super().__init__()
        if kind not in COMPRESSIONS:
            raise ValueError(f"compressive: compression is one of {', '.join(COMPRESSIONS)}, got {kind!r}")
        self.rate, self.kind = rate, kind
        self.lead = rate - 1 if kind == "dilated_conv" else 0
        self.conv = nn.Conv1d(dim, dim, rate, rate, dilation=1 + bool(self.lead)) if "conv" in kind else None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, lead + n rate, D)`` to ``(N, n, D)``."""
        if self.conv is not None:
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        groups = x.unflatten(1, (-1, self.rate))
        return groups.mean(2) if self.kind == "mean" else groups.amax(2)


class SegmentMemory(DocumentMixer):
    """Base of both.

    Args:
        dim: width D; even.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        segment: n_s.
        memory: n_m; compressive at least ``segment``.
        compressed: n_cm; 0 for none.
        rate: c; divides ``segment`` and ``memory``.
        compression: how tokens are compressed.
        reconstruction: weight of the loss that teaches the compression.
        exact: the gradient of memory goes to the tokens that it is of.
        heads, head_dim, bias: as :class:`~mmlong.mixers.attention.Attention`.

    Raises:
        ValueError: sizes that do not divide or are too small.
    """

    name = ""

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        segment: int,
        memory: int,
        compressed: int,
        rate: int,
        compression: str,
        reconstruction: float,
        exact: bool,
        heads: int | None,
        head_dim: int | None,
        bias: bool,
    ) -> None:
        super().__init__(dim, causal=causal)
        if segment < 1 or memory < 1 or compressed < 0 or rate < 1 or not reconstruction >= 0:
            raise ValueError(
                f"{self.name}: segment, memory and rate must be at least 1, compressed and reconstruction at least 0, got {segment}, {memory}, {rate}, {compressed} and {reconstruction}"
            )
        if compressed and (segment % rate or memory % rate or memory < segment):
            raise ValueError(
                f"{self.name}: tokens are let go in whole segments and compressed {rate} to one, so {rate} must divide segment {segment} and memory {memory}, and memory must be at least the segment"
            )
        self.heads, _, self.head_dim = head_sizes(self.name, dim, heads, None, head_dim)
        self.segment, self.memory, self.compressed, self.rate = segment, memory, compressed, rate
        self.reconstruction, self.exact = reconstruction, exact
        inner = self.heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.positions = TransformerXL(dim, self.heads, self.head_dim, True)
        self.compress = Compression(dim, rate, compression) if compressed else None

    @property
    def stops_gradient(self) -> bool:
        return self.compress is not None or not self.exact

    @property
    def has_own_loss(self) -> bool:
        return self.compress is not None and self.compress.conv is not None and self.reconstruction > 0

    def begin(self, seen: int) -> int:
        """Where the segment of the last of so many tokens begins."""
        return max(0, seen - 1) // self.segment * self.segment

    def let_go(self, start: int) -> int:
        """Tokens that are in the memory no more when a segment begins at ``start``."""
        return max(0, start - self.memory)

    def raw_from(self, seen: int) -> int:
        """The first token whose input is kept after ``seen`` tokens."""
        lead = 0 if self.compress is None else self.compress.lead
        return max(0, self.let_go(self.begin(seen)) - lead)

    def slots(self, seen: int) -> dict[str, int]:
        start = self.begin(seen)
        gone = self.let_go(start)
        found = {"k": seen - gone, "v": seen - gone}
        if not self.exact:
            found |= {"k_own": seen - start, "v_own": seen - start}
        if self.compress is not None:
            far = min(self.compressed, gone // self.rate)
            found |= {"x": seen - self.raw_from(seen), "k_far": far, "v_far": far}
        return found

    def state_bytes(self, length: int) -> int:
        slots = self.slots(length)
        per_slot = self.heads * self.head_dim
        return sum(4 * n * (self.dim if key == "x" else per_slot) for key, n in slots.items()) if self.streaming else 0

    def split(self, t: Tensor) -> Tensor:
        """Projected tokens ``(N, T, heads * head_dim)`` as heads ``(N, heads, T, head_dim)``."""
        return t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        end, start = past + x.shape[1], self.begin(past)
        q = self.split(self.q_proj(x))
        own = {"k_own": self.split(self.k_proj(x)), "v_own": self.split(self.v_proj(x))}
        fixed = x.detach()
        if self.exact:
            kept = {"k": own["k_own"], "v": own["v_own"]}
        else:
            kept = {"k": self.split(self.k_proj(fixed)), "v": self.split(self.v_proj(fixed))}
        parts = {**own, **kept}
        if self.compress is not None:
            parts["x"] = fixed
        if state is not None:
            for key in parts:
                before = state[key[0] if self.exact and key.endswith("_own") else key]
                # Of an exact state the open segment is the end of the memory.
                before = before[..., before.shape[-2] - (past - start) :, :] if key.endswith("_own") else before
                parts[key] = torch.cat([before, parts[key]], -2)
        far, slots = self._far(parts, state, past, end)
        y = self.out_proj(self._read(q, parts, far, slots, past, end).transpose(1, 2).flatten(2))
        if slots is not None:
            # The compression has a gradient of zero and not none: ranks add theirs up.
            y = y + slots[:, :0].sum()
        return y, self._after(parts, far, end)

    def _far(
        self, parts: Parts, state: Parts | None, past: int, end: int
    ) -> tuple[tuple[Tensor, Tensor, int] | None, Tensor | None]:
        """Keys and values of the compressed memory and the number of their first slot; and the slots, with their gradient, of all that the segments of this piece have in their memories and let go next."""
        if self.compress is None:
            return None, None
        gone, last = self.let_go(self.begin(past)), self.begin(end)
        upto = self.let_go(last + self.segment)
        first = self.raw_from(past)
        raw = parts["x"][:, : upto - first]
        if (missing := self.compress.lead - (gone - first)) > 0:
            raw = F.pad(raw, (0, 0, missing, 0))
        N, D = raw.shape[0], raw.shape[2]
        slots = self.compress(raw if upto > gone else raw.new_zeros(N, self.compress.lead + self.rate, D))
        slots = slots[:, : (upto - gone) // self.rate]
        here = slots[:, : (self.let_go(last) - gone) // self.rate]
        made = here.detach()
        keys, values = self.split(self.k_proj(made)), self.split(self.v_proj(made))
        if state is not None:
            keys, values = torch.cat([state["k_far"], keys], 2), torch.cat([state["v_far"], values], 2)
        return (keys, values, self.let_go(last) // self.rate - keys.shape[2]), slots

    def _read(
        self,
        q: Tensor,
        parts: Parts,
        far: tuple[Tensor, Tensor, int] | None,
        slots: Tensor | None,
        past: int,
        end: int,
    ) -> Tensor:
        """What the queries of a piece read, ``(N, heads, T, head_dim)``: segments that see as many keys are one call."""
        start = self.begin(past)
        gone = self.let_go(start)
        groups: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
        for a in range(past // self.segment * self.segment, end, self.segment):
            n_far = 0 if far is None else min(self.let_go(a) // self.rate, self.compressed)
            groups[max(past - a, 0), min(end - a, self.segment), a - self.let_go(a), n_far].append(a)
        found: dict[int, Tensor] = {}
        N = q.shape[0]
        for (skip, length, n_mem, n_far), begins in groups.items():

            def taken(t: Tensor, first: int, size: int, begins: list[int] = begins) -> Tensor:
                """Of every segment ``size`` places, which for one that begins at ``a`` are ``a - first`` and so on."""
                return _stretches(t, begins[0] - first, size, self.segment, len(begins))

            queries = taken(q, past - skip, length - skip)
            keys, values = (
                torch.cat([taken(parts[c], gone + n_mem, n_mem), taken(parts[f"{c}_own"], start, length)], 2)
                for c in "kv"
            )
            if far is not None and n_far:
                at, step = self.let_go(begins[0]) // self.rate - n_far - far[2], self.segment // self.rate
                seen = [_stretches(t, at, n_far, step, len(begins)) for t in far[:2]]
                keys, values = torch.cat([seen[0], keys], 2), torch.cat([seen[1], values], 2)
            placed, terms = self.positions.terms(queries, 0, keys.shape[2] - 1)
            y = attention(placed, keys, values, Visible(None, 0), terms=terms)
            for a, part in zip(begins, y.unflatten(0, (N, -1)).unbind(1), strict=True):
                found[a] = part
            if slots is not None and self.has_own_loss and self.training and own_loss_asked():
                self._reconstruct(queries, parts, slots, gone, begins)
        return torch.cat([found[a] for a in sorted(found)], 2)

    def _reconstruct(self, q: Tensor, parts: Parts, slots: Tensor, gone: int, begins: list[int]) -> None:
        """The loss of what the queries of some segments push out of the memory."""
        old = self.let_go(begins[0] + self.segment) - self.let_go(begins[0])
        tokens = q.shape[0] * q.shape[2]
        if not old:
            add_own_loss(self, 0 * slots.sum(), tokens)
            return
        at, n = self.let_go(begins[0]) - gone, len(begins)
        with torch.no_grad():
            k, v = (_stretches(parts[c], at, old, self.segment, n) for c in "kv")
            want = cross_attention(q, k, v)
        few = old // self.rate
        new = _stretches(slots[:, None], at // self.rate, few, self.segment // self.rate, n)[:, 0]
        keys, values = (
            self.split(F.linear(new, p.weight.detach(), None if p.bias is None else p.bias.detach()))
            for p in (self.k_proj, self.v_proj)
        )
        apart = (cross_attention(q.detach(), keys, values) - want).square().mean((1, 3)).sum()
        add_own_loss(self, self.reconstruction * apart, tokens)

    def _after(self, parts: Parts, far: tuple[Tensor, Tensor, int] | None, end: int) -> Parts:
        """What later pieces read."""
        if far is not None:
            parts = {**parts, "k_far": far[0], "v_far": far[1]}
        slots = self.slots(end)
        return {key: parts[key][..., parts[key].shape[-2] - n :, :].clone() for key, n in slots.items()}


def _stretches(t: Tensor, first: int, size: int, step: int, count: int) -> Tensor:
    """``count`` stretches of ``size`` places of ``t (N, H, L, d)``, the first from ``first`` on, each ``step`` after the one before: ``(N count, H, size, d)``.

    A view of windows, whose gradient is one sum; slices one by one would each have one as long as ``t``.
    """
    whole = t[:, :, first : first + (count - 1) * step + size]
    if count == 1:
        return whole
    if size == step:
        return whole.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
    return whole.unfold(2, size, step).permute(0, 2, 1, 4, 3).flatten(0, 1)


@register_mixer(
    "transformer_xl",
    paper="Dai et al. 2019, arXiv 1901.02860",
    state="constant",
    cost="n",
    note="segments count from the document's beginning; gradient through the memory stopped, or exact=True; proved against compressive-transformer-pytorch without compressed memory, positions apart, and against XLNet's relative attention in transformers (positions)",
    survey=(("Transformer-XL", ""),),
)
class TransformerXLMemory(SegmentMemory):
    """Segments and a memory of the tokens before; options as :class:`SegmentMemory`."""

    name = "transformer_xl"

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        segment: int = 256,
        memory: int = 256,
        exact: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim, causal=causal, segment=segment, memory=memory, compressed=0, rate=1, compression="mean",
            reconstruction=0.0, exact=exact, heads=heads, head_dim=head_dim, bias=bias,
        )  # fmt: skip


@register_mixer(
    "compressive",
    paper="Rae et al. 2019, arXiv 1911.05507",
    state="constant",
    cost="n",
    note="mean, max, conv or dilated_conv, not the most-used tokens; segments count from the document's beginning; proved against compressive-transformer-pytorch, positions apart",
    survey=(("Compressive Transformer", ""),),
)
class Compressive(SegmentMemory):
    """Segments, a memory, and a compressed memory of what that lets go; options as :class:`SegmentMemory`."""

    name = "compressive"

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        segment: int = 256,
        memory: int = 256,
        compressed: int = 256,
        rate: int = 4,
        compression: str = "conv",
        reconstruction: float = 1.0,
        exact: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        if compressed < 1:
            raise ValueError(
                f"compressive: compressed must be at least 1, got {compressed}; without it is transformer_xl"
            )
        super().__init__(
            dim, causal=causal, segment=segment, memory=memory, compressed=compressed, rate=rate, compression=compression,
            reconstruction=reconstruction, exact=exact, heads=heads, head_dim=head_dim, bias=bias,
        )  # fmt: skip
