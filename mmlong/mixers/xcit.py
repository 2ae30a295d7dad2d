"""XCiT's cross-covariance attention: channels attend to channels.

Follows El-Nouby et al. 2021 (arXiv 2106.09681), for every head of ``d`` channels,

    A = softmax(t K_n^T Q_n) over the channels of keys, d x d;      y = V A

with each channel of ``Q_n`` and ``K_n`` of length 1 over the sequence, and ``t`` a learned temperature a head. It is the attention alone; XCiT's blocks have a depthwise convolution beside it (local patch interaction), without which tokens
meet in ``A`` only.

All that ``A`` knows of the tokens is ``C = X^T X``, the ``D x D`` matrix of their products: ``K^T Q = W_k C W_q^T``, and the squared lengths are ``w C w^T`` of each row ``w`` of ``W_q`` and ``W_k``. And ``V A``
with the projection after it is one matrix for all tokens. So the sequence is gone over twice, and neither queries, keys nor values are ever made.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts

LEAST = 1e-12
"""What a channel's length is taken to be at least."""


@register_mixer(
    "xcit",
    paper="El-Nouby et al. 2021, arXiv 2106.09681",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="the attention alone, without the block's local patch interaction; proved against timm's XCA, weights copied; no biases",
)
class XCiT(DocumentMixer):
    """Cross-covariance attention.

    Args:
        dim: width D.
        causal: must be ``False``.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.

    Raises:
        ValueError: sizes that do not divide.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"temperature": {"weight_decay": 0.0}}

    def __init__(
        self, dim: int, *, causal: bool = False, heads: int | None = None, head_dim: int | None = None
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("xcit", dim, heads, None, head_dim)
        inner = self.heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.temperature = nn.Parameter(torch.ones(self.heads))

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            Wq, Wk, Wv = (
                p.weight.to(dtype).unflatten(0, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            Wo = self.out_proj.weight.to(dtype).unflatten(1, (self.heads, -1)).transpose(0, 1)  # (heads, D, d)
            tokens = x.to(dtype)
            C = (tokens.mT @ tokens)[:, None]  # (N, 1, D, D)
            CWq, CWk = C @ Wq.mT, C @ Wk.mT  # (N, heads, D, d)
            q_length, k_length = ((W.mT * CW).sum(-2).clamp_min(LEAST**2).sqrt() for W, CW in ((Wq, CWq), (Wk, CWk)))
            scores = (Wq @ CWk) / q_length[..., None] / k_length[..., None, :]
            A = (scores * self.temperature.to(dtype)[:, None, None]).softmax(-1)
            after = (Wo @ A @ Wv).sum(1)  # (N, D, D)
        return x @ after.mT.to(x.dtype), None
