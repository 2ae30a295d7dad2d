"""``mmlong pack``: make, and prove, packed datasets. A thin face over `mmlong.datamodules`; what can be packed is in `mmlong.cli.pack_kinds`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlong.cli.pack_kinds import KINDS, add_options, misplaced, option, sound_options
from mmlong.registry import nearest

if TYPE_CHECKING:
    from mmlong.datamodules.packed import PackedDataset
    from mmlong.datamodules.records import SequenceSource
    from mmlong.datamodules.sources import ImageSource

EPILOG = """\
examples:
  mmlong pack image photos/ packed/ --size 256        one sub-folder of photos/ a class
  mmlong pack image photos/ packed/ --labels t.csv    a table (CSV or JSONL) of file,label[,split]
  mmlong pack text notes/ packed/ --unlabelled        every file a document, whatever it holds
  mmlong pack audio drums/ packed/ --rate 44100 --mono  sounds of any kind, one sub-folder a class
  mmlong pack jsonl posts.jsonl packed/ --field body  every line a document
  mmlong pack array clouds/ packed/                   .npy arrays of any one type, one sub-folder a class
  mmlong pack fasta hg38.fa packed/ --bed peaks.bed   DNA by intervals (--labels: CSV of name,label[,split])
  mmlong pack stdlib packed/                          a known source: its own splits, source and licence
  mmlong pack elpv packed/                            another: 2,624 solar cells (pip install "mmlong[data]")
  mmlong pack torchvision:CIFAR10 packed/ --root DIR  any torchvision dataset class of images and class numbers
  mmlong pack torchaudio:SPEECHCOMMANDS packed/ --root DIR  the files that a torchaudio class lists
  mmlong pack --verify packed/                        read every byte, name what is not whole
