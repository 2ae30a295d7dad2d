"""The ``mmlong`` command: a thin face that imports what a sub-command needs only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mmlong.cli.errors import CommandError

HELP = """\
usage: mmlong COMMAND [...]

Train models on sequences too long for a dense Transformer.

train and use (recipes by name or file; several -c are merged, the later wins; any option can be set on the command line)
  fit        mmlong fit -c image/cells256 --trainer.max_steps 100 --model.backbone.mixers=[s4d]
             mmlong fit -c image/cells256 --ckpt_path last        go on with the newest run
  test       mmlong test -c image/cells256 --ckpt_path last       (also validate)
  predict    mmlong predict -c image/cells256 --ckpt_path last    writes predictions.csv
  sweep      mmlong sweep -c image/mnist784 --grid model.optim.lr=1e-3,3e-3 --minutes 10   every combination, resumable; the best
  generate   mmlong generate text/stdlib_ar --prompt 'import ' --stream   (also images, sounds, DNA)
  score      mmlong score text/stdlib_ar FILE                     bits a byte of a file of any length
  classify   mmlong classify image/cells256 photo.png --fit crop  what a trained model says of files of your own
  knn        mmlong knn build text/stdlib_ar --out STORE          what followed the nearest contexts (kNN-LM); also evaluate, neighbours
  export     mmlong export image/cells256                         programs that run without mmlong (torch, AOTInductor, ONNX)
  save       mmlong save image/cells256 FOLDER                    weights and a model card, to keep or give away
  embed      mmlong embed RUN FILES... --out features.npz         what the head pools of each file; --tokens: of each token
  convert    mmlong convert gpt2/ out/                            a published checkpoint in transformers' format to ours, or back
  recipes    list the packaged recipes

data
  pack       mmlong pack image photos/ packed/ --size 256         make shards of your own data; --verify proves them
             mmlong fit -c image/cells256 --data.dataset packed/  and train on them
  bench      mmlong bench data -c image/cells256                  how fast the recipe's loader delivers
             mmlong bench mixers mamba2 --against all             seconds, memory and growth; also blocks, models, stream, table

look
  report     mmlong report image/cells256                         a run as one page: curves, samples, mistakes; --compare for several
  estimate   mmlong estimate -c text/stdlib_ar --length 1e9 --ranks 64    memory, FLOPs, traffic and time of a step before it is run
  mixers     what can mix tokens, and what each can do
  diagnose   mmlong diagnose mamba2 attention --json found.json   what a mechanism can do: recall, copying, state tracking
  arena      mmlong arena 'lra/*' --mixers default attention   the Long Range Arena: one table, published numbers beside it
  doctor     versions, threads, and which backend each mixer takes on this machine
  demo       mmlong demo image/cells256                           a page on this machine to try a model on your own files

extend
  new-modality  mmlong new-modality radar                         write a modality, its test and a recipe, to be changed

options
  -h, --help     this text; `mmlong COMMAND --help` says more
  --version      print the version, and the commit of a checkout
"""

TRAINING = ("fit", "validate", "test", "predict")
COMMANDS: dict[str, str] = {
    **dict.fromkeys(TRAINING, "train:run_training"),
    "generate": "generate:run_generate",
    "score": "generate:run_score",
    "classify": "classify:run_classify",
    "knn": "knn:run_knn",
    "export": "export:run_export",
    "save": "save:run_save",
    "embed": "embed:run_embed",
    "convert": "convert:run_convert",
    "recipes": "recipes:run_recipes",
    "pack": "pack:run_pack",
    "bench": "bench:run_bench",
    "report": "report:run_report",
    "demo": "demo:run_demo",
    "estimate": "estimate:run_estimate",
    "mixers": "tables:run_mixers",
    "diagnose": "diagnose:run_diagnose",
    "sweep": "sweep:run_sweep",
    "arena": "arena:run_arena",
    "doctor": "tables:run_doctor",
    "new-modality": "new_modality:run_new_modality",
}
"""Module of this package and function that a command calls with the words behind it; training's is told the command as well."""


def _dispatch(command: str, rest: list[str]) -> int:
    if command not in COMMANDS:
        from mmlong.registry import nearest

        raise CommandError(f"there is no command {command!r}{nearest(command, COMMANDS)}; `mmlong --help` lists them")
    module, _, function = COMMANDS[command].partition(":")
    run = getattr(importlib.import_module(f"mmlong.cli.{module}"), function)
    return int(run(command, rest) if command in TRAINING else run(rest))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 well, 1 something failed, 2 a wrong command, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        import mmlong
        from mmlong.measure.checkout import commit

        found = commit()
        print(f"mmlong {mmlong.__version__}{f' ({found})' if found else ''}")
        return 0
    command = arguments[0]
    try:
        return _dispatch(command, arguments[1:])
    except CommandError as error:
        known = f" {command}" if command in COMMANDS else ""
        print(f"mmlong{known}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"mmlong {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; there is nobody left to tell.
        sys.stderr.close()
        return 141
