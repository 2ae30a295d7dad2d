"""Saving and loading without pickles: a folder with ``config.json`` and ``model.safetensors``.

What is in the file is held against what the configuration builds before a number is read, so that an error names tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlong.models.lora import plain_state
from mmlong.models.model import Model, build_model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CLASS_NAMES = "class_names"
"""Key of ``config.json`` beside the model's own."""
SHOWN = 5
"""So many wrong tensors are named, of the others there is the number."""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
         "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}  # fmt: skip
_NAMES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F16": torch.float16,
          "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64}  # fmt: skip

Shape = tuple[tuple[int, ...], str]
"""Shape and dtype, as safetensors calls it."""


def save_model(model: Model, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder`` (made if needed); adapters are merged into the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in plain_state(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {**model.config, **({CLASS_NAMES: model.class_names} if model.class_names else {})}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model that :func:`save_model` wrote, in float32: weights of another floating dtype are converted.

    Raises:
        FileNotFoundError: no ``config.json`` or ``model.safetensors`` there.
        ValueError: the files do not belong together, or are damaged. Of tensors that are missing, of another shape or dtype, or not the model's, up to five are named.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no saved model: {name} is missing. A run has it when its training is over"
            )
    model = _build(folder / CONFIG_FILE)
    _load(model, folder / WEIGHTS_FILE)
    return model.to(device)


def _build(path: Path) -> Model:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the saved model in {path.parent} is damaged: {path.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is no configuration of a model: it holds {type(config).__name__}, not keys and values"
        )
    names = config.pop(CLASS_NAMES, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {CLASS_NAMES} is no list of names")
    try:
        model = build_model(config)
    except (KeyError, TypeError, ValueError) as error:
        # A KeyError's own text is in quotes.
        raise ValueError(f"{path}: {error.args[0] if error.args else error}") from error
    model.class_names = names
    return model


def _load(model: Model, path: Path) -> None:
    own = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            there = {key: (tuple(one.get_shape()), str(one.get_dtype())) for key, one in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"the saved model in {path.parent} is damaged: {_damage(path, own) or error}") from error
    if wrong := _wrong(there, own):
        raise ValueError(f"{path} is of another architecture than its config.json:\n  {first_lines(wrong)}")
    model.load_state_dict(load_file(path))


def _known(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _found(shape: Shape) -> str:
    dtype = _NAMES.get(shape[1])
    return f"{shape[0]} {shape[1] if dtype is None else str(dtype).removeprefix('torch.')}"


def _fits(found: Shape, own: Tensor) -> bool:
    dtype = _NAMES.get(found[1])
    same = dtype is not None and (dtype == own.dtype or (dtype.is_floating_point and own.dtype.is_floating_point))
    return found[0] == tuple(own.shape) and same


def _wrong(there: Mapping[str, Shape], own: Mapping[str, Tensor]) -> list[str]:
    """What is not as the model has it, a line each: missing, of another shape or dtype, and not the model's."""
    missing = [f"{key} is missing; expected {_known(own[key])}" for key in own if key not in there]
    other = [
        f"{key} is {_found(there[key])}; expected {_known(own[key])}"
        for key in own
        if key in there and not _fits(there[key], own[key])
    ]
    unexpected = [f"{key} {_found(there[key])} is not in the model" for key in there if key not in own]
    return missing + other + unexpected


def first_lines(lines: list[str]) -> str:
    """The first lines of an error, indented, and how many more there are."""
    more = [f"and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return "\n  ".join(lines[:SHOWN] + more)


def _damage(path: Path, own: Mapping[str, Tensor]) -> str | None:
    """Which tensors a file that safetensors refuses does not hold whole, if that is what is wrong: it ends too early.

    The layout of the format: eight bytes that say how long the header is, the header (JSON), the numbers.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= 100_000_000:
            return None
        if size < 8 + length:
            return f"{path.name} ends inside its header, after {size:,} of at least {8 + length:,} bytes"
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None
    cut, whole = [], 8 + length
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            end = 8 + length + int(entry["data_offsets"][1])
            bits = _BITS[entry["dtype"]] * math.prod(entry["shape"])
            stated = 8 * (int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]))
        except (KeyError, TypeError, ValueError, IndexError):
            return f"the header of {path.name} says nothing sensible of {key}"
        if bits != stated:
            return f"{path.name} has {stated // 8:,} bytes for {key} {_found((tuple(entry['shape']), entry['dtype']))}"
        whole = max(whole, end)
        if end > size:
            expected = f"; expected {_known(own[key])}" if key in own else ""
            cut.append((end, f"{key} is cut off{expected}"))
    if not cut:
        return None
    return f"{path.name} ends after {size:,} of {whole:,} bytes:\n  {first_lines([line for _, line in sorted(cut)])}"
