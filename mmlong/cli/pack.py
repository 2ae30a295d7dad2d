"""``mmlong pack``: make, and prove, packed datasets. A thin face over `mmlong.datamodules`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

EPILOG = """\
examples:
  mmlong pack image photos/ packed/ --size 256        one sub-folder of photos/ a class
  mmlong pack image photos/ packed/ --labels t.csv    a table of file,label[,split]
  mmlong pack elpv packed/                            2,624 solar cells, 256 x 256 (pip install "mmlong[data]")
  mmlong pack mnist5k packed/                         5,000 digits, 28 x 28
  mmlong pack torchvision:CIFAR10 packed/ --root DIR  any torchvision dataset class of images and class numbers
  mmlong pack --verify packed/                        read every byte, name what is not whole
"""


def add_pack_parser(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``mmlong pack``."""
    parser.description = "Pack images into tar shards with an index, or verify a packed dataset."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", nargs="?", metavar="KIND", help="image, elpv, mnist5k or torchvision:NAME")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="[IN] OUT")
    parser.add_argument("--verify", metavar="OUT", help="verify this packed dataset instead of packing")
    parser.add_argument(
        "--size", type=_size, help="resize to SIDE or HEIGHTxWIDTH (default: as it is, if all are equal)"
    )
    parser.add_argument("--fit", choices=("crop", "pad", "stretch"), default="crop", help="where the shape differs")
    channels = parser.add_mutually_exclusive_group()
    channels.add_argument("--grey", action="store_const", const=1, dest="channels", help="store grey")
    channels.add_argument("--rgb", action="store_const", const=3, dest="channels", help="store RGB")
    parser.add_argument("--labels", metavar="CSV", help="table of file,label[,split] (kind image)")
    parser.add_argument("--licence", default="not stated", help="licence to record (kind image)")
    parser.add_argument("--split", action="append", type=_split, metavar="NAME=N", default=[],
                        help="samples (N >= 1) or share (N < 1) of a split; train takes the rest (default val=0.1, test=0.1)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="decides the splits and the order (default 0)")
    parser.add_argument("--shard-size", type=_bytes, default=32 << 20, metavar="BYTES", help="e.g. 32M (default), 1G")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is already there")
    parser.add_argument("--root", default=".", metavar="DIR", help="where torchvision's files are")
    parser.add_argument("--option", action="append", type=_option, metavar="KEY=VALUE", default=[],
                        help="further argument of the torchvision class, e.g. download=true")  # fmt: skip


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width or height)


def _bytes(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return int(float(text if unit == 1 else text[:-1]) * unit)


def _split(text: str) -> tuple[str, float]:
    name, equals, amount = text.partition("=")
    if not equals or name not in ("train", "val", "test"):
        raise argparse.ArgumentTypeError(f"{text!r} is not like val=200 or test=0.1")
    return name, float(amount)


def _option(text: str) -> tuple[str, Any]:
    import json

    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not like key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def run_pack(argv: list[str]) -> int:
    """Run ``mmlong pack`` with these arguments.

    Returns:
        0 if all is well; 1 if something is wrong with the data, which is said on stderr; 2 for a wrong command.
    """
    parser = argparse.ArgumentParser(prog="mmlong pack")
    add_pack_parser(parser)
    args = parser.parse_args(argv)
    if (args.verify is None) == (args.kind is None):
        parser.error("give either KIND [IN] OUT or --verify OUT")
    wanted = 2 if args.kind == "image" else 1
    if args.kind is not None and len(args.paths) != wanted:
        parser.error(f"{args.kind} takes {'IN and OUT' if wanted == 2 else 'OUT'}, not {len(args.paths)} paths")

    from mmlong.datamodules.errors import DataError

    try:
        return _verify(args.verify) if args.verify is not None else _pack(args, parser)
    except (DataError, ValueError) as error:
        print(f"mmlong pack: {error}", file=sys.stderr)
        return 1


def _verify(folder: str) -> int:
    from mmlong.datamodules.packed import load_manifest, verify
    from mmlong.datamodules.progress import packing

    with packing(f"verifying {folder}") as progress:
        faults = verify(folder, lambda shard, done, total: progress(done, total))
    for fault in faults:
        print(fault)
    if faults:
        print(f"{folder}: not whole, {len(faults)} faults")
        return 1
    splits = load_manifest(folder)["splits"]
    counts = ", ".join(f"{name} {split['samples']:,}" for name, split in splits.items())
    shards = sum(len(split["shards"]) for split in splits.values())
    print(f"{folder}: whole; {counts} samples in {shards} shards")
    return 0


def _pack(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from mmlong.datamodules.folders import folder_source
    from mmlong.datamodules.pack import pack_images
    from mmlong.datamodules.progress import packing
    from mmlong.datamodules.sources import KNOWN, torchvision_source

    out = args.paths[-1]
    size, channels, splits = args.size, args.channels, dict(args.split) or None
    if args.kind == "image":
        source = folder_source(args.paths[0], args.labels, args.licence)
    elif args.kind in KNOWN:
        known = KNOWN[args.kind]
        size, channels, splits = (
            size or (known.size, known.size),
            channels or known.channels,
            splits or dict(known.splits),
        )
        source = known.load()
    elif args.kind.startswith("torchvision:"):
        source = torchvision_source(args.kind.partition(":")[2], args.root, dict(args.option))
    else:
        parser.error(f"unknown KIND {args.kind!r}; it can be image, {', '.join(KNOWN)} or torchvision:NAME")
    print(f"{source.name}: {len(source.items):,} images; {source.source}\n  licence: {source.licence}")
    with packing(f"packing into {out}") as progress:
        dataset = pack_images(
            source, out, size=size, channels=channels, fit=args.fit, splits=splits, seed=args.seed,
            shard_bytes=args.shard_size, overwrite=args.overwrite, progress=progress,
        )  # fmt: skip
    image, splits_made = dataset.manifest["image"], dataset.manifest["splits"]
    counts = ", ".join(f"{name} {split['samples']:,}" for name, split in splits_made.items())
    kind = "grey" if image["channels"] == 1 else "RGB"
    print(f"{out}: {image['height']}x{image['width']} {kind}; {counts}")
    for field, names in dataset.manifest["labels"].items():
        shown = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
        print(f"  label {field}: {shown}")
    return 0
