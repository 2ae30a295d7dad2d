"""Exporting: trace, write, load from the files again, compare with the model, and only then give the folder its name.

What is in the folder:

- a file a program (:mod:`mmlong.export.programs` says which), in one format (:mod:`mmlong.export.formats`);
- ``export.json``: what it is, for people and programs: the modality, class names, and of each program the file, its SHA-256, the format, and name, dtype and shape of every input and output. In a shape,
  ``batch``, ``length`` and ``past`` stand for sizes that may vary, within ``bounds``;
- ``begin.safetensors``, of a model that makes sequences: the first ``prediction``, and the state before the first token, of one row.

With plain torch, a classifier::

    predict = torch.export.load("predict.pt2").module()
    (logits,) = predict(raw, lengths)

and a generator of bytes::

    read, step = (torch.export.load(f"{name}.pt2").module() for name in ("read", "step"))
    begin = safetensors.torch.load_file("begin.safetensors")
    prediction, state = begin["prediction"], [begin[name] for name in json.load(open("export.json"))["programs"]["step"]["names"][1:]]
    prediction, *state = read(prompt, *state)                          # (1, L) int64, L >= 2; predictions of what follows each
    for _ in range(100):
        token = torch.distributions.Categorical(logits=prediction[:, -1:]).sample()
        prediction, *state = step(token, *state)

With more rows, repeat what is in ``begin`` along its first axis. A joint model has the programs of each of its modalities, on one state: see :mod:`mmlong.export.joint_programs`.
:func:`mmlong.export.load` does all this, and checks what it is given.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import mmlong
from mmlong.export.formats import (
    ExportError,
    first_line,
    load_program,
    require_format,
    suffix,
    trace,
    write_program,
    written_as,
)
from mmlong.export.joint_programs import joint_programs
from mmlong.export.programs import Bounds, Program, Size, axes, generator_programs, predict_program
from mmlong.heads import Sampling
from mmlong.modalities import Modality
from mmlong.models import AutoregressiveModel, JointModel, Model, SpansModel, TowersModel, merge_lora

INFO = "export.json"
BEGIN = "begin.safetensors"

BATCH = Bounds(1, 1 << 16)
LENGTH = Bounds(2, 1 << 24)

TOLERANCE = 1e-3
"""Largest difference allowed from the model's own outputs, as a share of the largest of them: rounding, in another order, over long sequences."""


TRACED = Size(2, 300, 4)
"""The example that is traced."""

TRIED = (Size(1, 2, 0), Size(3, 17, 1), Size(2, 65, 7), Size(1, 4500, 2))
"""Those that the program is run on, from its file."""