"""

RECIPES = {
    ("image", True): "image/cells256",
    ("image", False): "image/photo_ar",
    ("audio", True): "audio/digits8k",
    ("audio", False): "audio/mulaw_ar",
    ("text", True): "text/news",
    ("text", False): "text/stdlib_ar",
    ("genome", True): "genome/binding200",
    ("genome", False): "genome/chromosome_ar",
}
"""By modality, and whether there are labels, a recipe that takes such a dataset; docs/your_data.md has them all."""


def add_pack_parser(parser: argparse.ArgumentParser) -> Mapping[str, list[argparse.Action]]:
    """Give ``parser`` the arguments of ``mmlong pack``; by modality, which options are its own."""
    parser.description = "Pack data into tar shards with an index, or verify a packed dataset."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = "; ".join(f"{name}: {kind.help}" for name, kind in KINDS.items())
    parser.add_argument(
        "kind",
        nargs="?",
        metavar="KIND",
        help=f"what IN is ({kinds}); or a known source; or torchvision:NAME, torchaudio:NAME",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="IN OUT, of a KIND; OUT, of a known source")
    parser.add_argument("--verify", metavar="OUT", help="verify this packed dataset instead of packing")
    parser.add_argument(
        "--labels",
        metavar="TABLE",
        help="CSV or JSONL of file,label[,split], for a folder whose sub-folders are not the classes",
    )
    parser.add_argument("--unlabelled", action="store_true", help="sub-folders are not classes; files have no labels")
    parser.add_argument("--licence", default="not stated", help="licence to record, of data of your own")
    parser.add_argument("--split", action="append", type=_split, metavar="NAME=N", default=[],
                        help="samples (N >= 1) or share (N < 1) of a split; train takes the rest (default val=0.1, test=0.1)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="decides the splits and the order (default 0)")
    parser.add_argument("--shard-size", type=_bytes, default=32 << 20, metavar="BYTES", help="e.g. 32M (default), 1G")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is already there")
    parser.add_argument("--on-bad", choices=("stop", "skip"), default="stop",
                        help="a sample that cannot be read: stop (default), or leave it out (its split is then smaller), name and count it")  # fmt: skip
    parser.add_argument("--source-path", metavar="PATH", help="files of a known source that comes in no package")
    parser.add_argument("--root", default=".", metavar="DIR", help="where torchvision's or torchaudio's files are")
    parser.add_argument("--option", action="append", type=option, metavar="KEY=VALUE", default=[],
                        help="further argument of the torchvision or torchaudio class, e.g. download=true")  # fmt: skip
    return add_options(parser)


def _bytes(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    try:
        count = int(float(text if unit == 1 else text[:-1]) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 32M or 1G")
    return count


def _split(text: str) -> tuple[str, float]:
    name, equals, amount = text.partition("=")
    try:
        number = float(amount)
    except ValueError:
        number = -1.0
    if not equals or name not in ("train", "val", "test") or not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not like val=200 or test=0.1")
    return name, number


def run_pack(argv: list[str]) -> int:
    """Run ``mmlong pack`` with these arguments.

    Returns:
        0 if all is well; 1 if something is wrong with the data, which is said on stderr; 2 for a wrong command.
    """
    parser = argparse.ArgumentParser(prog="mmlong pack")
    options = add_pack_parser(parser)
    args = parser.parse_args(argv)
    if (args.verify is None) == (args.kind is None):
        parser.error("give either KIND [IN] OUT or --verify OUT")
    modality = None if args.kind is None else _modality(args.kind)
    if args.kind is not None:
        if modality is None:
            near = nearest(args.kind, _kinds())
            known = len(_kinds()) - len(KINDS)
            parser.error(
                f"unknown KIND {args.kind!r}{near}; it can be {', '.join(KINDS)}, torchvision:NAME, torchaudio:NAME, or one of {known} known sources, such as elpv, fsdd, stdlib or gb-human_enhancers_cohn (docs/your_data.md)"
            )
        wanted = 2 if args.kind in KINDS else 1
        if len(args.paths) != wanted:
            given = shlex.join(args.paths) or "nothing"
            parser.error(
                f"{args.kind} takes {'IN and OUT, what is to be packed and a folder to be made' if wanted == 2 else 'OUT, a folder to be made'}; given: {given}"
            )
        if wanted == 2 and Path(args.paths[0]).is_dir() and _within(*map(Path, args.paths)):
            parser.error(
                f"OUT, {args.paths[1]}, lies in IN, where it would be taken for data the next time; name a folder beside it"
            )
        if fault := misplaced(args, options, modality):
            parser.error(fault)

    from mmlong.datamodules.errors import BadSampleError, DataError

    try:
        return _pack(args) if args.verify is None else _verify(args.verify)
    except (DataError, ValueError) as error:
        damaged = isinstance(error, BadSampleError) and "--" not in error.reason
        hint = "; --on-bad skip leaves such out" if damaged and args.on_bad == "stop" else ""
        print(f"mmlong pack: {error}{hint}", file=sys.stderr)
        return 1


def _within(folder: Path, out: Path) -> bool:
    return folder.resolve() in out.resolve().parents


def _verify(folder: str) -> int:
    from mmlong.datamodules.packed import load_manifest, verify
    from mmlong.datamodules.progress import packing

    with packing(f"verifying {folder}") as progress:
        faults = verify(folder, lambda shard, done, total: progress(done, total))
    for fault in faults:
        print(fault)
    if faults:
        print(f"{folder}: not whole, {len(faults)} {'fault' if len(faults) == 1 else 'faults'}")
        return 1
    splits = load_manifest(folder)["splits"]
    counts = ", ".join(f"{name} {split['samples']:,}" for name, split in splits.items())
    shards = sum(len(split["shards"]) for split in splits.values())
    print(f"{folder}: whole; {counts} samples in {shards} shards")
    return 0


def _kinds() -> tuple[str, ...]:
    from mmlong.datamodules.known import MODULES
    from mmlong.datamodules.known_images import KNOWN

    return (*KINDS, *KNOWN, *MODULES)


def _modality(kind: str) -> str | None:
    from mmlong.datamodules.known import MODULES, known_sequences
    from mmlong.datamodules.known_images import KNOWN

    if kind in KINDS:
        return KINDS[kind].modality
    if kind in MODULES:
        return known_sequences(kind).modality
    if kind.startswith("torchaudio:"):
        return "audio"
    return "image" if kind in KNOWN or kind.startswith("torchvision:") else None


def _source(args: argparse.Namespace) -> tuple[ImageSource | SequenceSource, dict[str, Any]]:
    """The source, and what a known one fixes of the way it is packed."""
    from mmlong.datamodules.known import MODULES, find_source, known_sequences
    from mmlong.datamodules.known_images import KNOWN
    from mmlong.datamodules.sources import torchvision_source

    if args.kind in KINDS:
        kind = KINDS[args.kind]
        return kind.source(args), {} if kind.splits is None else {"splits": kind.splits}
    if args.kind in MODULES:
        known = known_sequences(args.kind)
        return known.load(find_source(known, args.source_path)), {"splits": known.splits}
    if args.kind in KNOWN:
        image = KNOWN[args.kind]
        size = args.size or (image.size, image.size)
        return image.read(args.kind, size, args.source_path), {
            "size": size,
            "channels": image.channels,
            "splits": image.splits,
        }
    if args.kind.startswith("torchaudio:"):
        from mmlong.datamodules.sound_folders import torchaudio_source

        return torchaudio_source(args.kind.partition(":")[2], args.root, dict(args.option), **sound_options(args)), {}
    return torchvision_source(args.kind.partition(":")[2], args.root, dict(args.option)), {}


def _pack(args: argparse.Namespace) -> int:
    from mmlong.datamodules.pack import pack_images
    from mmlong.datamodules.pack_sequences import pack_sequences
    from mmlong.datamodules.progress import packing
    from mmlong.datamodules.sources import ImageSource

    out = args.paths[-1]
    source, fixed = _source(args)
    # With those that will be refused, so that it is the number of files that a person counts.
    count = len(source.items if isinstance(source, ImageSource) else source.records) + len(source.faults)
    what = "images" if isinstance(source, ImageSource) else {"audio": "sounds"}.get(source.modality, "documents")
    print(f"{source.name}: {count:,} {what}; {source.source}\n  licence: {source.licence}")
    shared: dict[str, Any] = {
        "splits": dict(args.split) or fixed.pop("splits", None), "seed": args.seed, "shard_bytes": args.shard_size,
        "overwrite": args.overwrite, "on_bad": args.on_bad,
    }  # fmt: skip
    with packing(f"packing into {out}") as progress:
        if isinstance(source, ImageSource):
            size, channels = args.size or fixed.get("size"), args.channels or fixed.get("channels")
            dataset = pack_images(source, out, size=size, channels=channels, fit=args.fit, progress=progress, **shared)
        else:
            dataset = pack_sequences(source, out, progress=progress, **shared)
    _report(out, dataset)
    return 0


def _report(out: str, dataset: PackedDataset) -> None:
    manifest = dataset.manifest
    counts = ", ".join(f"{name} {split['samples']:,}" for name, split in manifest["splits"].items())
    if "image" in manifest:
        image = manifest["image"]
        held = f"{image['height']}x{image['width']} {'grey' if image['channels'] == 1 else 'RGB'}"
    else:
        held = f"{manifest['modality']}, {sum(manifest['tokens'].values()):,} tokens"
    print(f"{out}: {held}; {counts}")
    if manifest["skipped"]:
        print(f"  skipped: {manifest['skipped']:,} (named in {out}/dataset.json)")
    for field, names in manifest["labels"].items():
        shown = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
        print(f"  {'classes' if field == 'label' else f'label {field}'}: {shown}")
        for line in _thin(field, names, manifest["counts"][field]):
            print(line)
    if missing := [split for split in ("val", "test") if split not in manifest["splits"]]:
        print(f"  there is no {' and no '.join(missing)} split; --split {missing[0]}=N takes N samples for one")
    if recipe := RECIPES.get((manifest["modality"], bool(manifest["labels"]))):
        print(f"  to train on it: mmlong fit -c {recipe} --data.dataset {shlex.quote(out)}")


def _thin(field: str, names: list[str], counts: dict[str, list[int]]) -> list[str]:
    """What a person should know of classes that some split lacks: without training samples a class cannot be learned, and without test samples nothing is measured of it."""
    found = []
    for split, what in (("train", "cannot be learned"), ("test", "is not measured by the test")):
        lacking = [name for name, count in zip(names, counts.get(split, ()), strict=False) if not count]
        if lacking:
            shown = ", ".join(lacking[:10]) + (f", ... ({len(lacking)} in all)" if len(lacking) > 10 else "")
            found.append(f"  no sample in {split}, so that it {what}: {shown}")
    return found
