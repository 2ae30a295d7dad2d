"""The contract of a modality: how raw tensors of one kind become a sequence and come back.

    tokens, layout = modality.encode(raw)      raw tensors to tokens (B, L, C) or integer codes (B, L), and what the positions are
    x = modality.embed(tokens, layout)         tokens to vectors (B, L, D) for the backbone; holds the parameters
    raw = modality.decode(tokens, layout)      the exact inverse of encode

A modality knows tensors and nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.registry import Registry


class Modality(nn.Module):
    """Base of every modality.

    Args:
        dim: width D that :meth:`embed` makes.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def encode(self, raw: Tensor) -> tuple[Tensor, Layout]:
        """Raw tensors to tokens and their layout."""
        raise TypeError(f"{type(self).__name__} does not define encode(raw)")

    def decode(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Tokens back to raw tensors."""
        raise TypeError(f"{type(self).__name__} does not define decode(tokens, layout)")

    def embed(self, tokens: Tensor, layout: Layout | None) -> Tensor:
        """Tokens to ``(B, L, D)``."""
        raise TypeError(f"{type(self).__name__} does not define embed(tokens, layout)")

    def tokens_per_sample(self) -> int | None:
        """L, where every sample has the same; else ``None``."""
        return None


MODALITIES: Registry[type[Modality]] = Registry("modality", group="mmlong.modalities")


def register_modality(name: str) -> Callable[[type[Modality]], type[Modality]]:
    """Class decorator that names a modality."""
    return MODALITIES.register(name)


def create_modality(name: str, dim: int, **options: Any) -> Modality:
    """A registered modality by name; an unknown name or option is answered with the nearest."""
    return MODALITIES.create(name, dim, **options)
