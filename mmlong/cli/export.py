"""``mmlong export``: a trained model as programs that run without this library."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError

EPILOG = """\
examples:
  mmlong export image/cells256                        programs of torch.export, in RUN/exported/torch
  mmlong export RUN --format aot --batch 1:64         compiled by AOTInductor; takes a C++ compiler and about a minute a program
  mmlong export RUN --format onnx --length 2:100000   for ONNX Runtime; takes the extra mmlong[onnx]
  mmlong export RUN --embedding                       what the head pools in place of what it says
  mmlong export text/stdlib_ar --temperature 0.8      a generator: its step, prefill, encoding, decoding and sampling

RUN is a run folder, a folder of a saved model, or a recipe's name (its newest run). The programs are loaded back and compared with the model before the folder
is given its name. Use them by `mmlong.export.load(FOLDER)`, or by plain torch as `python -m pydoc mmlong.export.folder` shows. They are code: load only what
you trust.
"""


def run_export(argv: list[str]) -> int:
    """Run ``mmlong export``; 0 if all is well.

    Raises:
        CommandError: the command is wrong, there is no such model, or it cannot be exported so.
    """
    parser = argparse.ArgumentParser(
        prog="mmlong export", description="Export a trained model as programs that run without mmlong.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", type=Path, help="folder for the programs (default: RUN/exported/FORMAT)")
    parser.add_argument("--format", default="torch", choices=("torch", "aot", "onnx"), help="default: torch")
    parser.add_argument(
        "--batch", metavar="LEAST:MOST", help="rows that the programs must take, or one number (default 1:65536)"
    )
    parser.add_argument(
        "--length",
        metavar="LEAST:MOST",
        help="lengths, where they can vary, or one number; at least 2 (default 2:16777216)",
    )
    parser.add_argument("--embedding", action="store_true", default=None, help="what the head pools, not what it says")
    parser.add_argument("--temperature", type=float, help="of a generator's sampling program; 0 takes the likeliest")
    parser.add_argument("--top_k", type=int, help="draw among the k likeliest only")
    parser.add_argument("--top_p", type=float, help="draw among the likeliest that together have this probability")
    parser.add_argument("--min_p", type=float, help="draw among those at least this share as likely as the likeliest")
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    from mmlong.cli.runs import saved_model
    from mmlong.export import ExportError, export_model
    from mmlong.export.folder import BATCH, LENGTH
    from mmlong.heads import Sampling

    model, folder = saved_model(args.run, Path(args.runs))
    drawn = {"top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
    try:
        sampling = None
        if args.temperature is not None or any(value is not None for value in drawn.values()):
            sampling = Sampling(1.0 if args.temperature is None else args.temperature, **drawn)
        batch, length = _bounds("--batch", args.batch, BATCH), _bounds("--length", args.length, LENGTH)
        out = args.out or folder / "exported" / args.format
        info = export_model(
            model, out, args.format, batch=batch, length=length, embedding=args.embedding, sampling=sampling,
            class_names=model.class_names, source=str(folder), say=lambda text: print(text, flush=True),
        )  # fmt: skip
    except (ExportError, ValueError) as error:
        raise CommandError(str(error), status=1) from error
    files = [entry["file"] for entry in info["programs"].values()]
    if "begin" in info:
        files.append(info["begin"]["file"])
    names = f", {len(info['class_names'])} class names" if info["class_names"] else ""
    print(f"in {out}: {', '.join(files)} and export.json ({info['parameters']:,} parameters{names})")
    return 0


def _bounds(option: str, given: str | None, default: Any) -> Any:
    """``LEAST:MOST`` or one number; raises ``CommandError`` for what is neither."""
    from mmlong.export import Bounds

    if given is None:
        return default
    least, colon, most = given.partition(":")
    if not (least.isdecimal() and (most.isdecimal() if colon else not most)):
        raise CommandError(f"{option} {given}: give two whole numbers as LEAST:MOST, or one")
    try:
        return Bounds(int(least), int(most or least))
    except ValueError as error:
        raise CommandError(f"{option} {given}: {error}") from error
