"""``mmlong fit | validate | test | predict``: recipes and overrides to LightningCLI, and what a run says and leaves behind."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipe, load_recipes, main_recipes, packaged
from mmlong.cli.runs import resolve_run
from mmlong.registry import nearest
from mmlong.runs import CONFIG

USAGE = """\
usage: mmlong {command} -c RECIPE [-c RECIPE ...] [--KEY VALUE ...]

{what}

  -c RECIPE           a YAML file, the name of a packaged recipe, or what runs are called (--recipe; the newest one's
                      configuration); several are merged, the later wins
  --KEY VALUE         any key of the recipe, e.g. --trainer.max_steps 100, --data.batch_size 4,
                      --model.backbone.mixers=[s4d], --model.optim.lr 1e-3, --seed_everything 1
  --data.dataset OUT  data of your own, packed by `mmlong pack KIND IN OUT`, in place of the recipe's
  --ckpt_path WHICH   last or best (of the recipe's newest run), a run folder, what runs are called, or a checkpoint file{ckpt}
  --print_config      print every key with its value, and do nothing

keys of a run
  --recipe NAME               what the run is called: its folder is RUNS/NAME/TIMESTAMP (default: the first recipe's name)
  --runs FOLDER               where run folders are made (default: runs)
  --run_dir FOLDER            this run's folder, instead of RUNS/RECIPE/TIMESTAMP
  --test_after_fit WHICH      when training is over, test the `last` weights (default) or the `best`; null: no test
  --best_by METRIC            what makes weights the best (default: val/accuracy)
  --checkpoint_seconds S      how often to save, at most (default: 60)
  --sequence_ranks N          with --trainer.strategy sequence_parallel: how many ranks share a sequence (default: all)
  --rescale HOW               validate, test, predict: data of another rate than was trained at (--data.rate) is heard by changing the
                              steps of the mixers; `whole` (default) refuses a model that counts in tokens, `partly` changes what can
                              be, a number multiplies the steps by that (1 leaves them)

recipes: {recipes}; each has a .debug of a few steps, to be put on top of it
"""

WHAT = {
    "fit": ("Train a model. Leaves config, metrics, checkpoints, weights and pictures in a run folder.", "; without -c, the run's own config"),
    "validate": ("Measure a trained model on the validation split.", " (needed)"),
    "test": ("Measure a trained model on the test split, and draw what it gets right and wrong.", " (needed)"),
    "predict": ("Write predictions.csv: what the model says of each test sample (a classifier: truth, prediction, probability).", " (needed)"),
}  # fmt: skip

OWN = ("config", "seed_everything", "recipe", "runs", "run_dir", "ckpt_path", "test_after_fit", "best_by",
       "checkpoint_seconds", "sequence_ranks", "rescale", "print_config", "trainer", "model", "data")  # fmt: skip


def run_training(command: str, argv: list[str]) -> int:
    """Run one of the training commands; see the module's docstring.

    Returns:
        exit status.

    Raises:
        CommandError: something is wrong with the command or the run, and what to do.
    """
    what, ckpt = WHAT[command]
    if any(arg in ("-h", "--help") for arg in argv):
        print(USAGE.format(command=command, what=what, ckpt=ckpt, recipes=", ".join(main_recipes())), end="")
        return 0
    names, overrides = split_arguments(argv)
    checkpoint = _value_of("ckpt_path", overrides)
    root = Path(_value_of("runs", overrides) or "runs")
    names = [_config_of(name, root) for name in names]
    if not names:
        run = resolve_run(checkpoint, root) if checkpoint else None
        if run is None and checkpoint not in (None, "last", "best"):
            raise CommandError(
                f"--ckpt_path {checkpoint}: neither a run folder, nor a file in one, nor what runs under {root}/ are called; "
                "with a recipe (-c) it may also be a lone checkpoint file"
            )
        if run is None:
            raise CommandError(
                f"which recipe? e.g. mmlong {command} -c image/cells256; recipes: {', '.join(main_recipes())}"
            )
        names = [str(run / CONFIG)]
    if command != "fit" and checkpoint is None and "--print_config" not in overrides:
        raise CommandError(
            f"which weights? Add --ckpt_path last (of the newest run of {names[0]}), a run folder, or a checkpoint file"
        )
    hush()
    config = load_recipes(names, overrides)
    recipes = dict(load_recipe(name) for name in names)
    check_config(config, overrides, " + ".join(names))
    from mmlong.cli.engine import Engine

    return Engine(command, config, overrides, shown=["mmlong", command, *argv], recipes=recipes).run()


def _config_of(name: str, root: Path) -> str:
    """A recipe as it was named; of what is none, but what runs are called, or a run folder, the configuration of the newest."""
    if Path(name).is_file() or name.removesuffix(".yaml") in packaged():
        return name
    run = resolve_run(name, root)
    return name if run is None else str(run / CONFIG)


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Recipe names, and all other arguments as they are."""
    names: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for arg in arguments:
        flag, equals, value = arg.partition("=")
        if flag in ("-c", "--config"):
            name = value if equals else next(arguments, "")
            if not name or name.startswith("--"):
                raise CommandError(f"{flag} needs the name or file of a recipe")
            names.append(name)
        elif arg.startswith("--"):
            rest.append(arg)
            if not equals and arg != "--print_config":
                following = next(arguments, None)
                if following is None or following.startswith("--"):
                    raise CommandError(f"{arg} needs a value: {arg}=VALUE or {arg} VALUE")
                rest.append(following)
        else:
            hint = f" (did you mean -c {arg}?)" if arg in packaged() or Path(arg).is_file() else ""
            raise CommandError(f"unexpected {arg!r}{hint}; options look like --trainer.max_steps 100")
    return names, rest


def pairs(overrides: list[str]) -> Iterator[tuple[str, str]]:
    arguments = iter(overrides)
    for arg in arguments:
        key, equals, value = arg.removeprefix("--").partition("=")
        yield key, value if equals else ("" if arg == "--print_config" else next(arguments))


def written(value: Any) -> str:
    """An option's value as a word of a command: a text as the command line takes it, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def words_of(recipes: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Recipes, and options on top of them, as words of a command."""
    named = [word for name in recipes for word in ("-c", name)]
    return [*named, *(f"--{key}={written(value)}" for key, value in options.items())]


def _value_of(key: str, overrides: list[str]) -> str | None:
    found = [value for name, value in pairs(overrides) if name == key]
    return found[-1] if found else None


def hush() -> None:
    """Lightning's adverts and the notices that do not concern someone who runs a recipe."""
    import lightning.pytorch  # noqa: F401 - sets its own levels when imported, so it must come first

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*loading a checkpoint outside the 'fit' stage.*",
        ".*you defined a validation_step but have no val_dataloader.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*callbacks used to create the checkpoint.*",
        ".*Couldn't infer the batch indices.*",
        ".*No positive samples in targets.*",
        ".*No negative samples in targets.*",
        ".*callbacks returned in .LightningModule.configure_callbacks. will override.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")


def check_config(config: dict[str, Any], overrides: list[str], names: str) -> None:
    """Refuse unknown keys of recipes and command line before anything is built."""
    import lightning.pytorch as pl

    from mmlong.cli.keys import check_key, check_keys, class_tree

    tree: dict[str, Any] = {name: None for name in OWN}
    tree["trainer"] = class_tree(pl.Trainer)
    for part in ("model", "data"):
        entry = config.get(part)
        given = dict(pairs(overrides))
        path = given.get(part) or given.get(f"{part}.class_path")
        if path is None and isinstance(entry, dict):
            path = entry.get("class_path")
        if part in given and "." not in given[part]:
            such = f", such as {entry['class_path']}" if isinstance(entry, dict) and "class_path" in entry else ""
            hint = f"; a packed dataset is named by --data.dataset {given[part]}" if part == "data" else ""
            raise CommandError(f"--{part} {given[part]}: {part} is a class{such}{hint}")
        if path is None:
            raise CommandError(f"{names} says nothing of `{part}`: it needs class_path and init_args")
        arguments = class_tree(_class(str(path), f"{part}.class_path in {names}"))
        arguments.pop("data_info", None)
        tree[part] = {"class_path": None, "init_args": arguments}
    check_keys(config, tree, names)
    for key, _ in pairs(overrides):
        parts = tuple(key.removesuffix("+").split("."))
        if len(parts) > 1 and parts[1] in ("class_path", "init_args"):
            check_key(parts, tree, "the command line")
        else:
            # As the command line allows it: --model.optim.lr is model.init_args.optim.lr.
            short = {name: value for name, value in tree.items() if name not in ("model", "data")}
            check_key(parts, {**short, **{p: tree[p]["init_args"] for p in ("model", "data")}}, "the command line")


def _class(path: str, where: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        home = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise CommandError(f"{where}: cannot import {path!r}: {error}") from error
    found = getattr(home, name, None)
    if not isinstance(found, type):
        raise CommandError(f"{where}: {module} has no class {name!r}{nearest(name, dir(home))}")
    return found
