"""Raw tensors as files that people open: pictures, videos, sounds, sequences, music, texts; arrays of what is none of these."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlong.midi import midi_bytes
from mmlong.modalities import Modality
from mmlong.modalities.music import REST


def write_samples(modality: Modality, raw: Tensor, folder: Path, stem: str = "samples") -> list[Path]:
    """Write a batch of raw tensors, each file whole or not at all.

    Args:
        modality: says what they are.
        raw: ``(B, ...)`` as :meth:`Modality.decode` gives them.
        folder: where to; made if needed.
        stem: of the names.

    Returns:
        the files: one PNG sheet of all images, one animated GIF a video, one WAV a sound, one FASTA of all sequences, one MIDI file a piece of music, one text a row (bytes as they are), one file a row of codes (whole numbers with spaces between); of any other kind one ``.npy`` of the batch.
    """
    writer = WRITERS.get(modality.kind, _arrays)
    folder.mkdir(parents=True, exist_ok=True)
    return writer(modality, raw.cpu(), folder, stem)


def _whole(path: Path, write: Callable[[Path], Any]) -> Path:
    unfinished = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def image_sheet(raw: Tensor, gap: int = 2) -> np.ndarray:
    """uint8 ``(B, C, H, W)`` side by side in a square of rows: ``(C, H', W')``."""
    count, channels, height, width = raw.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, np.uint8)
    for place, image in enumerate(raw.numpy()):
        y, x = place // columns * (height + gap), place % columns * (width + gap)
        sheet[:, y : y + height, x : x + width] = image
    return sheet


def _images(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    from PIL import Image

    sheet = image_sheet(raw)
    picture = Image.fromarray(sheet[0] if sheet.shape[0] == 1 else np.ascontiguousarray(sheet.transpose(1, 2, 0)))
    return [_whole(folder / f"{stem}.png", picture.save)]


def _videos(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    from PIL import Image

    found = []
    for place, video in enumerate(raw.numpy()):  # (C, F, H, W)
        shown = video[0] if len(video) == 1 else np.ascontiguousarray(video.transpose(1, 2, 3, 0))
        first, *rest = [Image.fromarray(frame) for frame in shown]
        save = partial(first.save, save_all=True, append_images=rest, duration=100, loop=0)
        found.append(_whole(folder / f"{stem}-{place}.gif", save))
    return found


def _arrays(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    return [_whole(folder / f"{stem}.npy", partial(np.save, arr=raw.numpy(), allow_pickle=False))]


def _sounds(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    import soundfile

    rate = int(getattr(modality, "rate", None) or 0)
    if rate < 1:
        raise ValueError("the model does not know its sample rate; set modality.rate")
    found = []
    for place, sound in enumerate(raw.float().clamp(-1, 1)):
        samples = sound.mT.numpy() if sound.ndim > 1 else sound.numpy()  # (T,) or (T, C)
        write = partial(soundfile.write, data=samples, samplerate=rate, subtype="PCM_16", format="WAV")
        found.append(_whole(folder / f"{stem}-{place}.wav", write))
    return found


def _sequences(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    lines = []
    for place, letters in enumerate(raw.to(torch.uint8)):
        text = letters.numpy().tobytes().decode("ascii")
        lines += [f">{stem}-{place}", *(text[i : i + 80] for i in range(0, len(text), 80))]
    return [_whole(folder / f"{stem}.fa", partial(Path.write_text, data="\n".join(lines) + "\n"))]


def _music(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    found = []
    for place, voices in enumerate(raw.tolist()):
        write = partial(Path.write_bytes, data=midi_bytes(voices, REST))
        found.append(_whole(folder / f"{stem}-{place}.mid", write))
    return found


def _texts(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    found = []
    for place, row in enumerate(raw.to(torch.uint8)):
        found.append(_whole(folder / f"{stem}-{place}.txt", partial(Path.write_bytes, data=row.numpy().tobytes())))
    return found


def _codes(modality: Modality, raw: Tensor, folder: Path, stem: str) -> list[Path]:
    found = []
    for place, row in enumerate(raw.tolist()):
        text = " ".join(map(str, row)) + "\n"
        found.append(_whole(folder / f"{stem}-{place}.txt", partial(Path.write_text, data=text)))
    return found


WRITERS: dict[str, Callable[[Modality, Tensor, Path, str], list[Path]]] = {
    "image": _images,
    "video": _videos,
    "audio": _sounds,
    "genome": _sequences,
    "music": _music,
    "text": _texts,
    "tokens": _codes,
}
