"""One training of the arena: its options, how many steps its minutes hold, the run in a process of its own, and what came of it.

A run's folder is fixed by what it is, so a command that was stopped finds it: a run that is over is read, one that is not goes on from its last checkpoint with the steps it began with.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmlong.arena import ArenaTask, Cell, swap_mixer
from mmlong.arena.report import DEFAULT, TRANSFORMER
from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes
from mmlong.cli.timing import own_step_seconds, trainer_options
from mmlong.cli.train import words_of
from mmlong.cli.trial import alone
from mmlong.measure.budget import steps_within
from mmlong.results import write_json
from mmlong.runs import CHECKPOINTS, is_run
from mmlong.training.metrics_csv import column, read_metrics

PLAN = "arena.json"
EVALUATIONS = 8
"""Points of the validation curve."""
Run = Callable[[list[str]], None]
"""Runs ``mmlong`` with words, and raises where it fails."""


def mixer_name(mixer: Any) -> str:
    """How a mixer is called in the table: its name, and its options where it has any."""
    if isinstance(mixer, str):
        return mixer
    return mixer["name"] + "".join(f":{k}={v}" for k, v in mixer.items() if k != "name")


def options_of(
    task: ArenaTask, mixer: Any, size: str, seed: int, path: str | None, more: dict[str, Any]
) -> dict[str, Any]:
    """Options of ``fit`` on top of the recipe, without the number of steps.

    Raises:
        CommandError: the recipe has no place for another mixer.
    """
    model = _transformer(task) if mixer == TRANSFORMER else {}
    options: dict[str, Any] = {**task.data_options(path), **model, **more, "seed_everything": seed}
    if mixer not in (DEFAULT, TRANSFORMER):
        backbone = load_recipes(task.recipes(size))["model"]["init_args"]["backbone"]
        try:
            swapped = swap_mixer(backbone, mixer)
        except ValueError as error:
            raise CommandError(f"{task.name}: {error}") from error
        for key in ("mixers", "parts"):
            if key in swapped:
                options[f"model.backbone.{key}"] = swapped[key]
    return options


def _transformer(task: ArenaTask) -> dict[str, Any]:
    """The benchmark's own Transformer in place of the recipe's model: what ``paper`` says of it, but the warm-up, which is for the benchmark's steps."""
    model = load_recipes(task.recipes("paper")[-1:])["model"]["init_args"]
    return {
        f"model.{part}.{key}": value
        for part, options in model.items()
        for key, value in options.items()
        if (part, key) != ("optim", "warmup")
    }


def run_folder(root: Path, task: ArenaTask, mixer: Any, size: str, seed: int, minutes: float, path: str | None) -> Path:
    """Where the run is kept."""
    budget = f"-{minutes:g}min" if minutes else ""
    mine = "-own" if path is not None else ""
    return root / task.name / size / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '_', mixer_name(mixer))}{budget}{mine}-{seed}"


def told(more: dict[str, Any]) -> tuple[str, ...]:
    """Further options as a cell keeps them."""
    return tuple(sorted(word.removeprefix("--") for word in words_of((), more)))


def call(words: list[str]) -> None:
    """Run ``mmlong`` in a process of its own, which inherits the lock of its run; what it says goes to standard error.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([sys.executable, "-m", "mmlong", *words], stdout=sys.stderr, check=False, close_fds=False)
    if done.returncode:
        raise RuntimeError(f"mmlong {words[0]} ended with status {done.returncode}; what it said stands above")


def train(
    task: ArenaTask, mixer: Any, size: str, seed: int, minutes: float, path: str | None, root: Path,
    more: dict[str, Any], run: Run | None = None,
) -> Cell:  # fmt: skip
    """Train and test one cell, or go on with it, or read it.

    Args:
        task, mixer, size, seed: what.
        minutes: CPU minutes of training; 0: the steps of the recipe.
        path: the user's copy of the data.
        root: of the runs.
        more: further options of ``fit``.
        run: runs the command; :func:`call` unless given.

    Raises:
        CommandError: the recipe has no place for the mixer, the run was begun with other options, or another process still trains it.
        RuntimeError: training failed.
    """
    folder = run_folder(root, task, mixer, size, seed, minutes, path)
    options = options_of(task, mixer, size, seed, path, more)
    plan = _plan(folder, task.recipes(size), options, minutes)
    command = ["fit", *words_of(task.recipes(size), {**plan["steps"], **options}), f"--run_dir={folder}"]
    with alone(folder.with_name(folder.name + ".lock")):
        if not (folder / "summary.json").is_file():
            begun = is_run(folder) and any((folder / CHECKPOINTS).glob("*.ckpt"))
            if is_run(folder) and not begun:
                shutil.rmtree(folder)  # killed before there was anything to go on with
            (run or call)(["fit", f"--ckpt_path={folder}"] if begun else command)
    summary = json.loads((folder / "summary.json").read_text())
    steps, accuracies = column(read_metrics(folder / "metrics.csv"), "val/accuracy")
    return Cell(
        task.name, mixer_name(mixer), size, seed, task.data if path is None else task.release, minutes,
        accuracy=summary.get("test/accuracy"), steps=summary["steps"], samples=summary["steps"] * plan["batch_size"],
        parameters=summary["parameters"], cpu_seconds=summary.get("train_cpu_seconds") or 0.0,
        curve=tuple((int(step), float(value)) for step, value in zip(steps, accuracies, strict=True)),
        command=("mmlong", *command), options=told(more),
    )  # fmt: skip


def _plan(folder: Path, recipes: list[str], options: dict[str, Any], minutes: float) -> dict[str, Any]:
    """The steps a run is to take, kept beside it: measured once, so that it goes on with the same."""
    file = folder.with_name(folder.name + "." + PLAN)
    told = {"recipes": recipes, "options": options, "minutes": minutes}
    if file.is_file():
        kept = json.loads(file.read_text())
        if {key: kept.get(key) for key in told} != json.loads(json.dumps(told)):
            raise CommandError(f"{folder} was begun with other options ({file}); take other --runs, or remove both")
        return kept
    config = load_recipes(recipes)
    init = {**config["data"]["init_args"], **{k.removeprefix("data."): v for k, v in options.items()}}
    accumulated = int(trainer_options(config, options).get("accumulate_grad_batches") or 1)
    steps: dict[str, Any] = {}
    if minutes:
        with contextlib.redirect_stdout(sys.stderr):  # what packing the data says
            seconds, _ = own_step_seconds(config, options)
        count = steps_within(minutes, seconds)
        # Steps of the optimiser, and batches.
        steps = {"trainer.max_steps": count, "trainer.val_check_interval": max(1, count * accumulated // EVALUATIONS)}
        warmup = config["model"]["init_args"].get("optim", {}).get("warmup", 0)
        if warmup > count // 5:
            steps["model.optim.warmup"] = count // 5
    plan = {**told, "steps": steps, "batch_size": init.get("batch_size", 16) * accumulated}
    write_json(file, plan)
    return plan
