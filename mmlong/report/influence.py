"""Who influences whom in a trained model: the Jacobian of its backbone on one sample, from gradients and not from any weights that a mixer shows.

``J_ij`` is how much input token ``j`` moves output ``i``; see :mod:`mmlong.measure.pattern`, which draws it of an untrained mixer. Outputs are asked at evenly spaced positions.
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmlong.measure.pattern import FAINTEST, Picture, seen_at
from mmlong.models import Model
from mmlong.report.elements import Markup, join, table, tag
from mmlong.report.media import data_uri

OUTPUTS = 64
SIDE = 512
"""Pixels of the picture."""
COLUMNS = 128
"""Of the picture at most; of more inputs several share one."""


@dataclass(frozen=True)
class Influence:
    """What was found.

    Attributes:
        seen: ``J`` ``(outputs, L)``.
        places: where among the inputs each output stands.
    """

    seen: Tensor
    places: list[float]

    def by_distance(self) -> list[tuple[int, int, float]]:
        """``(from, to, share)``: of what reaches an output, the share that comes from inputs so many tokens away, averaged over outputs that anything reaches."""
        squares = self.seen.square()
        total = squares.sum(1, keepdim=True)
        share = torch.where(total > 0, squares / total.clamp_min(1e-300), 0)
        share = share / max(int((total > 0).sum()), 1)
        away = (torch.arange(share.shape[1])[None] - torch.tensor(self.places)[:, None]).abs().floor().long()
        edges, found = [0, 1], []
        while edges[-1] < share.shape[1]:
            edges.append(4 * edges[-1])
        for low, high in itertools.pairwise(edges):
            part = float(share[(away >= low) & (away < high)].sum())
            found.append((low, min(high, share.shape[1]) - 1, part))
        return found


def influence_of(model: Model, raw: Tensor, length: int = 256) -> Influence:
    """The influence of the tokens of a sample on each other in the model's backbone.

    Args:
        model: trained; left as it is.
        raw: one sample ``(1, ...)``; where samples have no size of their own, its first ``length`` tokens are taken.
        length: L at most.

    Raises:
        ValueError: the modality does not take the sample.
    """
    if model.modality.tokens_per_sample() is None:
        raw = raw[..., :length]
    tokens, layout = model.encode(raw)
    heard: list[tuple[Tensor, Any, int]] = []

    def listen(_: Any, given: tuple[Any, ...], answer: tuple[Tensor, Any]) -> None:
        heard.append((given[0].detach().clone(), given[2] if len(given) > 2 else None, answer[0].shape[1]))

    training = model.training
    hook = model.backbone.register_forward_hook(
        listen
    )  # what it reads is the model's affair: shifted, begun, with codes
    try:
        with torch.no_grad():
            model.eval().forward_features(tokens, None, layout)
    finally:
        hook.remove()
        model.train(training)
    x, told, outputs = heard[0]
    count = min(outputs, OUTPUTS)
    positions = [round(i * (outputs - 1) / max(count - 1, 1)) for i in range(count)]
    scale = x.shape[1] / outputs
    return Influence(seen_at(model.backbone, x, positions, told), [(p + 0.5) * scale - 0.5 for p in positions])


def influence_figure(found: Influence, what: str) -> Markup:
    """A picture and a table.

    Args:
        found: by :func:`influence_of`.
        what: the sample was.
    """
    outputs, inputs = found.seen.shape
    each = math.ceil(inputs / COLUMNS)
    padded = torch.nn.functional.pad(found.seen.square(), (0, -inputs % each))
    seen = padded.unflatten(1, (-1, each)).sum(-1).sqrt()
    picture = data_uri(_png(Picture("", seen).shown()), ".png")
    rows = found.by_distance()
    near = max(rows, key=lambda row: row[2])
    alt = f"Matrix of {outputs} outputs by {inputs:,} inputs; most, {near[2]:.0%}, comes from {_span(*near[:2])} tokens away"
    told = (
        f"How much each token that the backbone reads (columns) moves what comes out at a place (rows), on {what}: {inputs:,} tokens, {outputs} outputs"
        f"{'' if each == 1 else f'; {each} tokens share a column'}. From gradients, averaged over random directions of the output. Dark is the largest of its row, pale a thousandth of it, white nothing."
    )
    distances = [[_span(low, high), f"{share:.1%}"] for low, high, share in rows]
    return join(
        tag("p", told), tag("img", src=picture, alt=alt, class_="whole"),
        table("How far what reaches an output has come", ["tokens away", "share"], distances),
    )  # fmt: skip


def _png(share: np.ndarray) -> bytes:
    """Shares of each row's largest value as a picture of about 512 by 512 pixels."""
    import matplotlib

    logged = 1 + np.log10(np.nan_to_num(share, nan=1.0)) / -math.log10(FAINTEST)
    colours = matplotlib.colormaps["viridis_r"](logged)
    colours[np.isnan(share)] = 1.0
    pixels = np.round(255 * colours[..., :3]).astype(np.uint8)
    rows, columns = share.shape
    file = io.BytesIO()
    size = (columns * max(SIDE // columns, 1), rows * max(SIDE // rows, 1))
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
