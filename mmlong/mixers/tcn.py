"""TCN: a stack of gated dilated convolutions, the baseline of all that followed on raw audio.

Follows van den Oord, Dieleman, Zen, Simonyan, Vinyals, Graves, Kalchbrenner, Senior & Kavukcuoglu 2016, "WaveNet" (arXiv 1609.03499), section 2; that such stacks, with any kernel size, hold their own
against recurrent networks is Bai, Kolter & Koltun 2018, "temporal convolutional networks" (arXiv 1803.01271). With ``h^0 = W_in x + b``, ``C`` channels wide, for layers ``i`` of dilation ``d_i``:

    f_t, g_t = sum_{j=0..k-1} W_j^i h^i_{t - j d_i} + b^i;      z^i = tanh(f) * sigmoid(g)
    h^{i+1} = h^i + W_res^i z^i + b;                            out = W_out relu(sum_i W_skip^i z^i + b)

Built for both sides, taps lie at ``(j - (k-1)/2) d_i``. The state is the last ``(k - 1) d_i`` inputs of every layer; nothing further back than ``(k - 1) sum_i d_i`` tokens is seen. Departures: the first
convolution is pointwise (a token of a backbone is no raw sample), one pointwise layer follows the skips, not two, and it has no bias; the last layer, whose sum nobody reads, has no residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, linear
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.state import State
from mmlong.mixers.weights import named_weights
from mmlong.ops.tails import tail_after

DILATIONS = tuple(1 << i for i in range(10))
"""One of WaveNet's stacks: 1, 2, 4, ..., 512."""


@register_mixer(
    "tcn",
    paper="van den Oord et al. 2016, arXiv 1609.03499",
    bidirectional=True,
    note="a baseline: one stack of WaveNet's layers, pointwise before and after; proved against torch's dilated conv1d in float64",
)
class TCN(CellMixer):
    """WaveNet's gated dilated convolutions, with residuals and skips.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        channels: C, of the residual stream; ``None`` for ``dim / 4``.
        dilations: of the layers, one after another.
        kernel_size: taps k of a layer; ``None`` for 2, or 3 on both sides.

    Raises:
        ValueError: no layer, a dilation or width below 1, a kernel size below 2, or an even one on both sides.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        channels: int | None = None,
        dilations: Sequence[int] = DILATIONS,
        kernel_size: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        C = max(1, dim // 4) if channels is None else channels
        k = (2 if causal else 3) if kernel_size is None else kernel_size
        if C < 1:
            raise ValueError(f"tcn: channels must be at least 1, got {C}")
        if not dilations or min(dilations) < 1:
            raise ValueError(f"tcn: dilations must be one or more numbers of at least 1, got {tuple(dilations)}")
        if k < 2 or (not causal and k % 2 == 0):
            least = "at least 2" if causal else "odd and at least 3, to see both sides alike"
            raise ValueError(f"tcn: kernel_size must be {least}, got {k}")
        self.channels, self.dilations, self.kernel_size = C, tuple(dilations), k
        n = len(self.dilations)
        self.in_proj = nn.Linear(dim, C)
        # Taps side by side, the one furthest back (or to the left) first.
        self.layers = nn.ModuleList(nn.Linear(k * C, 2 * C) for _ in range(n))
        self.residuals = nn.ModuleList(nn.Linear(C, C) for _ in range(n - 1))
        self.skip_proj = nn.Linear(n * C, dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = n * (k + 6) * C + 2 * dim

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"layer{i}": ((self.kernel_size - 1) * d, self.channels) for i, d in enumerate(self.dilations)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        documents = None if layout is None else layout.documents()
        h = linear(x, w, "in_proj")
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        gated, after = [], {}
        for i, (name, tail) in enumerate(state.items()):
            after[name] = tail_after(h, tail, layout)
            h, z = self._layer(i, h, tail, documents, w)
            gated.append(z)
        return F.relu(linear(torch.cat(gated, -1), w, "skip_proj")), after

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        if self.causal:
            return super().mix(x, state, layout)
        w: Tensors = named_weights(self)
        documents = None if layout is None else layout.documents()
        valid = None if layout is None else layout.valid(x.shape[1])
        if valid is not None:
            # What is padding is a document of its own.
            documents = torch.where(valid, 0 if documents is None else documents, -1)
        layer = self._layer
        if not torch.compiler.is_compiling():
            layer = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
        h = linear(x, w, "in_proj")
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        gated = []
        for i in range(len(self.dilations)):
            h, z = layer(i, h, None, documents, w)
            gated.append(z)
        return self.out_proj(F.relu(linear(torch.cat(gated, -1), w, "skip_proj"))), None

    def _layer(
        self, i: int, h: Tensor, tail: Tensor | None, documents: Tensor | None, w: Tensors
    ) -> tuple[Tensor, Tensor]:
        """What the next layer takes, and the gated output: ``documents (B, L)`` tells which tokens see each other."""
        k, L = self.kernel_size, h.shape[1]
        reach = (k - 1) * self.dilations[i]
        left = reach if tail is not None else reach // 2
        right = reach - left
        padded = F.pad(h, (0, 0, left, right)) if tail is None else torch.cat([tail, h], 1)
        places = [slice(j * self.dilations[i], j * self.dilations[i] + L) for j in range(k)]
        taps = [padded[:, place] for place in places]
        if documents is not None:
            around = F.pad(documents, (left, right))
            taps = [
                tap if place.start == left else torch.where((around[:, place] == documents)[..., None], tap, 0)
                for tap, place in zip(taps, places, strict=True)
            ]
        f, g = linear(torch.cat(taps, -1), w, f"layers.{i}").chunk(2, -1)
        z = torch.tanh(f) * torch.sigmoid(g)
        return h + linear(z, w, f"residuals.{i}") if i < len(self.residuals) else h, z
