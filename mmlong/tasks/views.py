"""Views of raw tensors for contrastive learning: changes after which a thing is still the same thing, drawn anew for each row.

A view is written ``name`` or ``name:amount`` in a config. What there is depends on the kind of raw data, as its modality declares it:

======= ========= ====== ==========================================================================================================
kind    name      amount what it does
======= ========= ====== ==========================================================================================================
image   crop      0.3    a random rectangle of at least this share of the area, stretched to the whole (as SimCLR's)
image   flip             left and right exchanged, half the time
image   light     0.4    contrast scaled and brightness moved, each by up to this share
image   noise     8      Gaussian noise of this many levels
audio   crop      0.5    a random stretch of at least this share of the length; the row becomes so much shorter
audio   gain      6      louder or softer by up to so many decibels
audio   polarity         upside down, half the time
audio   noise     0.1    Gaussian noise of this share of the row's own root mean square
genome  crop      0.5    as for audio
text    crop      0.5    as for audio
======= ========= ====== ==========================================================================================================

Pure functions of the raw tensors and of the generators, one a row (or one that all rows draw from in turn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.registry import nearest

Viewed = tuple[Tensor, Tensor | None]
Generators = Sequence[torch.Generator]
View = Callable[[Tensor, Tensor | None, float, Generators], Viewed]
"""``raw, lengths = view(raw, lengths, amount, generators)``."""

VIEWS: dict[str, dict[str, tuple[View, float]]] = {}
"""Kind of raw data to name to the view and its amount unless told."""
DEFAULT_VIEWS = {
    "image": ("crop", "flip", "light", "noise"),
    "audio": ("crop", "gain", "polarity", "noise"),
    "genome": ("crop",),
    "text": ("crop",),
}


def register_view(kind: str, name: str, amount: float = 0.0) -> Callable[[View], View]:
    """Decorator that names a view of one kind of raw data (:attr:`mmlong.modalities.Modality.kind`), with its amount unless told."""

    def add(view: View) -> View:
        VIEWS.setdefault(kind, {})[name] = (view, amount)
        return view

    return add


def uniform(generators: Generators, count: int, like: Tensor) -> Tensor:
    """``(B, count)`` numbers from 0 to 1, a row from each generator, where ``like`` is."""
    return torch.stack([torch.rand(count, generator=g) for g in generators]).to(like.device)


def normal(generators: Generators, like: Tensor) -> Tensor:
    """Normal numbers of the shape of ``like``, a row from each generator."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like.device)


