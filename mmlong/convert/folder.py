"""Folders: a published checkpoint to one of ours, and back.

Read are ``config.json`` and safetensors, one file or several with an index; nothing in them is executed, and ``transformers`` is not needed. Written are the same two files of the other form, and, of ours,

    published.json             the configuration that the model came with, by which it can go back
    published.safetensors      tensors that change no output, where there are some
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlong.convert.contract import CONVERTERS, Converter, ConvertError, Published
from mmlong.convert.table import their_shapes, to_ours, to_theirs
from mmlong.models import Config, Model, build_model
from mmlong.registry import nearest

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PUBLISHED, UNUSED = "published.json", "published.safetensors"
SHOWN = 6
"""Names in an error."""


@dataclass(frozen=True)
class Origin:
    """What a converted model came from.

    Attributes:
        config: their configuration.
        kind: of ours.
        options: that were settled.
        prefix: whether their names had the family's prefix.
        again: names beside the table's, under which the files had a tensor once more.
        absent: names of the table under which the files had nothing, since they had the tensor by another.
        tensors: that change no output.
    """

    config: Mapping[str, Any]
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prefix: bool = True
    again: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def converter(self) -> Converter:
        return converter_of(self.config)

    @property
    def published(self) -> Published:
        return Published(self.config, self.options)

    def named(self, name: str) -> str:
        """A name of the table as the files have it."""
        return name if self.prefix else name.removeprefix(self.converter.prefix)

    def same(self) -> dict[str, str]:
        """:meth:`Converter.same` as the files have the names."""
        same = self.converter.same(self.published)
        return {self.named(alias): self.named(name) for alias, name in same.items()}

    def hollow(self) -> Model:
        """The model of ours, without numbers."""
        return hollow(self.converter.config(self.published, self.kind))


def hollow(config: Config) -> Model:
    """A model without numbers, for its configuration and shapes."""
    with torch.device("meta"):
        return build_model(config)


def converter_of(config: Mapping[str, Any]) -> Converter:
    """By ``model_type``.

    Raises:
        ConvertError: none, or one that nobody converts (the nearest is named).
    """
    kind = config.get("model_type")
    if kind is None:
        raise ConvertError("config.json has no model_type: it is neither of transformers' form nor one of ours")
    if kind not in CONVERTERS:
        known = CONVERTERS.names()
        raise ConvertError(
            f"config.json: models of model_type {kind!r} are not converted{nearest(kind, known)}; those that are: {', '.join(known)}"
        )
    return CONVERTERS[kind]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConvertError: the file is missing, or damaged.
    """
    if not path.is_file():
        raise ConvertError(f"{path} is missing")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, of one file or of several with an index.

    Raises:
        ConvertError: there are none, only pickled ones, or they are damaged.
    """
    files = [folder / WEIGHTS]
    if not files[0].is_file():
        if not (folder / INDEX).is_file():
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            if pickled:
                raise ConvertError(
                    f"{folder} has its weights in {pickled[0]}, a pickle, which can run code and is not read: convert it first, where you trust it, with transformers' save_pretrained(safe_serialization=True)"
                )
            raise ConvertError(f"{folder} has no {WEIGHTS}")
        names = set(read_json(folder / INDEX).get("weight_map", {}).values())
        if not names or any(Path(name).name != name for name in names):
            raise ConvertError(f"{folder / INDEX} names no files of its folder")
        files = [folder / name for name in sorted(names)]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise ConvertError(f"{file} is missing, which {INDEX} names")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ConvertError(f"{file} is damaged: {error}") from error
    return tensors


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of this library's models."""
    return "modality" in config and "backbone" in config


