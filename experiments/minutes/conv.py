"""Small convolutional networks: what many would begin with for sounds (on log-mel energies) and for DNA (on nucleotides).

Residual temporal convolutions with pooling between, after TC-ResNet (Choi et al. 2019, arXiv 1904.03814), where the mel bands are channels; DNA's are an embedding's, so that the first layer reads motifs as DeepBind's does (Alipanahi et al. 2015). Departures: batch norm of
the bands in front, pooling by the largest in place of strides, the recipe's head behind.

    model.class_path: mmlong.experiments.minutes.conv.LogMelTask       (or TokenConvTask)
    model.backbone: {dim: 96, depth: 0}                                the width of all layers

Padded tokens and frames are zeros before every layer, so a row's prediction does not depend on what it is batched with, in evaluation; in training batch norm sees the batch, padding included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.models import KINDS, Model
from mmlong.tasks import ClassifyTask

LAYERS, TAPS, BANDS = 3, 9, 64
WINDOW, HOP = 0.032, 0.008
"""Seconds of a window of the spectrum, and between two."""


def masked(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``(B, C, T)`` with zeros behind each row's length."""
    if lengths is None:
        return x
    return x * (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]


class Residual(nn.Module):
    """``x + norm(conv(relu(norm(conv(x)))))``, a ReLU, and the larger of two neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, TAPS, padding=TAPS // 2, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``(B, C, T)`` to ``(B, C, ceil(T / 2))``, and its lengths."""
        y = masked(F.relu(self.norms[0](self.convs[0](x))), lengths)
        y = masked(F.relu(x + self.norms[1](self.convs[1](y))), lengths)
        return F.max_pool1d(y, 2, ceil_mode=True), None if lengths is None else (lengths + 1) // 2


class ConvModel(Model):
    """Convolutions in place of a backbone; of the backbone its width and its last norm are used.

    Attributes:
        mel: on log-mel energies of a waveform; otherwise on the modality's vectors.
    """

    mel = False

    def make(self, config: dict[str, Any]) -> None:
        """Front and layers, beside modality and head."""
        super().make(config)
        width = self.num_features
        bands = self.backbone.dim_in
        if self.mel:
            from torchaudio.transforms import MelSpectrogram

            rate = int(self.modality.rate)  # type: ignore[arg-type]
            self.hop, bands = max(1, round(HOP * rate)), BANDS
            size = 1 << max(4, round(WINDOW * rate).bit_length())
            # Frames reach beyond both ends, where there is nothing, as behind a padded row.
            self.spectrum = MelSpectrogram(rate, size, round(WINDOW * rate), self.hop, n_mels=BANDS, pad_mode="constant")  # fmt: skip
        self.front = nn.BatchNorm1d(bands)
        self.first = nn.Conv1d(bands, width, TAPS, padding=TAPS // 2)
        self.layers = nn.ModuleList(Residual(width) for _ in range(LAYERS))

    def convolved(self, tokens: Tensor, layout: Layout | None) -> tuple[Tensor, Layout | None]:
        """Tokens to features ``(B, L', D)``, and their layout."""
        lengths = None if layout is None else layout.lengths
        if self.mel:
            x = torch.log(self.spectrum(tokens[..., 0]) + 1e-6)
            lengths = None if lengths is None else torch.where(lengths > 0, lengths // self.hop + 1, 0)
        else:
            x = self.modality.embed(tokens, layout).transpose(1, 2)
        x = masked(F.relu(self.first(masked(self.front(x), lengths))), lengths)
        for layer in self.layers:
            x, lengths = layer(x, lengths)
        return self.backbone.norm(x.transpose(1, 2)), None if lengths is None else Layout(lengths=lengths)

    def forward_features(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None
    ) -> tuple[Tensor, State]:
        """Tokens to features ``(B, L', D)``; no state."""
        return self.convolved(tokens, layout)[0], None

    def forward(self, tokens: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Tokens to the head's prediction; no state."""
        x, pooled = self.convolved(tokens, layout)
        return self.forward_head(x, pooled), None


class LogMelModel(ConvModel):
    """Convolutions on log-mel energies."""

    mel = True


def register() -> None:
    """Make the two kinds of model known to this process; they are none of mmlong's own."""
    for name, kind in (("token_conv", ConvModel), ("log_mel_conv", LogMelModel)):
        if name not in KINDS:
            KINDS.register(name)(kind)


class TokenConvTask(ClassifyTask):
    """:class:`~mmlong.tasks.ClassifyTask` of convolutions on a modality's vectors."""

    kind = "token_conv"

    def both_sides(self, modality: dict[str, Any], head: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """As the base's; the model is built next."""
        register()
        return super().both_sides(modality, head, info)


class LogMelTask(TokenConvTask):
    """:class:`~mmlong.tasks.ClassifyTask` of convolutions on log-mel energies of sounds of one channel."""

    kind = "log_mel_conv"
