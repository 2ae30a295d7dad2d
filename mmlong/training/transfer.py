"""A trained backbone in a model of another modality: the backbone knows no modality, so its weights serve any.

``--model.backbone_from PATH`` takes a run folder, a folder that :func:`mmlong.models.save_model` wrote, or a file: ``backbone.safetensors`` (what a finished run leaves beside
``model.safetensors``, with the backbone's configuration in the file's metadata), ``model.safetensors`` itself, or a checkpoint. Stem and head begin anew.

Both backbones must be of one architecture. What differs is named setting by setting where the source tells its configuration, else tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.parts import repeated
from mmlong.models.lora import fold, plain_state
from mmlong.models.saving import first_lines
from mmlong.training.checkpoints import newest_whole, read_checkpoint

BACKBONE = "backbone.safetensors"
CHECKPOINT_CONFIG = "mmlong_model"
"""Where a checkpoint keeps its model's configuration, as JSON."""
FREE = ("dropout", "drop_path", "checkpoint")
"""Settings of a backbone that change how training runs, not which weights there are."""
_PREFIX = "backbone."


class ArchitectureMismatchError(ValueError):
    """Weights of another architecture than the model that should take them."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys."""
    if isinstance(config, dict):
        return {k: v for key, value in config.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: config}


def differences(there: dict[str, Any], here: dict[str, Any], free: tuple[str, ...], source: str) -> list[str]:
    """The settings that differ between two configurations of plain values, a line each; ``free`` ones may."""
    there, here = flatten(json.loads(json.dumps(there))), flatten(json.loads(json.dumps(here)))
    return [
        f"{key}: {there.get(key, 'absent')} in {source}, {here.get(key, 'absent')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key not in free
    ]


def save_backbone(backbone: Backbone, path: str | Path) -> None:
    """Write a backbone's weights as safetensors, its configuration in the metadata; adapters are merged into the weights."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in plain_state(backbone).items()}
    save_file(tensors, path, metadata={"format": "pt", "backbone": json.dumps(dataclasses.asdict(backbone.config))})


def _of_backbone(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        # A lone file of weights tells no configuration; a model's lies beside it.
        beside = path.with_name("config.json")
        if "backbone" in about:
            return tensors, json.loads(about["backbone"])
        whole = any(key.startswith(_PREFIX) for key in tensors)
        config = json.loads(beside.read_text())["backbone"] if whole and beside.is_file() else None
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"the weights in {path} are damaged or not mmlong's: {error}") from error
    return (_of_backbone(tensors, _PREFIX) if whole else tensors), config


def read_backbone(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, Path]:
    """The weights of a trained backbone; nothing in the file is executed.

    Args:
        path: a run folder (an unfinished run's last checkpoint), a saved model's folder, a safetensors file, or a checkpoint.

    Returns:
        ``(tensors, config, file)``: by their names inside the backbone; the backbone's configuration, ``None`` where the file does not tell it; and where they were read.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ValueError: the file is damaged.
    """
    file = Path(path)
    if file.is_dir():
        saved = [file / name for name in (BACKBONE, "model.safetensors") if (file / name).is_file()]
        newest = None if saved else newest_whole(file / "checkpoints")[0]
        if not saved and newest is None:
            raise FileNotFoundError(
                f"{path} holds no weights: neither {BACKBONE} nor model.safetensors nor a checkpoint"
            )
        file = saved[0] if saved else newest  # type: ignore[assignment]
    elif not file.is_file():
        raise FileNotFoundError(f"there is no {path}: name a run folder, a saved model's folder, or a file of weights")
    if file.suffix == ".safetensors":
        return *_read_safetensors(file), file
    content = read_checkpoint(file)
    config = json.loads(content.get(CHECKPOINT_CONFIG, "{}")).get("backbone")
    # Of a run that trains adapters they are merged, as they will be when it is over.
    return fold(_of_backbone(content["state_dict"], f"model.{_PREFIX}")), config, file


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A backbone's configuration with every default written out: an older one does not name settings that came later."""
    known = {field.name for field in dataclasses.fields(BackboneConfig)}
    full = dataclasses.asdict(BackboneConfig(**{key: value for key, value in config.items() if key in known}))
    return {**full, **config}


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The same with every mixer in its long form."""

    def long_form(mixer: Any) -> Any:
        if isinstance(mixer, list):
            return [long_form(one) for each in mixer for one in repeated(each)]
        return {"name": mixer} if isinstance(mixer, str) else mixer

    full = with_defaults(config)
    return {**full, "mixers": long_form(full["mixers"])}


def load_backbone(backbone: Backbone, path: str | Path) -> Path:
    """Give a backbone the weights of a trained one.

    Args:
        backbone: takes the weights, in its own precision and on its own device; adapters that it has stay.
        path: see :func:`read_backbone`.

    Returns:
        the file they came from.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_backbone`.
        ArchitectureMismatchError: naming up to five settings (or tensors) that differ.
    """
    tensors, config, file = read_backbone(path)
    differ = []
    if config is not None:
        differ = differences(_settings(config), _settings(dataclasses.asdict(backbone.config)), FREE, file.name)
    if not differ:
        own = {key: list(value.shape) for key, value in plain_state(backbone, merge=False).items()}
        differ = differences({key: list(value.shape) for key, value in tensors.items()}, own, (), file.name)
    if differ:
        raise ArchitectureMismatchError(
            f"the backbone in {file} is of another architecture than this model's:\n  {first_lines(differ)}\n"
            "set model.backbone to what it was trained with (config.json or config.yaml beside it)"
        )
    backbone.load_state_dict(tensors)
    return file
