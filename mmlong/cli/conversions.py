"""Options of the commands that read files with a trained model: what may be done to a file that is not as the model reads it."""

from __future__ import annotations

import argparse
from typing import Any


def add_conversions(parser: argparse.ArgumentParser) -> None:
    """Give a command the options."""
    group = parser.add_argument_group("files that are not as the model reads them")
    group.add_argument(
        "--fit", choices=("crop", "pad", "stretch"), help="resize a picture of another size, as mmlong pack does"
    )
    group.add_argument("--resample", action="store_true", help="resample a sound of another rate")
    group.add_argument("--mono", action="store_true", help="mix a sound of several channels to one")


def add_on_bad(parser: argparse.ArgumentParser) -> None:
    """Give a command that reads many files the option of packing that leaves bad ones out."""
    parser.add_argument("--on-bad", choices=("stop", "skip"), default="stop",
                        help="a file that cannot be read: stop (default), or leave it out, name and count it")  # fmt: skip


def conversions(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of them, for :func:`mmlong.cli.raw_files.read_documents`."""
    return {"resample": args.resample, "mono": args.mono, "fit": args.fit}
