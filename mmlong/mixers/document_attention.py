"""What softmax attention over patterns shares: projections to heads and rotary positions of whole documents.

    q, k, v = W_q x, W_k x, W_v x;      q, k turned by their positions in the document;      out = W_o y

Which keys a query sees is the subclasses'. Heads of queries may share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245). Papers of sparse patterns mostly add learned positions to the tokens, once, before the first layer; here, as in all attention of the house, positions are rotary (Su et al. 2021, arXiv
2104.09864), and ``rope=False`` leaves them to the model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.mixers.attention import head_sizes
from mmlong.mixers.document import DocumentMixer
from mmlong.ops.rotary import rotary_table, rotate


class DocumentAttention(DocumentMixer):
    """Base of attention over patterns laid out from a document's first token.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: heads H of queries; ``None`` for about one per 64 channels.
        kv_heads: heads G of keys and values, dividing ``heads``; ``None`` for as many.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        rope: turn queries and keys by their positions.
        rope_base: longest wavelength over 2 pi.
        bias: of the projections.

    Raises:
        ValueError: sizes that do not divide.

    Attributes:
        name: for errors; the class's if empty.
    """

    name: ClassVar[str] = ""

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        heads: int | None,
        kv_heads: int | None = None,
        head_dim: int | None,
        rope: bool,
        rope_base: float,
        bias: bool,
    ) -> None:
        super().__init__(dim, causal=causal)
        name = self.name or type(self).__name__
        self.heads, self.kv_heads, self.head_dim = head_sizes(name, dim, heads, kv_heads, head_dim)
        self.rope, self.rope_base = rope, rope_base
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.head_dim, dim, bias=bias)

    def turned(self, past: int, *heads: Tensor) -> list[Tensor]:
        """Heads ``(N, T, H, d)``, as many channels each, of tokens that follow ``past`` others, turned by their positions."""
        if not self.rope:
            return list(heads)
        like = heads[0]
        positions = torch.arange(past, past + like.shape[1], device=like.device)
        table = rotary_table(positions, like.shape[3], self.rope_base, like.dtype)
        return [rotate(t, table) for t in heads]

    def project(self, x: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(N, H, T, head_dim)``, keys and values ``(N, G, T, head_dim)`` of tokens ``(N, T, D)`` that follow ``past`` others."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.turned(past, q, k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def leave(self, y: Tensor) -> Tensor:
        """Heads ``(N, H, T, head_dim)`` as tokens ``(N, T, D)``."""
        # What was merged from parts is in float32, whatever the parameters are in.
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2).to(self.out_proj.weight.dtype))
        return out

    def kept_bytes(self, slots: int) -> int:
        """Of the keys and values of so many tokens, in float32."""
        return 2 * 4 * self.kv_heads * self.head_dim * slots