def convert(
    folder: str | Path, out: str | Path, kind: str | None = None, like: str | Path | None = None, **options: Any
) -> str:
    """A published checkpoint to a folder of ours, or back; which of the two, its ``config.json`` says.

    Args:
        folder: with ``config.json`` and safetensors.
        out: a new folder, or an empty one.
        kind: of ours that it becomes (:attr:`~mmlong.convert.contract.Converter.kinds`); ``None`` for the usual one.
        like: going back, a converted folder whose ``published.json`` says what the model came from; ``None``: ``folder`` itself.
        options: of the family, e.g. ``globals=1`` of Longformer.

    Returns:
        a line that says what was done.

    Raises:
        ConvertError: it cannot be done.
        TypeError: an option that the family has not.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise ConvertError(f"{folder} is no folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} exists already: name a new folder")
    config = read_json(folder / CONFIG)
    if is_ours(config):
        if kind is not None or options:
            raise ConvertError(f"{folder} holds a model of ours, which goes back by what it came from alone")
        origin = read_origin(Path(like) if like is not None else folder)
        theirs = back(config, read_tensors(folder), origin)
        write(out, {**origin.config}, theirs)
        return f"{origin.converter.reads}: {len(theirs)} tensors in {out}"
    if like is not None:
        raise ConvertError(f"--like is for a model of ours that goes back; {folder} holds a published one")
    ours, found, origin = there(config, read_tensors(folder), kind, **options)
    write(out, ours, found)
    told = {
        "config": origin.config,
        "kind": origin.kind,
        "options": origin.options,
        "prefix": origin.prefix,
        "again": origin.again,
        "absent": origin.absent,
    }
    (out / PUBLISHED).write_text(json.dumps(told, indent=2) + "\n")
    if origin.tensors:
        save_file({**origin.tensors}, out / UNUSED, metadata={"format": "pt"})
    return f"{origin.converter.reads}, {origin.kind}: {sum(t.numel() for t in found.values()):,} numbers in {out}"


def write(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """``config.json`` and ``model.safetensors`` in a folder, made if needed."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({**tensors}, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_origin(folder: Path) -> Origin:
    """What a converted folder came from.

    Raises:
        ConvertError: it does not say, or no more whole.
    """
    if not (folder / PUBLISHED).is_file():
        raise ConvertError(
            f"{folder} has no {PUBLISHED}, which says what a model came from: give the folder that `mmlong convert` made as --like, or there is no form for this one to go back to"
        )
    told = read_json(folder / PUBLISHED)
    unused = load_file(folder / UNUSED) if (folder / UNUSED).is_file() else {}
    try:
        again, absent = tuple(told["again"]), tuple(told["absent"])
        return Origin(told["config"], told["kind"], told["options"], told["prefix"], again, absent, unused)
    except KeyError as error:
        raise ConvertError(f"{folder / PUBLISHED} lacks {error.args[0]!r}") from error


def there(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: str | None = None, **options: Any
) -> tuple[Config, dict[str, Tensor], Origin]:
    """A published model as one of ours.

    Args:
        config: their ``config.json``.
        tensors: theirs, by name.
        kind: of ours; ``None`` for the usual one that theirs has what it needs for.
        options: of the family.

    Returns:
        ``(configuration, tensors, origin)`` of ours.

    Raises:
        ConvertError: it cannot be converted: a form that ours has not, or a tensor that is missing, not known or of another shape.
        TypeError: an option that the family has not.
    """
    converter = converter_of(config)
    p = Published(config, options)
    if kind is not None and kind not in converter.kinds:
        raise ConvertError(
            f"{converter.reads} is converted to models of kind {', '.join(converter.kinds)}, not {kind!r}"
        )
    if unknown := [key for key in options if key not in converter.options]:
        has = f"it has {', '.join(converter.options)}" if converter.options else "it has none"
        raise TypeError(
            f"{converter.reads} has no option {unknown[0]!r}{nearest(unknown[0], converter.options)}; {has}"
        )
    kinds = converter.kinds if kind is None else (kind,)
    model = None
    for kind in kinds:
        try:
            model = hollow(converter.config(p, kind))
            break
        except ConvertError:
            if kind == kinds[-1]:
                raise
    assert model is not None
    assert kind is not None
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    rows = list(converter.rows(p))
    _covered(converter, rows, shapes)
    expected = their_shapes(rows, shapes)
    prefix = not converter.prefix or any(name.startswith(converter.prefix) for name in tensors)
    plain = Origin(config, kind, options, prefix)
    same = plain.same()
    wanted = {plain.named(name): shape for name, shape in expected.items()}
    unused = {
        name: t
        for name, t in tensors.items()
        if name not in wanted and name not in same and any(fnmatch.fnmatchcase(name, one) for one in converter.unused)
    }
    filled = _filled(tensors, same, wanted)
    again = tuple(sorted(name for name in same if name in tensors and name not in wanted))
    _fits(filled, wanted, {*unused, *again}, "" if prefix else converter.prefix)
    _alike(filled, same)
    by_table = {name: filled[plain.named(name)] for name in expected}
    converter.check(p, {**by_table, **unused})
    absent = tuple(sorted(set(wanted) - set(tensors)))
    origin = Origin(config, kind, options, prefix, again, absent, unused)
    return model.config, to_ours(rows, by_table, shapes), origin


