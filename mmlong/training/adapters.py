"""Adapters by themselves: a folder of what training made, without the backbone that it was held against.

    adapter/config.json            what was adapted (``lora``), the whole model's configuration (``model``), and whose backbone it needs (``base``)
    adapter/adapter.safetensors    the adapters, and everything of the model that is not a frozen weight of its backbone

So stem and head are in it, and what :func:`mmlong.training.freeze.freeze` was told to let train. The backbone is in the run or folder that it came from; its SHA-256 is kept, and another one is refused, since adapters of
other weights are of no use. A run's ``model.safetensors`` and ``backbone.safetensors`` have the adapters merged in and need nothing of this.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmlong.knn.fingerprint import fingerprint_of
from mmlong.models.lora import LoraConfig, add_lora, merge_lora, plain_name, plain_state
from mmlong.models.model import Model, build_model
from mmlong.models.saving import first_lines
from mmlong.registry import check_options
from mmlong.training.transfer import ArchitectureMismatchError, load_backbone

ADAPTER = "adapter"
"""The folder within a run."""
CONFIG_FILE, WEIGHTS_FILE = "config.json", "adapter.safetensors"
_BACKBONE = "backbone."


def _held(model: nn.Module) -> set[str]:
    """Names in the state dict of the backbone's frozen weights."""
    return {name for name, p in model.named_parameters() if name.startswith(_BACKBONE) and not p.requires_grad}


def save_adapter(model: Model, folder: str | Path, base: str | None = None) -> None:
    """Write ``config.json`` and ``adapter.safetensors`` into ``folder`` (made if needed).

    Args:
        model: with adapters, as it was trained: what is frozen of its backbone is left out.
        folder: where to.
        base: where the backbone came from, to be kept.

    Raises:
        ValueError: the model has no adapters.
    """
    config = getattr(model, "lora", None)
    if not isinstance(config, LoraConfig):
        raise ValueError("the model has no adapters: mmlong.models.add_lora gives it some")
    held = _held(model)
    state = model.state_dict()
    kept = {plain_name(name): value.detach().cpu().contiguous() for name, value in state.items() if name not in held}
    about = {
        "lora": dataclasses.asdict(config),
        "base": {"from": base, "sha256": _base_fingerprint(state, held)},
        "model": model.config,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n")


def _base_fingerprint(state: dict[str, Tensor], held: set[str]) -> str:
    return fingerprint_of({plain_name(name): state[name] for name in held})


def load_adapter(folder: str | Path, base: Model | str | Path | None = None, merge: bool = False) -> Model:
    """The adapted model, in evaluation mode; nothing in the files is executed.

    Args:
        folder: that :func:`save_adapter` wrote, or a run's, which has it inside.
        base: whose backbone: a model (left as it is), or what ``model.backbone_from`` takes; ``None``: where the folder says that it came from.
        merge: leave no adapters (:func:`mmlong.models.lora.merge_lora`).

    Raises:
        FileNotFoundError: there is no adapter, or no base.
        ValueError: files that are damaged or do not belong together; or the base is another one.
        ArchitectureMismatchError: the base's backbone is of another architecture.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file() and (folder / ADAPTER).is_dir():
        folder = folder / ADAPTER
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {name} is missing")
    model, about = _build(folder / CONFIG_FILE)
    said = about["base"].get("from")
    if base is None and said is None:
        raise FileNotFoundError(f"{folder} does not say whose backbone it adapts: name a base")
    source = said if base is None else base
    if isinstance(source, Model):
        tensors = plain_state(source.backbone)
        wrong = _differ({key: value for key, value in tensors.items()}, plain_state(model.backbone, merge=False))
        if wrong:
            raise ArchitectureMismatchError(f"the base's backbone is of another architecture:\n  {first_lines(wrong)}")
        model.backbone.load_state_dict(tensors)
    else:
        load_backbone(model.backbone, source)
    _load(model, folder / WEIGHTS_FILE, about["base"].get("sha256"))
    if merge:
        merge_lora(model)
    return model.eval()


def _build(path: Path) -> tuple[Model, dict[str, Any]]:
    """The model with adapters that know nothing yet, and what the configuration says."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        lora, config, _ = about["lora"], about["model"], about["base"]["from"]
        check_options(f"{path}: lora", LoraConfig, lora)
        model = build_model(config)
        add_lora(model, LoraConfig(**lora))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the adapter in {path.parent} is damaged: {path.name} is no JSON: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error.args[0] if error.args else error}") from error
    return model, about


def _differ(there: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in own if name not in there]
    other = [
        f"{name} is {tuple(there[name].shape)}; expected {tuple(own[name].shape)}"
        for name in own
        if name in there and there[name].shape != own[name].shape
    ]
    return missing + other + [f"{name} is not in the model" for name in there if name not in own]


def _load(model: Model, path: Path, sha256: str | None) -> None:
    try:
        there = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"the adapter in {path.parent} is damaged: {error}") from error
    state = model.state_dict()
    names = {plain_name(name): name for name in state}
    held = _held(model)
    # Frozen weights of the backbone may be there, of those that were let train; nothing else may be missing.
    needed = {plain: state[name] for plain, name in names.items() if name not in held or plain in there}
    if wrong := _differ(there, needed):
        raise ValueError(f"{path} is of another model than its {CONFIG_FILE}:\n  {first_lines(wrong)}")
    left = {name for name in held if plain_name(name) not in there}
    if sha256 != _base_fingerprint(state, left):
        raise ValueError(
            f"{path.parent} was trained on other weights of the backbone than the base has: name the base that it was trained on"
        )
    model.load_state_dict({**state, **{names[plain]: value for plain, value in there.items()}})
