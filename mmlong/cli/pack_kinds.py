"""What `mmlong pack` can pack: a table of kinds, each with the function that lists a source, and the options of its modality.

A new kind is an entry in `KINDS`, and in `OPTIONS` if its modality has options of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmlong.datamodules.records import SequenceSource
    from mmlong.datamodules.sources import ImageSource

Parser = argparse._ArgumentGroup


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        modality: of its samples.
        source: the command's arguments to a source; ``args.paths[0]`` is the input.
        help: what IN is.
        splits: how many samples, or which share, go to each split unless the command says; ``None``: as of any data.
    """

    modality: str
    source: Callable[[argparse.Namespace], ImageSource | SequenceSource]
    help: str
    splits: Mapping[str, float] | None = None


# images


def _image(args: argparse.Namespace) -> ImageSource:
    from mmlong.datamodules.folders import folder_source

    return folder_source(args.paths[0], args.labels, args.licence, not args.unlabelled)


def _imagenet64(args: argparse.Namespace) -> ImageSource:
    from mmlong.datamodules.imagenet64 import load

    return load(args.paths[0])


def _image_options(group: Parser) -> None:
    group.add_argument(
        "--size", type=_size, help="resize to SIDE or HEIGHTxWIDTH (default: as it is, if all are equal)"
    )
    group.add_argument("--fit", choices=("crop", "pad", "stretch"), default="crop", help="where the shape differs")
    channels = group.add_mutually_exclusive_group()
    channels.add_argument("--grey", action="store_const", const=1, dest="channels", help="store grey")
    channels.add_argument("--rgb", action="store_const", const=3, dest="channels", help="store RGB")


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    sides = (height, width) if x else (height, height)
    if not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels, such as 256 or 128x256 (height x width)")
    return int(sides[0]), int(sides[1])


# text


def _text(args: argparse.Namespace) -> SequenceSource:
    from mmlong.datamodules.documents import text_source

    return text_source(args.paths[0], args.labels, not args.unlabelled, args.licence)


def _jsonl(args: argparse.Namespace) -> SequenceSource:
    from mmlong.datamodules.documents import jsonl_source

    if args.labels is not None:
        raise ValueError('a line of a JSONL says its label under "label"; --labels is for folders')
    return jsonl_source(args.paths[0], args.field, args.licence)


def _text_options(group: Parser) -> None:
    group.add_argument(
        "--field", default="text", metavar="KEY", help="of a JSONL's lines that holds the text (default text)"
    )


# audio


def _audio(args: argparse.Namespace) -> SequenceSource:
    from mmlong.datamodules.sound_folders import sound_folder

    return sound_folder(
        args.paths[0], args.labels, labelled=not args.unlabelled, licence=args.licence, **sound_options(args)
    )


def sound_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was said of how sounds are stored."""
    return {"rate": args.rate, "mono": args.mono, "subtype": "FLOAT" if args.float else "PCM_16"}


def _audio_options(group: Parser) -> None:
    group.add_argument("--rate", type=int, metavar="HZ", help="resample to this (default: all must be at one rate)")
    group.add_argument("--mono", action="store_true", help="mix channels to one (default: all must have as many)")
    group.add_argument("--float", action="store_true", help="store float32 (default: 16 bits)")


# genome


def _fasta(args: argparse.Namespace) -> SequenceSource:
    from mmlong.datamodules.genome_files import fasta_source

    return fasta_source(args.paths[0], args.bed, args.labels, args.licence)


def _npz(args: argparse.Namespace) -> SequenceSource:
    from mmlong.datamodules.genome_files import npz_source

    if args.labels is not None or args.bed is not None:
        raise ValueError("an npz holds its labels and whole sequences; --labels and --bed are for FASTA")
    return npz_source(args.paths[0], args.licence)


def _genome_options(group: Parser) -> None:
    group.add_argument(
        "--bed",
        metavar="BED",
        help="intervals of a FASTA to pack (default: whole records); --labels is then by interval",
    )


# arrays


def _array(args: argparse.Namespace) -> SequenceSource:
    from mmlong.datamodules.array_folders import array_folder

    return array_folder(args.paths[0], args.labels, not args.unlabelled, args.licence)


KINDS: dict[str, Kind] = {
    "image": Kind("image", _image, "a folder of images"),
    "text": Kind("text", _text, "a text file, or a folder of them"),
    "jsonl": Kind("text", _jsonl, "a JSONL, a text in each line"),
    "audio": Kind("audio", _audio, "a folder of sounds"),
    "fasta": Kind("genome", _fasta, "a FASTA of DNA; --labels is a CSV of name,label[,split]"),
    "array": Kind("array", _array, "a folder of .npy arrays (..., T) of one type, for any modality"),
    "npz": Kind("genome", _npz, "an npz of DNA sequences and labels"),
    "imagenet64": Kind(
        "image", _imagenet64, "the published files of ImageNet at 64x64, of either downsampling", {"val": 0.01}
    ),
}
OPTIONS: dict[str, Callable[[Parser], None]] = {
    "image": _image_options,
    "text": _text_options,
    "audio": _audio_options,
    "genome": _genome_options,
}


def add_options(parser: argparse.ArgumentParser) -> Mapping[str, list[argparse.Action]]:
    """Give ``parser`` the options of every modality; by modality, which they are."""
    found = {}
    for modality, add in OPTIONS.items():
        group = parser.add_argument_group(f"options of {modality}")
        add(group)
        found[modality] = list(group._group_actions)
    return found


def misplaced(args: argparse.Namespace, options: Mapping[str, list[argparse.Action]], modality: str) -> str | None:
    """An option that was given and is of another modality, in words; ``None`` if there is none."""
    for other, actions in options.items():
        for action in actions:
            if other != modality and getattr(args, action.dest) != action.default:
                return f"{action.option_strings[0]} is an option of {other}; what {args.kind} packs is of modality {modality}"
    return None


def option(text: str) -> tuple[str, Any]:
    """``key=value`` with the value as JSON, or as a word."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not like key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
