"""The token-mixing MLP of MLP-Mixer.

Follows Tolstikhin et al. 2021 (arXiv 2105.01601), without the norm and the residual around it, which are the block's. Every channel by itself, over positions:

    y = W_2 gelu(W_1 x + b_1) + b_2,      W_1 (hidden, n),  W_2 (n, hidden),  the same for all channels

``n`` is the longest document, ``max_length``; a shorter one uses the first columns of ``W_1`` and the first rows of ``W_2``, as if zeros followed it. A hidden unit sees all positions, so there is no causal form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts


@register_mixer(
    "mixer_mlp",
    paper="Tolstikhin et al. 2021, arXiv 2105.01601",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="documents up to max_length; proved against the token MLP of timm's MixerBlock, weights copied",
)
class MixerMLP(DocumentMixer):
    """A two-layer MLP over tokens.

    Args:
        dim: width D.
        causal: must be ``False``.
        hidden: units of the MLP; ``None`` for ``dim / 2``, at least 1.
        max_length: tokens n of the longest document; there are ``2 n hidden`` parameters.

    Raises:
        ValueError: sizes below 1; in a call, a document longer than ``max_length``.
    """

    def __init__(self, dim: int, *, causal: bool = False, hidden: int | None = None, max_length: int = 4096) -> None:
        super().__init__(dim, causal=causal)
        hidden = max(1, dim // 2) if hidden is None else hidden
        for option, n in (("hidden", hidden), ("max_length", max_length)):
            if n < 1:
                raise ValueError(f"mixer_mlp: {option} must be at least 1, got {n}")
        self.hidden, self.max_length = hidden, max_length
        self.fc1 = nn.Linear(max_length, hidden)
        self.fc2 = nn.Linear(hidden, max_length)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        T = x.shape[1]
        if self.max_length < T:
            raise ValueError(
                f"mixer_mlp: a document of {T:,} tokens, but its matrices have max_length={self.max_length:,} columns: build it with a "
                "larger max_length, or cut the document"
            )
        # Products from the left: tokens stay where they are in memory.
        units = F.gelu(torch.matmul(self.fc1.weight[:, :T], x) + self.fc1.bias[:, None])
        return torch.matmul(self.fc2.weight[:T], units) + self.fc2.bias[:T, None], None
