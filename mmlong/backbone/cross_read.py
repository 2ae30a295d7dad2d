"""A set of queries reads another set, then passes a feed-forward: the block that latents are made of, and that tokens read them with.

    z = q + W_o Attention(LN(q), LN(x));      y = z + MLP(LN(z))

(Jaegle et al. 2021, arXiv 2107.14795, section 3.1 and figure 6). Queries and what is read have norms of their own. Without ``residual`` the first line has no ``q +``, for queries that say where and not what. Keys and values may have widths of their own.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmlong.backbone.feedforward import create_ffn
from mmlong.mixers.attention import head_sizes
from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads
from mmlong.ops.rotary import rotary_table, rotate


class CrossRead(nn.Module):
    """The block.

    Args:
        dim: width of the queries, and of what comes out.
        source: width of what is read.
        heads: ``None`` for about one per 64 channels.
        ratio: hidden width of the feed-forward over ``dim``.
        residual: queries are added to what they read.
        qk_dim: width of queries and keys, of all heads together; ``None``: ``dim``.
        v_dim: width of values; ``None``: ``dim``.

    Raises:
        ValueError: heads that do not divide the widths.
    """

    def __init__(
        self,
        dim: int,
        source: int,
        heads: int | None = None,
        ratio: float = 1.0,
        residual: bool = True,
        qk_dim: int | None = None,
        v_dim: int | None = None,
    ) -> None:
        super().__init__()
        qk_dim, v_dim = qk_dim or dim, v_dim or dim
        self.heads, _, self.head_dim = head_sizes("cross attention", qk_dim, heads, None, None)
        if v_dim % self.heads:
            raise ValueError(f"cross attention: values of {v_dim} channels do not divide into {self.heads} heads")
        self.residual = residual
        self.norm_queries, self.norm_source, self.norm = nn.LayerNorm(dim), nn.LayerNorm(source), nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(a, b) for a, b in ((dim, qk_dim), (source, qk_dim), (source, v_dim))
        )
        self.out_proj = nn.Linear(v_dim, dim)
        self.ffn = create_ffn("mlp", dim, ratio)

    def forward(
        self, q: Tensor, x: Tensor, valid: Tensor | None = None, places: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """``(B, N, dim)`` reads ``(B, L, source)``.

        Args:
            q: queries.
            x: what is read, finite throughout.
            valid: bool ``(B, L)``, what of it counts; ``None`` for all.
            places: positions of the queries ``(N,)`` and of what is read ``(L,)``, by which both are turned (RoPE); ``None`` for none.
        """
        asked, known = self.norm_queries(q), self.norm_source(x)
        q_heads, k, v = (
            to_heads(p(t), self.heads) for p, t in ((self.q_proj, asked), (self.k_proj, known), (self.v_proj, known))
        )
        if places is not None:
            q_heads, k = (
                rotate(t.transpose(1, 2), rotary_table(at, self.head_dim, 10000.0, t.dtype)).transpose(1, 2)
                for t, at in zip((q_heads, k), places, strict=True)
            )
        z = self.out_proj(from_heads(cross_attention(q_heads, k, v, valid=valid)))
        z = q + z if self.residual else z
        assert self.ffn is not None
        return z + self.ffn(self.norm(z))
