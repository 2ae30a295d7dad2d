"""Nystromformer: softmax attention rebuilt from the means of a few segments, and a convolution of the values beside it.

Follows Xiong et al. 2021 (arXiv 2102.03902):

    q, k, v = W_q x, W_k x, W_v x
    y = W_o (nystrom(q, k, v) + conv(v))               (mmlong.ops.landmarks)

``conv`` has one kernel of 33 taps a head, centred, in place of what landmarks lose. A landmark is the mean over a segment of the sequence, so both sides are seen and there is no causal form. The paper has 64 landmarks for
512 tokens; since a mean commutes with a projection, those of queries and keys are made from means of the tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.cross_attention import from_heads, to_heads
from mmlong.ops.landmarks import nystrom_attention, segment_means
from mmlong.ops.toeplitz_conv import toeplitz_conv


@register_mixer(
    "nystromformer",
    paper="Xiong et al. 2021, arXiv 2102.03902",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="proved against transformers' NystromformerSelfAttention (first matrix of the iteration by each head's own norm, as the paper has it) and nystrom-attention, weights copied; "
    "segments as even as can be instead of zeros that fill them up; no biases",
)
class Nystromformer(DocumentMixer):
    """Nystrom attention with a skip by convolution.

    Args:
        dim: width D.
        causal: must be ``False``.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        landmarks: segments m. Documents of no more tokens have attention itself.
        steps: iterations of the pseudo-inverse.
        kernel_size: taps of the convolution, an odd number; ``None`` for no convolution.

    Raises:
        ValueError: sizes that do not divide, or are not at least 1; an even kernel.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        landmarks: int = 64,
        steps: int = 6,
        kernel_size: int | None = 33,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("nystromformer", dim, heads, None, head_dim)
        for option, n in (("landmarks", landmarks), ("steps", steps)):
            if n < 1:
                raise ValueError(f"nystromformer: {option} must be at least 1, got {n}")
        if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
            raise ValueError(
                f"nystromformer: kernel_size must be odd, so that a token is in the middle, got {kernel_size}"
            )
        self.landmarks, self.steps, self.kernel_size = landmarks, steps, kernel_size
        inner = self.heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        if kernel_size is not None:
            # As torch's convolutions begin.
            bound = kernel_size**-0.5
            self.conv_weight = nn.Parameter(
                nn.init.uniform_(self.out_proj.weight.new_empty(self.heads, kernel_size), -bound, bound)
            )

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        values = self.v_proj(x)
        means = segment_means(x, min(self.landmarks, x.shape[1]))
        q, k, v, q_marks, k_marks = (
            to_heads(t, self.heads)
            for t in (self.q_proj(x), self.k_proj(x), values, self.q_proj(means), self.k_proj(means))
        )
        y = from_heads(nystrom_attention(q, k, v, q_marks, k_marks, self.steps))
        if self.kernel_size is not None:
            y = y + self._neighbours(values).to(y.dtype)
        return self.out_proj(y), None

    def _neighbours(self, values: Tensor) -> Tensor:
        """The centred convolution: what a causal one gives half a kernel later."""
        half = self.conv_weight.shape[1] // 2
        dtype = torch.promote_types(values.dtype, torch.float32)
        nothing = values.new_zeros(values.shape[0], 2 * half, values.shape[2], dtype=dtype)
        # Its taps run from the oldest to the newest value, as a library's do from left to right.
        return toeplitz_conv(F.pad(values, (0, 0, 0, half)), self.conv_weight, nothing)[:, half:]