def export_model(
    model: Model,
    folder: str | Path,
    form: str = "torch",
    *,
    batch: Bounds = BATCH,
    length: Bounds = LENGTH,
    embedding: bool | None = None,
    sampling: Sampling | None = None,
    class_names: Sequence[str] = (),
    source: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write a model's programs into a folder, whole or not at all.

    Args:
        model: left as it is.
        folder: where to; made if needed. What an earlier export left there is replaced.
        form: ``torch``, ``aot`` or ``onnx``; see :mod:`mmlong.export.formats`.
        batch: sizes of the batch that the programs must take.
        length: sizes of the raw data's last axis, where that may vary, at least 2; and of what a generator reads at once.
        embedding: of a model that looks at whole sequences, what its head pools in place of what it says; ``None``: for a head that is only there for training (``project``).
        sampling: how the ``sample`` of a generator draws.
        class_names: kept in ``export.json``.
        source: where the model came from, likewise.
        say: told what is being done.

    Returns:
        what ``export.json`` says.

    Raises:
        ExportError: the model, or this machine, cannot do it, with the reason; or what was written does not do what the model does. The folder is then as it was.
        ValueError: bounds or options that make no sense for this model.
    """
    require_format(form)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / INFO).is_file():
        raise ExportError(f"{folder} has other files in it; name a folder that is empty, or of an earlier export")
    if length.least < 2:
        raise ValueError(f"a program takes sequences of at least 2; length is {length.least} to {length.most}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    merge_lora(model)
    begin: dict[str, Tensor] = {}
    if isinstance(model, AutoregressiveModel | JointModel):
        if embedding:
            raise ValueError("a model that makes sequences has no embedding: it predicts every token")
        if any(
            getattr(m, "reads_codes", None) and not getattr(m, "exports", False)
            for m in model.backbone.modules()
            if m is not model.backbone
        ):
            raise ExportError(
                "a part of the backbone goes by what the tokens are ({retro: ...}, {spacebyte: ...}), which no program holds: use `mmlong generate`"
            )
        if isinstance(model, JointModel):
            programs, begin = joint_programs(model, length, sampling or Sampling())
        else:
            programs, begin = generator_programs(model, length, sampling or Sampling())
    elif isinstance(model, SpansModel):
        raise ExportError(
            "a masked joint model is not exported: where the tokens of a modality stand differs from row to row and is found by looking, and a program of torch.export is fixed before. "
            "Keep its weights by `mmlong save`, or begin another run with its backbone (--model.backbone_from)"
        )
    elif isinstance(model, TowersModel):
        raise ExportError(
            "towers have a program for each modality, which is not written yet: use model(raw, lengths, NAME, pre_logits=True), or keep them by `mmlong save`"
        )
    else:
        if sampling is not None:
            raise ValueError("there is nothing to draw: this model makes no sequences")
        named = model.config["head"]["name"]
        programs = [predict_program(model, length, named == "project" if embedding is None else embedding)]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = {}
        for program in programs:
            written[program.name] = _export(program, partial, form, batch, say)
        if begin:
            save_file({name: t.detach().cpu().contiguous() for name, t in begin.items()}, partial / BEGIN)
        info = {**describe(model, class_names, source), "format": form, "programs": written}
        if begin:
            info["begin"] = {"file": BEGIN, "sha256": _digest(partial / BEGIN)}
        (partial / INFO).write_text(json.dumps(info, indent=2) + "\n")
        _swap(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def describe(model: Model, class_names: Sequence[str], source: str) -> dict[str, Any]:
    """What there is to say of a model beside its programs."""
    return {
        "mmlong": mmlong.__version__,
        "torch": torch.__version__,
        "source": source,
        "kind": model.config.get("kind", "plain"),
        **(_told_joint(model) if isinstance(model, JointModel) else _told(model)),
        "class_names": list(class_names),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _told(model: Model) -> dict[str, Any]:
    head = model.config["head"]
    name = head.get("of", head["name"]) if head["name"] == "both_strands" else head["name"]
    return {"modality": _told_modality(model.modality, model.config["modality"]), "head": head, "prediction": MEANING.get(name, "")}  # fmt: skip


def _told_joint(model: JointModel) -> dict[str, Any]:
    heads = model.config["heads"]
    return {
        "modalities": {name: _told_modality(voice.modality, model.config["modalities"][name]) for name, voice in model.voices.items()},
        "heads": heads,
        "orders": model.orders,
        "prediction": {name: MEANING.get(head["name"], "") for name, head in heads.items()},
    }  # fmt: skip


def _told_modality(modality: Modality, given: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": given["name"],
        "kind": modality.kind,
        "unit": modality.unit,
        "codes": modality.codes,
        "channels": modality.channels,
        "levels": modality.levels,
        "tokens_per_sample": modality.tokens_per_sample(),
        **{key: value for key, value in given.items() if key != "name"},
    }


MEANING = {
    "classify": "logits of the classes; softmax gives their probabilities",
    "readout": "logits of the classes; softmax gives their probabilities",
    "multilabel": "logits of the labels; sigmoid gives the probability of each",
    "tag": "logits of the labels at every position; softmax gives their probabilities. Anything at padding",
    "categorical": "logits of the codes at every position; softmax gives their probabilities. Anything at padding",
    "regress": "the numbers themselves",
    "regress_tokens": "the numbers themselves, at every position. Anything at padding",
    "project": "what contrastive training compares; the embedding is what the head pools",
    "logistic_mixture": (
        "per token (1 + 2 C + C (C - 1) / 2) rows of K numbers: logits of the K logistics, their means for each of C channels, the logarithms of their scales (at least -9), and the "
        "coefficients by which earlier channels move the means of later ones; numbers are in [-1, 1]"
    ),
}
"""What a prediction is, by the head's name."""


def _two(bounds: Bounds, a: int, b: int) -> tuple[int, int]:
    """Two sizes within bounds, different where there are two."""
    a, b = bounds.clamp(a), bounds.clamp(b)
    return (bounds.least, bounds.most) if a == b else (a, b)


def _varied(program: Program, batch: Bounds) -> list[Size]:
    """Two sizes of examples that differ in all that may vary."""
    length = program.length or Bounds(1, 1)
    if program.past and program.whole is not None and program.length is not None:
        length = Bounds(length.least, min(length.most, program.whole - 3))
    return [Size(*each) for each in zip(_two(batch, 2, 3), _two(length, 131, 257), (1, 2), strict=True)]


def _sizes(program: Program, batch: Bounds, wanted: Sequence[Size]) -> list[Size]:
    """Sizes of examples as near to those that are wanted as the bounds allow, none twice."""
    found = []
    for size in wanted:
        length = 1 if program.length is None else program.length.clamp(size.length)
        # What a picture's state has seen and what is read next must fit into it.
        room = size.past if program.whole is None else max(0, program.whole - 1 - length)
        past = min(size.past, room) if program.past else 0
        found.append(Size(batch.clamp(size.batch), length, past))
    return list(dict.fromkeys(found))


def _export(program: Program, folder: Path, form: str, batch: Bounds, say: Callable[[str], None]) -> dict[str, Any]:
    """Trace, write, load and compare one program; what ``export.json`` says of it."""
    varied = _varied(program, batch)
    inputs = [program.example(size) for size in varied]
    outputs = [_own(program, given) for given in inputs]
    shapes: list[list[tuple[int, ...]]] = [[tuple(t.shape) for t in given] for given in inputs]
    say(f"{program.name}: tracing")
    (size,) = _sizes(program, batch, [TRACED])
    traced = trace(program, batch, size, varied, shapes)
    actual = written_as(program, form)
    path = folder / f"{program.name}{suffix(actual)}"
    if actual != "torch":
        say(f"{program.name}: compiling")
    write_program(traced, program, path, actual)
    run = load_program(path, actual, program.inputs)
    most, tried = 0.0, 0
    for size in _sizes(program, batch, TRIED):
        given = program.example(size)
        most = max(most, _compare(program, given, run, size))
        tried += 1
    say(f"{program.name}: largest difference from the model {most:.2g}, in {tried} batches of other sizes")

    def ports(names: Sequence[str], sets: Sequence[Sequence[Tensor]]) -> list[dict[str, Any]]:
        return [
            {"name": name, "dtype": str(each[0].dtype).removeprefix("torch."), "shape": axes([tuple(t.shape) for t in each], varied, program.slots)}
            for name, each in zip(names, zip(*sets, strict=True), strict=True)
        ]  # fmt: skip

    bounds = {"batch": [batch.least, batch.most]}
    if program.length is not None:
        bounds["length"] = [program.length.least, program.length.most]
    return {
        "file": path.name,
        "sha256": _digest(path),
        "format": actual,
        "bounds": bounds,
        "names": program.inputs,
        "inputs": ports(program.inputs, inputs),
        "outputs": ports(program.outputs, outputs),
        "largest_difference": most,
    }


@torch.no_grad()
def _own(program: Program, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the model itself gives, from the same random numbers as :func:`_compare`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = program.reference(*given)
    return found if isinstance(found, tuple) else (found,)


def _compare(program: Program, given: Sequence[Tensor], run: Callable[..., tuple[Tensor, ...]], size: Size) -> float:
    """The largest difference between a program's outputs and the model's.

    Raises:
        ExportError: they differ by more than rounding, or in shape or dtype, or the program does not run.
    """
    expected = _own(program, given)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = run(*given)
    except Exception as error:
        raise ExportError(f"{program.name} was written and does not run at {size}: {first_line(error)}") from error
    most = 0.0
    for name, ours, theirs in zip(program.outputs, expected, found, strict=True):
        what = f"{program.name} is not what the model computes, at {size}: {name}"
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ExportError(
                f"{what} is {theirs.dtype} {tuple(theirs.shape)}, the model's {ours.dtype} {tuple(ours.shape)}"
            )
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                raise ExportError(f"{what} differs in {int((ours != theirs).sum())} of {ours.numel()} numbers")
            continue
        if not ours.numel():
            continue
        gap = (ours.double() - theirs.double()).abs()
        apart = float(torch.where(ours.isnan() & theirs.isnan(), 0, gap).max())
        scale = float(ours.double().abs().max())
        # A difference that is not a number is no small difference.
        if not apart <= TOLERANCE * max(scale, 1e-3):
            raise ExportError(f"{what} differs by {apart:.3g}, where the largest number is {scale:.3g}")
        most = max(most, apart)
    return most


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _swap(partial: Path, folder: Path) -> None:
    """Give a finished folder its name; an earlier export is put aside meanwhile, and back if that fails."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
