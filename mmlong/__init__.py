"""mmlong: train models on sequences too long for a dense Transformer, all on one shared backbone.

The names below are loaded when first used, so that ``import mmlong`` (and ``mmlong --help``) does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmlong.layout import Layout
    from mmlong.mixers import create_mixer, list_mixers, register_mixer
    from mmlong.models import Model, create_model, list_models, load, load_model, register_model, save_model

_HOME = {
    "Layout": "mmlong.layout",
    "Model": "mmlong.models",
    "create_mixer": "mmlong.mixers",
    "create_model": "mmlong.models",
    "list_mixers": "mmlong.mixers",
    "list_models": "mmlong.models",
    "load": "mmlong.models",
    "load_model": "mmlong.models",
    "register_mixer": "mmlong.mixers",
    "register_model": "mmlong.models",
    "save_model": "mmlong.models",
}

__all__ = [
    "Layout",
    "Model",
    "create_mixer",
    "create_model",
    "list_mixers",
    "list_models",
    "load",
    "load_model",
    "register_mixer",
    "register_model",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    from mmlong.registry import nearest

    raise AttributeError(f"module 'mmlong' has no attribute {name!r}{nearest(name, _HOME)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
