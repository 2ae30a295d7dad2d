"""``mmlong save``: a run's model as a folder to keep or to give away, with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmlong.cli.errors import CommandError

EPILOG = """\
examples:
  mmlong save image/cells256 cells                    config.json, model.safetensors and a model card, README.md, written from the run
  mmlong save RUN FOLDER --license apache-2.0         of the weights, in the card
  mmlong save hub:owner/name FOLDER --revision v1     from the hub

RUN is a run folder, a folder of a saved model, a recipe's name (its newest run), or owner/name on the hub. `mmlong.load(FOLDER)` reads it again.
"""


def run_save(argv: list[str]) -> int:
    """Run ``mmlong save``; 0 if all is well.

    Raises:
        CommandError: there is no such model, it is damaged, or the folder cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="mmlong save", description="Save a run's model as a folder of weights, configuration and model card.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--license", help="of the weights, as the hub abbreviates it (default: none is named)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    from mmlong.models import load
    from mmlong.models.saving import CONFIG_FILE, WEIGHTS_FILE
    from mmlong.runs import is_run, model_folder

    source = model_folder(args.run, args.runs)
    if source is not None and args.folder.resolve() == source.resolve():
        raise CommandError(f"{args.folder} is where the model lies already: name another folder")
    # A README.md or config.json of something else would be written over.
    there = {path.name for path in args.folder.iterdir() if path.name[0] != "."} if args.folder.is_dir() else set()
    if there and (is_run(args.folder) or not {CONFIG_FILE, WEIGHTS_FILE} <= there):
        raise CommandError(
            f"{args.folder} has other files in it; name a folder that is empty, new, or of an earlier save"
        )
    try:
        model = load(args.run, revision=args.revision, runs=args.runs)
        run = source if source is not None and is_run(source) else None
        model.save_pretrained(args.folder, run=run, license=args.license)
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(str(error), status=1) from error
    except OSError as error:
        raise CommandError(f"cannot write {args.folder}: {error.strerror or error}", status=1) from error
    written = ", ".join(sorted(path.name for path in args.folder.iterdir()))
    print(f"{model.num_parameters():,} parameters of {source or args.run}; in {args.folder}: {written}")
    return 0
