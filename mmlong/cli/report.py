"""``mmlong report``: the face of :mod:`mmlong.report`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mmlong.cli.conversions import add_conversions, conversions
from mmlong.cli.errors import CommandError
from mmlong.cli.runs import STORY

EPILOG = """\
examples:
  mmlong report image/cells256                    the newest run of a recipe, as RUN/report.html
  mmlong report RUN --out page.html               one file that needs nothing else: pictures and sounds are in it
  mmlong report RUN --influence                   with who influences whom in its backbone, on a sample of its test
  mmlong report RUN --influence voice.wav         ... on a file
  mmlong report --compare RUN RUN --out both.html

RUN is a run folder, or a recipe's name (its newest run). A run that is not finished, or lost files, gives what it has, and the page says what is missing.
"""


def run_report(argv: list[str]) -> int:
    """Run ``mmlong report``; 0 if all is well.

    Raises:
        CommandError: the command is wrong, there is no such run, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="mmlong report", description="Make a page of HTML of a run, or of several beside each other.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", nargs="+")
    parser.add_argument("--compare", action="store_true", help="one page of several runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument(
        "--influence",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw who influences whom, on a sample of the run or on a file",
    )
    parser.add_argument(
        "--influence_length",
        type=int,
        default=256,
        metavar="N",
        help="tokens of the sample at most, where its size is free (default 256)",
    )
    add_conversions(parser)
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    from mmlong.report import BadRunError, comparison_page, gather, report_page

    try:
        runs = [gather(_folder(what, Path(args.runs))) for what in args.run]
    except BadRunError as error:
        raise CommandError(str(error), status=1) from error
    if args.compare:
        if args.influence is not None:
            raise CommandError("--influence is of one run; leave out --compare")
        if args.out is None:
            raise CommandError("--compare needs --out FILE: where the page goes")
        try:
            page = comparison_page(runs)
        except ValueError as error:
            raise CommandError(str(error)) from error
    elif len(runs) > 1:
        raise CommandError(f"{len(runs)} runs: --compare puts them on one page")
    else:
        page = report_page(runs[0], None if args.influence is None else _influence(runs[0], args))
    out = args.out or runs[0].folder / "report.html"
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror or error}", status=1) from error
    for run in runs:
        for missing in run.missing:
            print(f"{run.folder}: {missing}")
    print(f"{out}, {len(page.encode()):,} bytes")
    return 0


def _folder(what: str, root: Path) -> Path:
    """The folder itself, or the newest in it, or of a recipe, that holds anything of a run, finished or not."""
    here = Path(what)
    named = here if here.is_dir() else root / what
    if here.is_dir() and _holds_run(here):
        return here
    found = sorted(filter(_holds_run, named.iterdir()), reverse=True) if named.is_dir() else []
    if not found and here.is_dir():
        return here
    if not found:
        raise CommandError(f"{what}: no such folder, and no run of a recipe of this name under {root}/")
    return found[0]


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / STORY).is_file()


def _influence(run: Any, args: argparse.Namespace) -> Any:
    from mmlong.cli.raw_files import read_documents
    from mmlong.cli.runs import saved_model
    from mmlong.datamodules.errors import DataError
    from mmlong.report.influence import influence_figure, influence_of

    if args.influence_length < 2:
        raise CommandError("--influence_length is at least 2")
    model, _ = saved_model(str(run.folder), Path(args.runs))
    if args.influence:
        path, what = Path(args.influence), args.influence
    elif run.examples or run.made:
        path = (run.examples or run.made)[0].path
        what = f"{'test sample' if run.examples else 'the drawn sample'} {path.name}"
    else:
        raise CommandError(f"--influence: {run.folder} holds no sample; give a file: --influence FILE", status=1)
    try:
        _, pieces = next(iter(read_documents(model.modality, path, **conversions(args))))
        return influence_figure(influence_of(model, next(iter(pieces)), args.influence_length), what)
    except (DataError, ValueError) as error:
        raise CommandError(f"--influence: {error}", status=1) from error
    except StopIteration:
        raise CommandError(f"--influence: {path} holds nothing", status=1) from None
