"""What the command lines of experiments have in common: how they are called, the options of what is trained, files that are gone on with, and answers in a line."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError
from mmlong.results import write_json


def experiment_parser(name: str, text: str | None, **more: Any) -> argparse.ArgumentParser:
    """A parser.

    Args:
        name: of the module behind ``mmlong.experiments``.
        text: its docstring, of which the first line is told.
        more: of ``ArgumentParser``.
    """
    about = (text or "").split("\n")[0]
    return argparse.ArgumentParser(prog=f"python -m mmlong.experiments.{name}", description=about, **more)


def add_result_options(parser: argparse.ArgumentParser, json_default: str = "", plot: bool = False) -> None:
    """``--json``, ``--markdown`` and, where asked for, ``--plot``.

    Args:
        parser: to add to.
        json_default: the file where none is given, in words.
        plot: whether there is a picture.
    """
    default = f" (default: {json_default})" if json_default else ""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"what is done is kept here, and not done again{default}")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there")


def add_trial_options(parser: argparse.ArgumentParser, runs: Path) -> None:
    """How trials are run (:mod:`mmlong.cli.trial`): ``--set``, ``--debug``, ``--threads``, ``--retry``, ``--runs``.

    Args:
        parser: to add to.
        runs: where run folders go, unless told.
    """
    from mmlong.cli.trial import key_value  # brings more than most experiments need

    parser.add_argument("--set", nargs="+", type=key_value, default=[], metavar="KEY=VALUE", help="options of mmlong fit for all that is trained, e.g. data.source_path=TAR")  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="the debug sizes, in seconds")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--runs", type=Path, default=runs, help=f"where runs and logs go (default: {runs})")


def parse_names(parser: argparse.ArgumentParser, known: Collection[str], argv: Sequence[str] | None) -> argparse.Namespace:  # fmt: skip
    """The options, with ``names`` of what is known: all of it where none is given."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    args.names = args.names or list(known)
    return args


def kept(path: Path | None, empty: Any) -> Any:
    """What an earlier command kept (:func:`keep`), or what is empty."""
    return json.loads(path.read_text()) if path is not None and path.exists() else empty


def keep(path: Path | None, found: Any) -> None:
    """Write what was found so far, if there is a file for it."""
    if path is not None:
        write_json(path, found)


def answers(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Decorator of a command line: what is wrong with the command is said in a line, and one that was stopped says that it goes on."""

    @functools.wraps(main)
    def answered(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except CommandError as error:
            print(error, file=sys.stderr)
            return error.status
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130

    return answered
