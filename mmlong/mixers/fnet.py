"""FNet: tokens mixed by a Fourier transform, without a parameter.

Follows Lee-Thorp et al. 2021 (arXiv 2105.03824): ``y = Re(F_seq F_hid x)`` (:mod:`mmlong.ops.fourier_mixing`), both transforms over the length at hand. Every output sees every token, so there is no causal form.

Departure: a sum of ``L D`` terms is ``sqrt(L D)`` times as large as its terms. The paper normalises after it has added such a layer to its input; the blocks here normalise before, and feed-forwards beside outputs in the thousands would do
nothing. So by default the transforms are unitary (``norm="ortho"``), which is the paper's divided by ``sqrt(L D)``; ``norm="backward"`` is the paper's.
"""

from __future__ import annotations

import math

from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.fourier_mixing import fourier_mixing

NORMS = ("ortho", "backward")


@register_mixer(
    "fnet",
    paper="Lee-Thorp et al. 2021, arXiv 2105.03824",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n log n",
    note="proved against transformers' FNetBasicFourierTransform; divided by sqrt(L D) unless norm='backward'",
)
class FNet(DocumentMixer):
    """Fourier mixing of tokens and channels.

    Args:
        dim: width D.
        causal: must be ``False``.
        norm: ``"ortho"`` for unitary transforms, ``"backward"`` for plain sums, as the paper has them.

    Raises:
        ValueError: an unknown norm.
    """

    def __init__(self, dim: int, *, causal: bool = False, norm: str = "ortho") -> None:
        super().__init__(dim, causal=causal)
        if norm not in NORMS:
            raise ValueError(f"fnet: unknown norm {norm!r}; use one of {', '.join(NORMS)}")
        self.norm = norm

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        scale = 1 / math.sqrt(x.shape[1] * self.dim) if self.norm == "ortho" else 1.0
        return fourier_mixing(x, scale), None
