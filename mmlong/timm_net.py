"""A network of timm by name, for the parts that are made of one: the modality ``timm_patches`` and the backbone's part ``timm``."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from mmlong.registry import nearest


def create_timm(model: str, **options: Any) -> nn.Module:
    """timm's network of this name.

    Args:
        model: e.g. ``resnet10t``, with a tag where its weights have one.
        options: what ``timm.create_model`` takes.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if not timm.is_model(model.partition(".")[0]):
        raise ValueError(f"timm has no model {model!r}{nearest(model, timm.list_models())}")
    made: nn.Module = timm.create_model(model, **options)
    return made