def back(config: Config, tensors: Mapping[str, Tensor], origin: Origin) -> dict[str, Tensor]:
    """A model of ours as the published form that it came from.

    Args:
        config: ours.
        tensors: ours, by name.
        origin: what it came from.

    Raises:
        ConvertError: the model is no longer of that form, or a tensor is missing, not known or of another shape.
    """
    model = origin.hollow()
    if differing := sorted(_differing(config, model.config)):
        raise ConvertError(
            f"the model is no longer what its {PUBLISHED} says, and has no form there: {', '.join(differing[:SHOWN])} in config.json"
        )
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    _fits(tensors, shapes, set())
    rows = origin.converter.rows(origin.published)
    found = {origin.named(name): t for name, t in to_theirs(rows, tensors).items()}
    same = origin.same()
    found |= {name: found[same[name]].clone() for name in origin.again}
    _alike(found, same)
    return {**{name: t for name, t in found.items() if name not in origin.absent}, **origin.tensors}


def _filled(tensors: Mapping[str, Tensor], same: Mapping[str, str], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors with those added that the files have by another name."""
    filled = dict(tensors)
    for alias, name in same.items():
        if alias in tensors and name in wanted:
            filled.setdefault(name, tensors[alias].clone())
    for alias, name in same.items():
        if alias in wanted and name in filled:
            filled.setdefault(alias, filled[name].clone())
    return filled


def _alike(tensors: Mapping[str, Tensor], same: Mapping[str, str]) -> None:
    """Refuse tensors that are one in the published form, and differ."""
    for alias, name in same.items():
        if alias in tensors and name in tensors and not torch.equal(tensors[alias], tensors[name]):
            raise ConvertError(
                f"{alias} and {name} differ, which by config.json are one tensor: say there that they are two (tie_word_embeddings, or what its family has for it), or leave one of them out"
            )


def _covered(converter: Converter, rows: Any, shapes: Mapping[str, Any]) -> None:
    """The table names every tensor of ours, each once: a fault of the converter and not of its input."""
    named = [name for row in rows for name in row.our_names()]
    if sorted(named) != sorted(shapes):
        off = sorted(set(named) ^ set(shapes)) or sorted(name for name in named if named.count(name) > 1)
        raise AssertionError(f"the converter of {converter.reads} does not name each tensor once: {off[:SHOWN]}")


def _fits(
    found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], more: set[str], without: str = ""
) -> None:
    """Refuse tensors that are missing, not known or of another shape; ``without`` is a prefix that no name has."""
    missing = sorted(set(wanted) - set(found))
    if missing:
        hint = f"; no name begins with {without!r}, as in a file of a model without its head" if without else ""
        raise ConvertError(f"{_some(missing)} missing, of shape {wanted[missing[0]]}{hint}")
    if unknown := sorted(set(found) - set(wanted) - more):
        raise ConvertError(
            f"{_some(unknown)} not part of such a model, of shape {tuple(found[unknown[0]].shape)}{nearest(unknown[0], wanted)}"
        )
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise ConvertError(f"{name} is {tuple(found[name].shape)}, and by config.json it is {shape}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _differing(a: Any, b: Any, at: str = "") -> set[str]:
    """Keys at which two configurations differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {found for key in {*a, *b} for found in _differing(a.get(key), b.get(key), f"{at}.{key}" if at else key)}
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return set() if [*a] == [*b] else {at}
    return set() if a == b else {at}
