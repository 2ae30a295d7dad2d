"""A network of timm by name, for the parts that are made of one: the modality ``timm_patches`` and the backbone's part ``timm``."""

from __future__ import annotations

from typing import Any

from mmlong.registry import nearest


def create_timm(model: str, **options: Any) -> Any:
    """timm's network of this name, an ``nn.Module``.

    Args:
        model: e.g. ``resnet10t``, with a tag where its weights have one.
        options: what ``timm.create_model`` takes.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    import timm  # all of its models, so only where one is made

    if not timm.is_model(model.partition(".")[0]):
        raise ValueError(f"timm has no model {model!r}{nearest(model, timm.list_models())}")
    return timm.create_model(model, **options)
