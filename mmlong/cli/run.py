"""``mmlong fit|validate|test|predict``: LightningCLI over a recipe, with run folders, resuming, and errors in one line.

Departures from plain LightningCLI: ``-c`` takes recipe names; ``--ckpt_path last`` finds the newest whole checkpoint of the recipe's newest run and goes on in
its folder; a checkpoint never changes settings (weights, optimiser, position and random state are all it holds); checkpoints are read with
``weights_only=True`` and from local files only; an unknown key is answered with the nearest one.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from mmlong.cli.recipes import UnknownRecipeError, find_recipe
from mmlong.datamodules.base import PackedDataModule
from mmlong.datamodules.errors import DataError
from mmlong.registry import nearest
from mmlong.tasks import ArchitectureMismatchError, Task
from mmlong.training.checkpoints import newest_whole
from mmlong.training.progress import Throughput, TokenProgressBar, clock
from mmlong.training.report import RunReport
from mmlong.training.rng import RNGStateCallback
from mmlong.training.safety import InterruptedRunError, NotFiniteError, StopOnInterrupt, StopOnNotFinite

RUNS = Path("runs")
TOLD = (DataError, UnknownRecipeError, ArchitectureMismatchError, NotFiniteError)
"""Errors that say all there is to say: shown without a traceback."""


class UsageError(ValueError):
    """A wrong command line or configuration."""


def describe_data(data: PackedDataModule) -> dict[str, Any]:
    """What a task must know of its data: see :class:`mmlong.tasks.Task`."""
    info: dict[str, Any] = {"num_classes": data.num_classes, "class_names": list(data.class_names)}  # type: ignore[attr-defined]
    if hasattr(data, "size"):
        info["modality"] = {"size": list(data.size), "channels": data.channels}  # type: ignore[attr-defined]
    return info


class Cli(LightningCLI):
    """LightningCLI with mmlong's defaults."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The recipe's own switches, and what the data tells the model."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="test the trained model at the end of fit"
        )
        parser.add_argument("--checkpoint_every", type=int, default=200, help="steps between checkpoints")
        parser.link_arguments("data", "model.init_args.data_info", compute_fn=describe_data, apply_on="instantiate")


def _recipes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Recipe names given with ``-c``, and the command line with their files in place."""
    names, out, i = [], [], 0
    while i < len(argv):
        word = argv[i]
        flag, equals, value = word.partition("=")
        if flag in ("-c", "--config"):
            if not equals:
                if i + 1 == len(argv):
                    raise UsageError(f"{flag} needs a recipe: a name (see mmlong recipes) or a file")
                i += 1
                value = argv[i]
            names.append(value)
            out += ["--config", str(find_recipe(value))]
        else:
            out.append(word)
        i += 1
    return names, out


def _option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take ``--name VALUE`` or ``--name=VALUE`` out of a command line."""
    value, out, i = None, [], 0
    while i < len(argv):
        flag, equals, given = argv[i].partition("=")
        if flag == f"--{name}":
            if not equals:
                i += 1
                if i == len(argv):
                    raise UsageError(f"--{name} needs a value")
                given = argv[i]
            value = given
        else:
            out.append(argv[i])
        i += 1
    return value, out


def _run_name(names: list[str]) -> str:
    return re.sub(r"[^\w./-]", "_", Path(names[0]).with_suffix("").name if Path(names[0]).is_file() else names[0])


