"""What is compared: attention to a window or segment of 64 tokens, and the same with each memory round it; and two that have one state for everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

from mmlong.diagnose import Setting
from mmlong.diagnose.cell import ProbeModel, probe_model

WINDOW = 64
"""Tokens of a window or segment; with two blocks the bare one reaches twice as far, which is as much as a segment of recurrent memory holds."""

LOCAL: dict[str, Any] = {"name": "local", "window": WINDOW, "heads": 2}

SUBJECTS: dict[str, Any] = {
    "local": LOCAL,
    "transformer_xl": {"name": "transformer_xl", "segment": WINDOW, "memory": 4 * WINDOW, "heads": 2},
    "compressive": {"name": "compressive", "segment": WINDOW, "memory": WINDOW, "compressed": WINDOW, "rate": 4, "heads": 2},
    "block_recurrent": {"name": "block_recurrent", "window": WINDOW, "states": 16, "heads": 2},
    "recurrent_memory": {"parts": [{"recurrent_memory": 16, "segment": 2 * WINDOW, "parts": [{"name": "attention", "heads": 2, "repeat": 2}]}]},
    "ttm": {"parts": [LOCAL, {"ttm": 16, "size": WINDOW, "read": 16, "parts": [{"name": "attention", "heads": 2}]}]},
    "expire_span": {"name": "expire_span", "max_span": 1024, "near": WINDOW, "heads": 2},
    "infini_attention": {"name": "infini_attention", "segment": WINDOW, "heads": 2},
    "memorizing": {"parts": [LOCAL, {"name": "memorizing", "segment": WINDOW, "near": WINDOW, "topk": 8, "heads": 2}]},
    "deltanet": {"name": "deltanet", "heads": 2},
    "mamba2": {"name": "mamba2", "headdim": 16},
}  # fmt: skip
"""By the name that the table says: a mixer as a recipe has it, or the backbone's parts."""


def as_mixer(name: str) -> Any:
    """What :class:`mmlong.diagnose.Setting` takes."""
    return {**SUBJECTS[name], "name": name} if "parts" in SUBJECTS[name] else SUBJECTS[name]


def _file(folder: Path, setting: Setting) -> Path:
    options = f"{setting.dim}x{setting.depth}-{setting.scale:g}-{setting.seed}"
    return folder / f"{setting.name.split(':')[0]}-{setting.probe}-{options}.safetensors"


def keep(model: ProbeModel, folder: Path, setting: Setting) -> None:
    """Write the weights of what was learned."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(_file(folder, setting)))


def kept(folder: Path, setting: Setting) -> ProbeModel | None:
    """The model that :func:`keep` wrote, or ``None``."""
    if not _file(folder, setting).is_file():
        return None
    model = probe_model(setting)
    load_model(model, str(_file(folder, setting)))
    return model