def _levels(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` to ``(B, 1, ...)``, to go with ``like``."""
    return values.view(-1, *([1] * (like.ndim - 1)))


@register_view("image", "crop", 0.3)
def crop_image(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """A random rectangle, its sides in a ratio between 3/4 and 4/3, sampled bilinearly."""
    area, ratio, down, right = uniform(generators, 4, raw).unbind(1)
    area, ratio = amount + (1 - amount) * area, torch.exp((2 * ratio - 1) * math.log(4 / 3))
    height, width = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    # In grid_sample's coordinates, -1 to 1: where the rectangle's middle may lie so that it stays inside.
    y, x = (2 * down - 1) * (1 - height), (2 * right - 1) * (1 - width)
    zero = torch.zeros_like(x)
    matrix = torch.stack([torch.stack([width, zero, x], -1), torch.stack([zero, height, y], -1)], 1)
    grid = F.affine_grid(matrix, list(raw.shape), align_corners=False)
    return _levels(F.grid_sample(raw.float(), grid, padding_mode="border", align_corners=False)), lengths


@register_view("image", "flip")
def flip_image(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """Left and right exchanged, half the time."""
    return torch.where(_rows(uniform(generators, 1, raw)[:, 0] < 0.5, raw), raw.flip(-1), raw), lengths


@register_view("image", "light", 0.4)
def light_image(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """Distance from the mean scaled, the mean moved."""
    scale, shift = (_rows(amount * (2 * u - 1), raw) for u in uniform(generators, 2, raw).unbind(1))
    mean = raw.float().mean((1, 2, 3), keepdim=True)
    return _levels(mean * (1 + shift) + (raw - mean) * (1 + scale)), lengths


@register_view("image", "noise", 8.0)
def noise_image(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """Independent noise on every number."""
    return _levels(raw + amount * normal(generators, raw)), lengths


@register_view("audio", "crop", 0.5)
@register_view("genome", "crop", 0.5)
@register_view("text", "crop", 0.5)
def crop_stretch(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """A random stretch, moved to the row's beginning; what follows is padding (0)."""
    full = torch.full((raw.shape[0],), raw.shape[-1], device=raw.device) if lengths is None else lengths
    share, where = uniform(generators, 2, raw).unbind(1)
    kept = ((amount + (1 - amount) * share) * full).round().long().clamp_min(1).minimum(full)
    start = (where * (full - kept + 1)).long().minimum(full - kept)
    here = torch.arange(raw.shape[-1], device=raw.device)
    index = (start[:, None] + here).clamp_max(raw.shape[-1] - 1)
    inside = here < kept[:, None]
    if raw.ndim == 3:
        index, inside = index[:, None].expand_as(raw), inside[:, None]
    return torch.where(inside, raw.gather(-1, index), 0), kept


@register_view("audio", "gain", 6.0)
def gain_audio(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """Louder or softer."""
    decibels = amount * (2 * uniform(generators, 1, raw)[:, 0] - 1)
    return raw * _rows(10 ** (decibels / 20), raw), lengths


@register_view("audio", "polarity")
def polarity_audio(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """Upside down, half the time."""
    return raw * _rows(torch.where(uniform(generators, 1, raw)[:, 0] < 0.5, -1.0, 1.0), raw), lengths


@register_view("audio", "noise", 0.1)
def noise_audio(raw: Tensor, lengths: Tensor | None, amount: float, generators: Generators) -> Viewed:
    """Noise as loud as the row asks for, none at padding."""
    valid = torch.ones_like(raw)
    if lengths is not None:
        valid = (torch.arange(raw.shape[-1], device=raw.device) < lengths[:, None]).to(raw.dtype)
        valid = valid[:, None] if raw.ndim == 3 else valid
    axes = tuple(range(1, raw.ndim))
    count = valid.expand_as(raw).sum(axes, keepdim=True).clamp_min(1)
    loudness = ((raw * valid).square().sum(axes, keepdim=True) / count).sqrt()
    return raw + amount * loudness * valid * normal(generators, raw), lengths


class Views:
    """The views of a config, in their order.

    Args:
        kind: of the raw data.
        names: e.g. ``["crop:0.5", "flip"]``; ``None`` for the kind's usual ones.

    Raises:
        ValueError: a kind without views, or a name or amount that is none (the nearest name is suggested).
    """

    def __init__(self, kind: str, names: Sequence[str] | None = None) -> None:
        known = VIEWS.get(kind, {})
        if not known:
            raise ValueError(
                f"there are no views of {kind or 'this kind of data'}; there are of {', '.join(VIEWS)}. Add some with register_view, or let the data give raw2"
            )
        self.names = tuple(DEFAULT_VIEWS.get(kind, known) if names is None else names)
        self._views: list[tuple[View, float]] = []
        for item in self.names:
            name, _, written = item.partition(":")
            if name not in known:
                raise ValueError(
                    f"model.views: {kind} has no view {name!r}{nearest(name, known)}; it has: {', '.join(known)}"
                )
            view, amount = known[name]
            if written:
                try:
                    amount = float(written)
                except ValueError:
                    raise ValueError(f"model.views: {item!r}: the amount {written!r} is not a number") from None
                if not 0 <= amount < math.inf or (name == "crop" and not 0 < amount <= 1):
                    raise ValueError(f"model.views: {item!r}: the amount is out of range")
            self._views.append((view, amount))

    def __call__(self, raw: Tensor, lengths: Tensor | None, generators: Generators) -> Viewed:
        """One view of each row.

        Args:
            raw: a batch.
            lengths: int64 ``(B,)`` or ``None``.
            generators: one a row, on the CPU.

        Returns:
            ``(raw, lengths)``, of the same shape.
        """
        for view, amount in self._views:
            raw, lengths = view(raw, lengths, amount, generators)
        return raw, lengths
