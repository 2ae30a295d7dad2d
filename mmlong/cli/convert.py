"""``mmlong convert``: a published checkpoint in transformers' format to one of ours, or back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError

EPILOG = """\
examples:
  mmlong convert gpt2/ gpt2-mmlong/                   a folder with config.json and model.safetensors, as from_pretrained reads it
  mmlong generate gpt2-mmlong/ --prompt '464 3290'    codes of its own tokenizer; `mmlong score` reads files of them
  mmlong convert gpt2-mmlong/ gpt2-again/             back: the same tensors to the bit
  mmlong convert RUN gpt2-tuned/ --like gpt2-mmlong/  a run that went on from it
  mmlong convert mamba/ out/ --kind plain             predicts the next code at each one, as theirs does
  mmlong convert longformer/ out/ --globals 1         with a global first token
  mmlong convert --list

Which way it goes, config.json says. Only safetensors are read, nothing is executed, and transformers is not needed.
"""


def run_convert(argv: list[str]) -> int:
    """Run ``mmlong convert``; 0 if all is well.

    Raises:
        CommandError: the command is wrong, or the folder cannot be converted.
    """
    parser = argparse.ArgumentParser(
        prog="mmlong convert", description="Convert a published checkpoint to a model of this library, or back.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="a new folder")
    parser.add_argument("--list", action="store_true", help="what can be converted")
    parser.add_argument(
        "--kind",
        help="autoregressive (begins with the code config.json calls bos: the default where there is one), or plain",
    )
    parser.add_argument("--globals", type=int, help="Longformer: how many first tokens are global (default 0)")
    parser.add_argument("--like", type=Path, help="going back: the converted folder that the model came from")
    args = parser.parse_args(argv)
    from mmlong.convert import CONVERTERS, convert

    if args.list:
        for name in CONVERTERS.names():
            print(f"{name:16} {CONVERTERS[name].reads}: {CONVERTERS[name].note}")
        return 0
    if args.folder is None or args.out is None:
        raise CommandError("give the folder to convert and a new one, or --list")
    options: dict[str, Any] = {} if args.globals is None else {"globals": args.globals}
    try:
        print(convert(args.folder, args.out, args.kind, args.like, **options))
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), status=1) from error
    return 0
