"""A file as what a trained model reads: pieces of raw tensors, of any length in bounded memory.

A picture is one piece. A text comes block by block, a genome block by block of each record. A sound file is decoded whole (its samples, 4 bytes each), since it may have to be checked and resampled whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlong.modalities import Modality

PIECE = 16384


def read_documents(
    modality: Modality, path: Path, resample: bool = False, mono: bool = False, fit: str | None = None
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """The documents of a file.

    Args:
        modality: of the model that will read them; it says which kind of file this is, and which size, rate and channels are due.
        path: an image, a sound, a FASTA file (gzipped too), any bytes as text, or codes as whole numbers with white space between.
        resample: whether a sound of another rate is resampled.
        mono: whether a sound of several channels is mixed to one, for a model of one.
        fit: ``crop``, ``pad`` or ``stretch`` a picture of another size to the model's, as packing does; ``None``: it is refused.

    Yields:
        a document's name and its raw tensors ``(1, ...)`` in order.

    Raises:
        DataError: the file is missing, damaged, or not what the model reads.
    """
    from mmlong.datamodules.errors import DataError

    if path.is_dir():
        raise DataError(path, f"is a folder; name the files in it, as {path}/*")
    if not path.is_file():
        raise DataError(path, "is missing")
    readers: dict[str, Callable[..., Iterator[tuple[str, Iterator[Tensor]]]]] = {
        "image": partial(_image, fit=fit), "audio": partial(_sound, mono=mono), "genome": _sequences, "text": _text, "tokens": _codes,
    }  # fmt: skip
    if modality.kind not in readers:
        raise DataError(path, f"cannot be read: {type(modality).__name__} is of kind {modality.kind!r}")
    yield from readers[modality.kind](modality, path, resample)


def _image(modality: Any, path: Path, resample: bool, fit: str | None = None) -> Iterator[tuple[str, Iterator[Tensor]]]:
    import numpy as np

    from mmlong.datamodules.errors import BadSampleError
    from mmlong.datamodules.pixels import DECODE_ERRORS, fit_image, open_image, to_pixels

    channels, height, width = modality.image
    try:
        image = to_pixels(open_image(path), channels, path)
    except DECODE_ERRORS as error:
        raise error if isinstance(error, BadSampleError) else BadSampleError(path, f"is no image: {error}") from error
    if fit is not None:
        image = fit_image(image, height, width, fit)
    if image.size != (width, height):
        raise BadSampleError(
            path, f"is {image.size[0]}x{image.size[1]}; this model reads {width}x{height}: --fit crop resizes it (or pad, stretch)"
        )  # fmt: skip
    pixels = torch.from_numpy(np.array(image))
    yield path.name, iter([(pixels[None] if channels == 1 else pixels.permute(2, 0, 1))[None]])


def _sound(modality: Any, path: Path, resample: bool, mono: bool = False) -> Iterator[tuple[str, Iterator[Tensor]]]:
    from mmlong.datamodules.audio_files import Storage, conform, read_sound

    storage = Storage(modality.rate, modality.sound_channels, "FLOAT", resample, mono)
    wave = torch.from_numpy(conform(read_sound(path, path), storage, path))
    whole = wave if modality.sound_channels == 1 else wave[None]
    yield path.name, (whole[..., i : i + PIECE] for i in range(0, whole.shape[-1], PIECE))


def _sequences(modality: Any, path: Path, resample: bool) -> Iterator[tuple[str, Iterator[Tensor]]]:
    from mmlong.datamodules.fasta import Fasta

    fasta = Fasta(path)

    def pieces(name: str, length: int) -> Iterator[Tensor]:
        for start in range(0, length, PIECE):
            yield torch.from_numpy(fasta.fetch(name, start, min(start + PIECE, length)))[None]

    for name, length in fasta.lengths.items():
        yield name, pieces(name, length)


def _text(modality: Any, path: Path, resample: bool) -> Iterator[tuple[str, Iterator[Tensor]]]:
    from mmlong.datamodules.errors import DataError

    if path.stat().st_size == 0:
        raise DataError(path, "is empty")

    def pieces() -> Iterator[Tensor]:
        with open(path, "rb") as file:
            while block := file.read(PIECE):
                yield torch.frombuffer(bytearray(block), dtype=torch.uint8)[None]

    yield path.name, pieces()


def _codes(modality: Any, path: Path, resample: bool) -> Iterator[tuple[str, Iterator[Tensor]]]:
    from mmlong.datamodules.errors import DataError

    try:
        codes = read_codes(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(path, f"is no file of codes: {error}") from error
    if not codes.shape[1]:
        raise DataError(path, "is empty")
    yield path.name, iter(codes.split(PIECE, 1))


def read_codes(text: str) -> Tensor:
    """Whole numbers with white space between, as ``(1, T)``.

    Raises:
        ValueError: something else.
    """
    words = text.split()
    if odd := next((word for word in words if not word.isdecimal()), None):
        raise ValueError(
            f"{odd[:40]!r} is no code: this model reads whole numbers, with spaces between, of the tokenizer it was trained with"
        )
    return torch.tensor([[int(word) for word in words]], dtype=torch.int64)
