"""Models by name, as timm has them: a function from a few options to a whole configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmlong.models.model import Config, Model, build_model
from mmlong.registry import Registry

MODELS: Registry[Callable[..., Config]] = Registry("model", group="mmlong.models")
"""Names to functions that return a model configuration."""


def register_model(name: str) -> Callable[[Callable[..., Config]], Callable[..., Config]]:
    """Decorator for a function that returns a model configuration; its keywords are what ``create_model`` takes."""
    return MODELS.register(name)


def create_model(name: str, **options: Any) -> Model:
    """A named model, e.g. ``create_model("pixel_pyramid", size=[64, 64], num_classes=10)``."""
    return build_model(MODELS.create(name, **options))


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` knows."""
    return MODELS.names(pattern)


@register_model("pixel_pyramid")
def pixel_pyramid(
    size: list[int] | tuple[int, int] = (256, 256),
    channels: int = 1,
    num_classes: int = 2,
    dim: tuple[int, ...] | list[int] = (16, 48, 96),
    depth: tuple[int, ...] | list[int] = (1, 1, 4),
    pool: tuple[int, ...] | list[int] = (4, 4),
    mixers: tuple[str, ...] | list[Any] = ("mamba2",),
    direction: str = "alternate",
    head: str = "readout",
) -> Config:
    """Every pixel a token of the first stage, in Morton order; 2x2 blocks merge between stages. What ``image/cells256`` trains."""
    return {
        "modality": {"name": "image", "size": list(size), "channels": channels, "order": "morton"},
        "backbone": {
            "dim": list(dim),
            "depth": list(depth),
            "pool": list(pool),
            "mixers": list(mixers),
            "direction": direction,
        },
        "head": {"name": head, "num_classes": num_classes},
    }


@register_model("pixel_sequence")
def pixel_sequence(
    size: list[int] | tuple[int, int] = (28, 28),
    channels: int = 1,
    num_classes: int = 10,
    dim: int = 64,
    depth: int = 4,
    mixers: tuple[str, ...] | list[Any] = ("mamba2",),
    direction: str = "alternate",
    order: str = "raster",
) -> Config:
    """One width and one length throughout: the plain sequence model of pixels in raster order. What ``image/mnist784`` trains."""
    return {
        "modality": {"name": "image", "size": list(size), "channels": channels, "order": order},
        "backbone": {"dim": dim, "depth": depth, "mixers": list(mixers), "direction": direction},
        "head": {"name": "classify", "num_classes": num_classes},
    }
