"""Block-recurrent attention: a window for the tokens, and a set of state vectors that is updated once a block, each attending to itself and to the other.

Follows Hutchins et al. 2022, "Block-Recurrent Transformers" (arXiv 2203.07852). Tokens come in blocks of ``window``; ``C`` are ``states`` vectors, learned at first. Keys and values are made once, of tokens ``k, v`` and of states ``k', v'`` (of ``norm(C) + ids``, learned, which tell
states apart), and queries four times:

    down     a token:   y = W_o [ attn(q_1, window of k, v) ; attn(q_2, k', v') ]            a window of ``window`` tokens before its own, and the states as the last block left them
    across   a state:   h = W_h [ attn(q_3, k', v') ; attn(q_4, k, v of the block) ]         once the block is complete
    fixed    C <- g C + (1 - g) (h + b),   g = sigmoid(b_g), a vector
    lstm     C <- sigmoid(W_f h + b_f + 1) C + sigmoid(W_i h + b_i - 1) tanh(W_z h + b_z)

Departures: positions are rotary in the window (``rope=False``: none), where the paper has T5's; the feed-forward of the state's direction, which the paper's best form leaves out, is left out. Blocks count from the document's first token, so that pieces of any length give the same
result. The paper has one such layer in twelve. The state is ``C``, and keys (not turned) and values of the last ``window`` tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.mixers.selecting import so_far
from mmlong.ops.attention import attention
from mmlong.ops.cross_attention import cross_attention
from mmlong.ops.visible import Visible

GATES = ("fixed", "lstm")


@register_mixer(
    "block_recurrent",
    paper="Hutchins et al. 2022, arXiv 2203.07852",
    state="constant",
    cost="n",
    note="fixed or lstm gate, no feed-forward across; RoPE in the window (rope=False: none); blocks count from the document's beginning; held against block-recurrent-transformer-pytorch, weights copied (fixed gate, its window made to slide), the lstm gate against its definition in float64",
)
class BlockRecurrent(DocumentAttention):
    """A window and recurrent state vectors.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        window: tokens of a block, and tokens before its own that a token sees.
        states: state vectors; the paper has 512, and windows of 512.
        gate: ``fixed`` or ``lstm``.
        heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not divide or are below 1, or an unknown gate.
    """

    name: ClassVar[str] = "block_recurrent"
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "first": {"weight_decay": 0.0},
        "ids": {"weight_decay": 0.0},
        "decay": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        window: int = 256,
        states: int = 256,
        gate: str = "fixed",
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        if window < 1 or states < 1:
            raise ValueError(f"block_recurrent: window and states must be at least 1, got {window} and {states}")
        if gate not in GATES:
            raise ValueError(f"block_recurrent: gate is one of {', '.join(GATES)}, got {gate!r}")
        self.window, self.gate = window, gate
        inner = self.heads * self.head_dim
        self.out_proj = nn.Linear(2 * inner, dim, bias=bias)
        # Of tokens to states; of states to states, and to tokens.
        self.q_states, self.q_across, self.q_tokens = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.k_states, self.v_states = (nn.Linear(dim, inner, bias=bias) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.first = nn.Parameter(0.02 * torch.randn(states, dim))
        self.ids = nn.Parameter(0.02 * torch.randn(states, dim))
        self.across = nn.Linear(2 * inner, dim if gate == "fixed" else 3 * dim)
        if gate == "fixed":
            self.decay = nn.Parameter(torch.randn(dim))

    def slots(self, seen: int) -> dict[str, int]:
        # The open block is part of them.
        n = min(seen, self.window)
        return {"k": n, "v": n}

    def state_bytes(self, length: int) -> int:
        memory = 4 * self.first.numel()
        return self.kept_bytes(self.slots(length)["k"]) + memory if self.streaming else 0

    def heads_of(self, proj: nn.Module, x: Tensor) -> Tensor:
        """Projected ``(N, T, D)`` as heads ``(N, H, T, head_dim)``."""
        found: Tensor = proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return found

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        W, end = self.window, past + x.shape[1]
        memory = self.first.expand(x.shape[0], -1, -1) if state is None else state["memory"]
        k, v = so_far(state, {"k": self.heads_of(self.k_proj, x), "v": self.heads_of(self.v_proj, x)})
        begin = end - k.shape[2]
        q, asks = self.heads_of(self.q_proj, x), self.heads_of(self.q_states, x)
        turned_q, turned_k = (
            self.turned(at, t.transpose(1, 2))[0].transpose(1, 2) for at, t in ((past, q), (begin, k))
        )
        near = attention(turned_q, turned_k, v, Visible(W, 0))
        far: list[Tensor] = []
        begins = range(past // W * W, end, W)
        # Split, and not sliced one by one, whose gradients would each be as long as the piece.
        queries = asks.split([min(a + W, end) - max(a, past) for a in begins], 2)
        sizes = [begins[0] - begin, *(min(a + W, end) - a for a in begins)]
        parts = zip(begins, queries, k.split(sizes, 2)[1:], v.split(sizes, 2)[1:], strict=True)
        for a, asked, block_k, block_v in parts:
            known = (self.norm(memory) + self.ids).to(x.dtype)
            keys, values = self.heads_of(self.k_states, known), self.heads_of(self.v_states, known)
            far.append(cross_attention(asked, keys, values))
            if a + W <= end:
                itself = cross_attention(self.heads_of(self.q_across, known), keys, values)
                tokens = cross_attention(self.heads_of(self.q_tokens, known), block_k, block_v)
                memory = self._updated(memory, self._together(itself, tokens))
        y = self.out_proj(self._together(near, far[0] if len(far) == 1 else torch.cat(far, 2)))
        n = self.slots(end)["k"]
        kept = {"k": k[:, :, k.shape[2] - n :].clone(), "v": v[:, :, v.shape[2] - n :].clone()}
        return y, {**kept, "memory": memory}

    def _together(self, *heads: Tensor) -> Tensor:
        """Heads ``(N, H, T, head_dim)`` side by side, ``(N, T, ..)``."""
        return torch.cat([t.transpose(1, 2).flatten(2) for t in heads], -1).to(self.out_proj.weight.dtype)

    def _updated(self, memory: Tensor, h: Tensor) -> Tensor:
        found = self.across(h)
        with torch.autocast(memory.device.type, enabled=False):
            found = found.to(memory.dtype)
            if self.gate == "fixed":
                return torch.lerp(found, memory, torch.sigmoid(self.decay).to(memory.dtype))
            keep, write, new = found.chunk(3, -1)
            return torch.sigmoid(keep + 1) * memory + torch.sigmoid(write - 1) * torch.tanh(new)