def find_checkpoint(wanted: str, recipe: str) -> Path:
    """The checkpoint that ``--ckpt_path`` means: a file, a run folder, or ``last`` for the recipe's newest run that has one.

    Raises:
        UsageError: there is none, or it is a URL.
    """
    if "://" in wanted:
        raise UsageError(f"--ckpt_path {wanted}: checkpoints are read from local files only")
    if wanted != "last":
        path = Path(wanted)
        if path.is_dir():
            found, torn = newest_whole(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
            if found is None:
                raise UsageError(f"no whole checkpoint in {path}" + (f"; damaged: {torn}" if torn else ""))
            return found
        if not path.is_file():
            raise UsageError(f"--ckpt_path {wanted}: no such file or run folder")
        return path
    damaged: list[Path] = []
    for run in sorted((RUNS / recipe).glob("*/checkpoints"), reverse=True):
        found, torn = newest_whole(run)
        damaged += torn
        if found is not None:
            for path in damaged:
                print(f"passed over a damaged checkpoint: {path}", file=sys.stderr)
            return found
    raise UsageError(f"no checkpoint of {recipe} under {RUNS / recipe}: run mmlong fit -c {recipe} first")


def _callbacks(folder: Path, every: int) -> list[Callback]:
    return [
        RNGStateCallback(),
        Throughput(),
        StopOnNotFinite(),
        ModelCheckpoint(
            folder / "checkpoints", filename="{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=every,
            save_on_train_epoch_end=False, save_last=False,
        ),
        StopOnInterrupt(),
        RunReport(folder),
        LearningRateMonitor(logging_interval="step"),
        TokenProgressBar(leave=False),
    ]  # fmt: skip


def _keep_old_metrics(folder: Path) -> None:
    """CSVLogger empties a folder it finds; what an interrupted run wrote is moved out of its way."""
    current = folder / "metrics.csv"
    if current.is_file():
        current.rename(folder / f"metrics-{len(list(folder.glob('metrics-*.csv'))):03d}.csv")


def _build(command: str, argv: list[str], folder: Path) -> Cli:
    defaults = {
        "accelerator": "auto",
        "max_epochs": -1,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "plugins": [{"class_path": "mmlong.training.checkpoints.AtomicCheckpointIO"}],
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder.parent), "name": folder.name, "version": "", "flush_logs_every_n_steps": 10},
        },
    }
    sys_argv = sys.argv
    sys.argv = ["mmlong"]  # LightningCLI warns when it is given arguments beside a command line
    try:
        return Cli(
            Task, PackedDataModule, subclass_mode_model=True, subclass_mode_data=True, args=argv, run=False, trainer_defaults=defaults,
            save_config_callback=SaveConfigCallback, save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False, "prog": f"mmlong {command}"}, seed_everything_default=0,
        )  # fmt: skip
    finally:
        sys.argv = sys_argv


