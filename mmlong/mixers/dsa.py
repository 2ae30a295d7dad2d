"""DeepSeek Sparse Attention: a small indexer scores every past token, and attention is over the best of them, the same for all heads.

Follows DeepSeek-AI 2025 (the report of DeepSeek-V3.2, arXiv 2512.02556), section 2.1, with 2,048 tokens selected. For query ``t`` and past token ``s``:

    I_ts = sum_j w_tj ReLU(q^I_tj . k^I_s)                                    one index key for all heads j of the indexer
    T_t  = the topk largest of I_ts, s <= t                                   of equals the first
    y_t  = softmax over T_t

No gradient goes through the selection: ``y`` teaches the indexer nothing (its parameters get zeros), and the indexer's input is cut from the rest of the model. What teaches it is a loss of its own, :meth:`DSA.indexer_loss`, the divergence ``KL(p_t || softmax(I_t))`` from the
attention of all heads together, over all of the past in a dense warm-up and over ``T_t`` after that. The tasks of the house ask for it (:mod:`mmlong.mixers.own_loss`) and add it, times ``index_loss``, averaged over tokens; in a loop of your own do the same, or the indexer stays as it was drawn.

Departures: the report selects for MLA, whose heads share one latent key; here attention has grouped keys and values. The warm-up's dense main attention is a matter of ``topk`` at least the length. Queries and keys of the indexer are turned by their positions
like those of the attention, and ``w`` is scaled by ``(heads head_dim)^(-1/2)`` of the indexer, as in the released code; its layer norm, Hadamard transform and 8-bit numbers are left out.

Every token is scored, so the work is quadratic; a few queries are taken at a time, so memory is linear (:mod:`mmlong.ops.best_keys`). The state is the keys and values so far, and the index keys ``k_index (B, S, D)``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked
from mmlong.mixers.selecting import SelectingAttention, so_far
from mmlong.ops.best_keys import Index, best_keys_attention, indexer_loss


@register_mixer(
    "dsa",
    paper="DeepSeek-AI 2025, arXiv 2512.02556",
    state="growing",
    cost="n^2",
    note="on grouped keys and values, not MLA; the indexer is trained by a loss of its own (index_loss, index_dense), the outputs pass it zeros; proved against flash-linear-attention's naive_dsa",
)
class DSA(SelectingAttention):
    """DeepSeek Sparse Attention; options but these as :class:`~mmlong.mixers.selecting.SelectingAttention`.

    Args:
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        topk: tokens that a query attends to.
        index_heads: heads of the indexer.
        index_dim: channels of each; ``None`` for ``head_dim``.
        index_loss: weight of the loss that teaches the indexer; 0 for none.
        index_dense: that loss is over all of the past (the warm-up), and not over the tokens selected.

    Raises:
        ValueError: sizes that do not divide, or fewer than one; a negative weight.
    """

    name: ClassVar[str] = "dsa"

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        topk: int = 2048,
        index_heads: int = 4,
        index_dim: int | None = None,
        index_loss: float = 1.0,
        index_dense: bool = False,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            causal=causal,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            rope_base=rope_base,
            bias=bias,
        )
        index_dim = self.head_dim if index_dim is None else index_dim
        for option, n in (("topk", topk), ("index_heads", index_heads), ("index_dim", index_dim)):
            if n < 1:
                raise ValueError(f"dsa: {option} must be at least 1, got {n}")
        if not index_loss >= 0:
            raise ValueError(f"dsa: index_loss must be at least 0, got {index_loss}")
        self.topk, self.index_heads, self.index_dim = topk, index_heads, index_dim
        self.index_loss, self.index_dense = index_loss, index_dense
        self.index_q_proj = nn.Linear(dim, index_heads * index_dim, bias=bias)
        self.index_k_proj = nn.Linear(dim, index_dim, bias=bias)
        self.index_w_proj = nn.Linear(dim, index_heads, bias=bias)

    @property
    def has_own_loss(self) -> bool:
        return self.index_loss > 0

    def slots(self, seen: int) -> dict[str, int]:
        return {**super().slots(seen), "k_index": seen}

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) + (4 * self.index_dim * length if self.streaming else 0)

    def index(self, x: Tensor, state: Parts | None, past: int) -> Index:
        """What the indexer looks at, of a piece and all keys so far."""
        queries = self.turned(past, self.index_q_proj(x).unflatten(-1, (self.index_heads, -1)))[0]
        keys = self.turned(past, self.index_k_proj(x)[:, :, None])[0][:, :, 0]
        weights = self.index_w_proj(x) * (self.index_heads * self.index_dim) ** -0.5
        return Index(queries, so_far(state, {"k_index": keys})[0], weights)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        q, k, v = self.project_all(x, state, past)
        taught = self.has_own_loss and self.training and own_loss_asked()
        # Its loss teaches it alone: not ``x``, nor, by keys that a later piece finds in the state, what came before.
        index = self.index(x.detach() if taught else x, state, past)
        if taught:
            kept, tokens = None if self.index_dense else self.topk, x.shape[0] * x.shape[1]
            divergence = indexer_loss(q, k, index, kept)
            add_own_loss(self, self.index_loss * tokens * divergence, tokens)
        y = self.leave(best_keys_attention(q, k, v, self.topk, causal=True, index=index))
        return y, {"k": k, "v": v, "k_index": index.keys}

    def indexer_loss(self, x: Tensor, *, dense: bool = False) -> Tensor:
        """What trains the indexer, and nothing else: no gradient goes to ``x`` or to the attention's parameters.

        Args:
            x: tokens ``(B, L, D)`` as the mixer was given, full rows from the beginning of their documents.
            dense: against attention over all of the past (the warm-up), instead of over the tokens selected.

        Returns:
            the mean of ``KL(p_t || softmax(I_t))`` over all tokens, a scalar.
        """
        x = x.detach()
        with torch.no_grad():
            q, k, _ = self.project(x)
        return indexer_loss(q, k, self.index(x, None, 0), None if dense else self.topk)
