"""Saving and loading without pickles: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmlong.models.model import Model, build_model


def save_model(model: Model, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder`` (made if needed)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model that :func:`save_model` wrote.

    Raises:
        FileNotFoundError: no ``config.json`` or ``model.safetensors`` there.
        ValueError: the files do not belong together, or are damaged.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing")
    try:
        model = build_model(json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"the saved model in {folder} is damaged: {error}") from error
    except RuntimeError as error:
        raise ValueError(
            f"{folder}/model.safetensors is of another architecture than its config.json: {error}"
        ) from error
    return model.to(device)