def run_trainer(command: str, argv: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with the rest of a command line; the exit status."""
    try:
        return _run(command, argv)
    except InterruptedRunError as stop:
        print(
            f"{stop}\ngo on with: mmlong {command} {' '.join(_without_checkpoint(argv))} --ckpt_path {stop.checkpoint}"
        )
        return 130
    except KeyboardInterrupt:
        print(
            f"stopped at once; go on from the last checkpoint with: mmlong {command} {' '.join(argv)} --ckpt_path last"
        )
        return 130
    except TOLD as error:
        print(f"mmlong {command}: {error}", file=sys.stderr)
        return 1
    except (UsageError, jsonargparse.ArgumentError) as error:
        print(f"mmlong {command}: {_plain(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != 28:  # ENOSPC: everything else is worth its traceback
            raise
        print(f"mmlong {command}: the disk is full ({error}). The checkpoints written before are whole; free some space, then "
              f"go on with --ckpt_path last", file=sys.stderr)  # fmt: skip
        return 1


def _without_checkpoint(argv: list[str]) -> list[str]:
    return _option(argv, "ckpt_path")[1]


def _run(command: str, argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        names: list[str] = []
    wanted, argv = _option(argv, "ckpt_path")
    names, argv = _recipes(argv)
    if not names and not {"-h", "--help"} & set(argv):
        raise UsageError("name a recipe: -c image/cells256 (see mmlong recipes)")
    recipe = _run_name(names) if names else "help"
    checkpoint = None if wanted is None else find_checkpoint(wanted, recipe)
    if command == "fit" and checkpoint is not None and checkpoint.parent.name == "checkpoints":
        folder = checkpoint.parent.parent
        _keep_old_metrics(folder)
    else:
        folder = RUNS / recipe / (time.strftime("%Y%m%d-%H%M%S") + ("" if command == "fit" else f"-{command}"))
    _quiet()
    cli = _build(command, argv, folder)
    trainer: pl.Trainer = cli.trainer
    task: Any = cli.model
    for callback in _callbacks(folder, cli.config["checkpoint_every"]):
        if not (isinstance(callback, TokenProgressBar) and trainer.progress_bar_callback is None):
            trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    _one_progress_bar(trainer)
    if command != "fit":
        return _evaluate(command, trainer, task, cli.datamodule, checkpoint, folder)
    begun = time.time()
    print(f"run folder: {folder}")
    if checkpoint is not None:
        print(f"going on from {checkpoint}")
    trainer.fit(task, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    print(f"trained {trainer.global_step:,} steps in {clock(time.time() - begun)}")
    if cli.config["test_after_fit"]:
        results = trainer.test(task, cli.datamodule, verbose=False)
        _say(results)
    print(f"see {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir())))
    return 0


def _evaluate(command: str, trainer: pl.Trainer, task: Any, data: Any, checkpoint: Path | None, folder: Path) -> int:
    if checkpoint is None:
        raise UsageError(f"{command} needs trained weights: --ckpt_path last, a checkpoint, or a run folder")
    print(f"weights: {checkpoint}")
    if command == "predict":
        batches: Any = trainer.predict(task, data, ckpt_path=checkpoint, weights_only=True)
        folder.mkdir(parents=True, exist_ok=True)
        _write_predictions(batches, task.class_names, folder / "predictions.csv")
        print(f"see {folder / 'predictions.csv'}")
        return 0
    run: Any = trainer.validate if command == "validate" else trainer.test
    _say(run(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False))
    print(f"see {folder}")
    return 0


def _say(results: Any) -> None:
    for key, value in sorted(results[0].items()):
        print(f"{key.replace('/', ' ')}: {value:.4f}")


def _write_predictions(batches: list[dict[str, torch.Tensor]], names: list[str], path: Path) -> None:
    import csv

    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["index", "truth", "prediction", *[f"p({name})" for name in names]])
        for batch in batches:
            for index, label, p in zip(
                batch["index"].tolist(), batch["label"].tolist(), batch["probability"], strict=True
            ):
                out.writerow([index, names[label], names[int(p.argmax())], *[f"{v:.6f}" for v in p.tolist()]])


def _one_progress_bar(trainer: pl.Trainer) -> None:
    """Lightning adds a bar of its own before ours is known; the first one goes, then callbacks are put in Lightning's order."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    ours = [c for c in callbacks if isinstance(c, TokenProgressBar)]
    if ours:
        callbacks[:] = [c for c in callbacks if not isinstance(c, pl.callbacks.ProgressBar) or c is ours[-1]]
    stock = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is None]
    callbacks[:] = [c for c in callbacks if c not in stock and not isinstance(c, ModelCheckpoint)] + [
        c for c in callbacks if isinstance(c, ModelCheckpoint) and c not in stock
    ]


def _quiet() -> None:
    """Warnings that say nothing to the user of a command line."""
    import logging

    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*", ".*isinstance.treespec.*", ".*ckpt_path.*best.*", ".*Checkpoint directory.*exists.*",
        ".*Experiment logs directory.*", ".*You defined a `validation_step`.*", ".*is deprecated.*LeafSpec.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _plain(error: BaseException) -> str:
    """jsonargparse's message without its page of usage, and the nearest key for an unknown one."""
    text = str(error)
    match = re.search(r"(?:Key|key|option|arguments?:)\s+[\"'`]?(?:--)?([\w.]+)[\"'`]?", text)
    if match and re.search(
        r"not (?:accepted|expected)|does not (?:exist|have)|[Uu]nrecognized|[Uu]nknown|[Nn]o action", text
    ):
        key = match[1].split("=")[0]
        return f"no setting {key!r}{_nearest_key(key)}"
    return text


def _nearest_key(key: str) -> str:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    known = [k for k in parser.get_defaults() if k.startswith("trainer")]
    from mmlong.backbone import BackboneConfig
    from mmlong.datamodules.images import ImageDataModule
    from mmlong.tasks import ClassifyTask
    from mmlong.training.optim import OptimConfig

    for prefix, target in (
        ("model", ClassifyTask),
        ("data", ImageDataModule),
        ("model.backbone", BackboneConfig),
        ("model.optim", OptimConfig),
    ):
        import inspect

        known += [f"{prefix}.{name}" for name in inspect.signature(target).parameters]
    return nearest(key.replace(".init_args", ""), known)
