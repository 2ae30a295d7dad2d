"""The floor of ``video/clips_ar``: bits per dimension of lossless coders, on the very clips that the recipe is tested on.

    python -m mmlong.experiments.floors.lossless_clips

One clip a file, as `mmlong.experiments.floors.lossless_images` does it for crops:

============== =================================================================================================
PNG, WebP      all frames one below the other in one picture, lossless
of differences the same, of each frame what it has more than the one before it, pixel by pixel, modulo 256
FFV1           each frame by itself, with its contexts kept from frame to frame (FFmpeg; Niedermayer et al., RFC 9043)
H.264 lossless frames predicted by moving what came before (x264 at quantiser 0, its slowest preset)
============== =================================================================================================

Of the last two the packets alone are counted, without a container or headers. A codec of films is made for larger frames; ``--whole`` gives these two the whole held-out part of each film in one piece, which is kinder to them than to a model of clips.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from mmlong.datamodules import clips
from mmlong.datamodules.arrays import ArrayCodec
from mmlong.datamodules.codecs import LoadedMember
from mmlong.datamodules.video_files import require_av
from mmlong.experiments.floors.lossless_images import FORMATS
from PIL import Image


def picture(frames: np.ndarray) -> Image.Image:
    """Frames ``(F, H, W)`` one below the other."""
    return Image.fromarray(frames.reshape(-1, frames.shape[-1]))


def differences(frames: np.ndarray) -> np.ndarray:
    """The first frame, and of each later one what it has more than the one before, modulo 256."""
    return np.concatenate([frames[:1], frames[1:] - frames[:-1]])


def coded(frames: np.ndarray, codec: str, options: dict[str, str]) -> list[bytes]:
    """Packets of frames ``(F, H, W)`` in grey."""
    av = require_av()
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = frames.shape[1:]
    context.pix_fmt, context.time_base, context.thread_count = "gray", Fraction(1, 25), 1
    context.options = options
    found = []
    for number, frame in enumerate(frames):
        shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="gray")
        shown.pts = number
        found += context.encode(shown)
    return [bytes(packet) for packet in [*found, *context.encode(None)]]


FFV1 = ("ffv1", {"level": "1", "coder": "1", "context": "1", "g": "999"})
H264 = ("libx264", {"qp": "0", "preset": "veryslow"})


def _packets(codec: str, options: dict[str, str]) -> Callable[[np.ndarray], int]:
    return lambda frames: sum(map(len, coded(frames, codec, options)))


FILM_CODERS: dict[str, Callable[[np.ndarray], int]] = {"FFV1": _packets(*FFV1), "H.264 lossless": _packets(*H264)}
CODERS: dict[str, Callable[[np.ndarray], int]] = {
    **{name: lambda frames, measure=measure: measure(picture(frames)) for name, measure in FORMATS.items()},  # type: ignore[misc]
    **{
        f"{name} of differences": lambda frames, measure=measure: measure(picture(differences(frames)))  # type: ignore[misc]
        for name, measure in FORMATS.items()
    },
    **FILM_CODERS,
}


def bits_per_dimension(split: str = "test") -> dict[str, dict[str, float]]:
    """By coder, the bits per dimension of all clips of a split together (``all``), and of those of each film."""
    names = clips.LABELS["film"]
    size: dict[str, dict[str, int]] = {name: defaultdict(int) for name in CODERS}
    count: dict[str, int] = defaultdict(int)
    codec = ArrayCodec(clips.STORAGE)
    for record in clips.load().records:
        if record.split != split:
            continue
        data = record.load()
        frames = codec.read(LoadedMember(data, ("clips", record.name)), 0, clips.STORAGE.length(data))[0]
        for group in ("all", names[record.labels["film"]]):
            count[group] += frames.size
        for name, measure in CODERS.items():
            taken = measure(frames)
            for group in ("all", names[record.labels["film"]]):
                size[name][group] += taken
    return {name: {group: 8 * total / count[group] for group, total in sizes.items()} for name, sizes in size.items()}


def whole_bits() -> dict[str, dict[str, float]]:
    """The same of the held-out part of each film in one piece, by the coders of films."""
    parts = {name: clips.held_out_part(name) for name in clips.FILMS}
    found: dict[str, dict[str, float]] = {}
    for name, measure in FILM_CODERS.items():
        taken = {film: measure(part) for film, part in parts.items()}
        found[name] = {film: 8 * taken[film] / part.size for film, part in parts.items()}
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", default="test", choices=("test", "val"))
    parser.add_argument("--whole", action="store_true", help="the held-out part of each film in one piece")
    args = parser.parse_args()
    found = whole_bits() if args.whole else bits_per_dimension(args.split)
    groups = list(next(iter(found.values())))
    print("bits per dimension, " + ("the held-out part of each film" if args.whole else f"{args.split} clips"))
    print(f"{'':28}" + "".join(f"{group:>16}" for group in groups))
    for name, values in found.items():
        print(f"{name:28}" + "".join(f"{values[group]:16.3f}" for group in groups))


if __name__ == "__main__":
    main()
