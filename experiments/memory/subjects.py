"""What is compared: attention to a window or segment of 64 tokens, and the same with each memory round it; and two that have one state for everything."""

from __future__ import annotations

from typing import Any

WINDOW = 64
"""Tokens of a window or segment; with two blocks the bare one reaches twice as far."""

LOCAL: dict[str, Any] = {"name": "local", "window": WINDOW, "heads": 2}

SUBJECTS: dict[str, Any] = {
    "local": LOCAL,
    "transformer_xl": {"name": "transformer_xl", "segment": WINDOW, "memory": WINDOW, "heads": 2},
    "compressive": {"name": "compressive", "segment": WINDOW, "memory": WINDOW, "compressed": WINDOW, "rate": 4, "heads": 2},
    "block_recurrent": {"name": "block_recurrent", "window": WINDOW, "states": 16, "heads": 2},
    "recurrent_memory": {"parts": [{"recurrent_memory": 8, "segment": WINDOW, "parts": [LOCAL, LOCAL]}]},
    "infini_attention": {"name": "infini_attention", "segment": WINDOW, "heads": 2},
    "memorizing": {"parts": [LOCAL, {"name": "memorizing", "segment": WINDOW, "near": WINDOW, "topk": 8, "heads": 2}]},
    "deltanet": {"name": "deltanet", "heads": 2},
    "mamba2": {"name": "mamba2", "headdim": 16},
}  # fmt: skip
"""By the name that the table says: a mixer as a recipe has it, or the backbone's parts."""


def as_mixer(name: str) -> Any:
    """What :class:`mmlong.diagnose.Setting` takes."""
    return {**SUBJECTS[name], "name": name} if "parts" in SUBJECTS[name] else SUBJECTS[name]
