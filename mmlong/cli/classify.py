"""``mmlong classify``: what a trained model says of files of one's own, which are in no packed dataset."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path
from typing import Any

from mmlong.cli.conversions import add_conversions, add_on_bad, conversions
from mmlong.cli.errors import CommandError

EPILOG = """\
examples:
  mmlong classify image/cells256 photo.png --fit crop
  mmlong classify RUN new/*.wav --resample --mono --out said.csv

RUN is a run folder, a folder of a saved model, or a recipe's name (its newest run). A line a file, in the order given: the class and its probability; of a model of
several labels, every label with a probability of at least one half; of one that predicts numbers, the numbers. said.csv has them all, a row a file. Of a FASTA file the first record is read.
"""


def run_classify(argv: list[str]) -> int:
    """Run ``mmlong classify``; 0 if all is well.

    Raises:
        CommandError: there is no such model, it says nothing of a file as a whole, or a file cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        prog="mmlong classify", description="What a trained model says of files.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a CSV of file, prediction and all probabilities")
    add_on_bad(parser)
    add_conversions(parser)
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    from mmlong.cli.runs import saved_model
    from mmlong.cli.trying import class_names, predict_file, predicts
    from mmlong.datamodules.errors import DataError

    model, folder = saved_model(args.run, Path(args.runs))
    if not predicts(model):
        raise CommandError(
            f"{folder} holds a model of kind {model.config.get('kind', 'plain')!r}, which says nothing of a file as a whole: mmlong generate, score and embed are for it",
            status=1,
        )
    names = class_names(model)
    said: list[tuple[Path, Any]] = []
    left = 0
    try:
        for path in args.files:
            try:
                answer = predict_file(model, path, names, **conversions(args))
            except DataError as error:
                if args.on_bad == "stop":
                    hint = "; --on-bad skip leaves such out" if len(args.files) > 1 else ""
                    raise CommandError(f"{error}{hint}", status=1) from error
                left += 1
                print(f"left out: {error}", file=sys.stderr, flush=True)
                continue
            said.append((path, answer))
            cut = f" (of its first {answer.tokens:,} {model.modality.unit}s)" if answer.cut else ""
            print(f"{path}: {told(model, answer)}{cut}", flush=True)
    except ValueError as error:
        raise CommandError(str(error), status=1) from error
    if left == len(args.files):
        raise CommandError("none of these files can be read", status=1)
    if left:
        print(f"{left:,} of {len(args.files):,} files left out")
    if args.out is not None:
        try:
            _write(args.out, names, said, model)
        except OSError as error:
            raise CommandError(f"--out {args.out}: {error.strerror or error}", status=1) from error
        print(f"{len(said):,} rows in {args.out}")
    return 0


def chosen(model: Any, answer: Any) -> list[str]:
    """Names of the class, or of the labels, that the model decides for; none of one that predicts numbers."""
    from mmlong.cli.trying import head_of
    from mmlong.heads import MultiLabelHead

    if not answer.chances:
        return []
    if isinstance(head_of(model), MultiLabelHead):
        return [name for name, value in answer.values.items() if value >= 0.5]
    return [max(answer.values, key=answer.values.__getitem__)]


def told(model: Any, answer: Any) -> str:
    """An answer in words."""
    if not answer.chances:
        return ", ".join(f"{name} {value:.6g}" for name, value in answer.values.items())
    return ", ".join(f"{name} {answer.values[name]:.3f}" for name in chosen(model, answer)) or "no label"


def _write(out: Path, names: list[str], said: list[tuple[Path, Any]], model: Any) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "prediction", *names])
        for path, answer in said:
            values = (f"{value:.6g}" for value in answer.values.values())
            table.writerow([path, "; ".join(chosen(model, answer)), *values])
    os.replace(partial, out)
