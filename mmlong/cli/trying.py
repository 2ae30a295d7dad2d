"""What ``mmlong demo`` does with a trained model, without a page: say what a file is, and go on from a prompt, as it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlong.cli.raw_files import read_documents
from mmlong.generation import stream
from mmlong.heads import ClassifyHead, MultiLabelHead, RegressHead, Sampling
from mmlong.heads.both_strands import BothStrandsHead
from mmlong.models import AutoregressiveModel, Model

LONGEST = 1 << 20
"""Tokens of a file that are read at most: a model without a state reads them at once."""


@dataclass(frozen=True)
class Answer:
    """What a model says of a file.

    Attributes:
        values: by name, in the order of the classes: probabilities, or (``chances`` false) numbers.
        chances: whether they are probabilities. Those of one class among several sum to 1, those of several labels do not.
        tokens: how many were read.
        cut: whether the file had more.
    """

    values: dict[str, float]
    chances: bool
    tokens: int
    cut: bool


def class_names(model: Model) -> list[str]:
    """Names of the values that a model predicts, as its data named them; numbers where nobody did."""
    count = int(model.config["head"]["num_classes"])
    return list(model.class_names) if len(model.class_names) == count else [str(number) for number in range(count)]


def head_of(model: Model) -> Any:
    """The head that decides what a prediction means."""
    return model.head.head if isinstance(model.head, BothStrandsHead) else model.head


def predicts(model: Model) -> bool:
    """Whether the model says something of a file as a whole."""
    return isinstance(head_of(model), (ClassifyHead, MultiLabelHead, RegressHead))


def predict_file(model: Model, path: Path, names: list[str], most: int = LONGEST, **convert: Any) -> Answer:
    """What the model says of a file, its first record where it has several.

    Args:
        model: a classifier, or one of several labels or numbers, in evaluation mode.
        path: of what it reads: a picture, a sound, a FASTA file, a text.
        names: of the predicted values.
        most: numbers of raw data that are read, along the sequence.
        convert: what may be done to a file to fit the model; see :func:`mmlong.cli.raw_files.read_documents`.

    Raises:
        DataError: the file is missing, damaged, or not what the model reads.
        ValueError: the model says nothing of a file as a whole.
    """
    head = head_of(model)
    if not predicts(model):
        raise ValueError(f"a model with head {model.config['head']['name']!r} says nothing of a file as a whole")
    raw, cut = _read(model, path, most, **convert)
    tokens, layout = model.encode(raw)
    with torch.inference_mode():
        said = model(tokens, None, layout)[0][0].float()
    if isinstance(head, ClassifyHead):
        said = said.softmax(-1)
    elif isinstance(head, MultiLabelHead):
        said = said.sigmoid()
    values = dict(zip(names, said.tolist(), strict=True))
    return Answer(values, not isinstance(head, RegressHead), tokens.shape[1], cut)


def _read(model: Model, path: Path, most: int, **convert: Any) -> tuple[Tensor, bool]:
    pieces: list[Tensor] = []
    _, document = next(iter(read_documents(model.modality, path, **convert)))
    for piece in document:
        pieces.append(piece)
        if model.modality.tokens_per_sample() is None and sum(p.shape[-1] for p in pieces) > most:
            break
    raw = torch.cat(pieces, -1)
    if model.modality.tokens_per_sample() is None and raw.shape[-1] > most:
        return raw[..., :most], True
    return raw, False


def prompt_tokens(
    model: AutoregressiveModel, text: str = "", path: Path | None = None, **convert: Any
) -> Tensor | None:
    """Tokens ``(1, L, ...)`` to go on from; ``None`` of no text and no file. Of a picture it is the upper half."""
    if path is not None:
        raw, _ = _read(model, path, LONGEST, **convert)
        tokens = model.encode(raw)[0]
        whole = model.modality.tokens_per_sample()
        return tokens if whole is None else tokens[:, : whole // 2]
    data = text.encode("utf-8", "surrogateescape")
    return model.encode(torch.frombuffer(bytearray(data), dtype=torch.uint8)[None])[0] if data else None


def go_on(
    model: AutoregressiveModel,
    prompt: Tensor | None,
    length: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    every: int = 8,
) -> Iterator[Tensor]:
    """The prompt and what the model drew after it, as raw tensors ``(1, ...)`` that grow.

    Args:
        model: in evaluation mode.
        prompt: tokens ``(1, L, ...)``, or ``None``.
        length: new tokens; a sample of one fixed size ends where it is full.
        sampling: how to draw.
        seed: of the draws.
        every: tokens after which what there is so far is given.

    Yields:
        the whole so far; of a sample of one fixed size with zeros where nothing was drawn yet.

    Raises:
        ValueError: nothing to draw.
    """
    whole = model.modality.tokens_per_sample()
    begun = 0 if prompt is None else prompt.shape[1]
    length = length if whole is None else min(length, whole - begun)
    if length < 1 or every < 1:
        raise ValueError(f"there is nothing to draw: length {length}, every {every}")
    draws = stream(model, length, prompt, sampling, torch.Generator().manual_seed(seed))

    def grown() -> Iterator[Tensor]:
        tokens: list[Tensor] = [] if prompt is None else [prompt]
        for number, token in enumerate(draws, 1):
            tokens.append(token)
            if number % every == 0 or number == length:
                so_far = torch.cat(tokens, 1)
                if whole is not None and so_far.shape[1] < whole:
                    rest = so_far.new_zeros(1, whole - so_far.shape[1], *so_far.shape[2:])
                    yield model.modality.decode(torch.cat([so_far, rest], 1))
                else:
                    yield model.modality.decode(so_far)

    return grown()


def as_text(raw: Tensor) -> str:
    """Bytes ``(1, T)`` as text; what is no UTF-8 as a replacement character."""
    return raw[0].to(torch.uint8).numpy().tobytes().decode("utf-8", "replace")


def as_picture(raw: Tensor) -> Any:
    """``(1, C, H, W)`` uint8 to an array that pages show: ``(H, W)`` or ``(H, W, C)``."""
    image = raw[0].to(torch.uint8).numpy()
    return image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)


def as_sound(raw: Tensor) -> Any:
    """``(1, T)`` or ``(1, C, T)`` in -1 to 1, to int16 ``(T,)`` or ``(T, C)``."""
    sound = (raw[0].float().clamp(-1, 1) * 32767).round().to(torch.int16)
    return (sound.mT if sound.ndim > 1 else sound).numpy()
