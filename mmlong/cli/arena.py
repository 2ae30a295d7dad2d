"""``mmlong arena TASK...``: the face of :mod:`mmlong.arena`."""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mmlong.cli.cells import grid_parser, keep, load_cells, reason, write_pages
from mmlong.cli.console import wide_console
from mmlong.cli.errors import CommandError

ABOUT = """\
The field's long-sequence benchmarks: train tasks x mixers x seeds one after another, test each, and make one table with the published numbers beside it. A cell that is done is kept (--json), a run that was stopped goes on."""


def run_arena(argv: list[str]) -> int:
    """Run ``mmlong arena``; the exit status: 1 if a cell failed.

    Raises:
        CommandError: something is wrong with the command.
    """
    from mmlong.arena import Results, markdown, plot, table

    options = _options(argv)
    results = load_cells(Results, "results", options)
    if not options.show:
        _train_all(options, results, Console(stderr=True))
    wide_console(400).print(table(results, not options.no_published))
    failures = [cell for cell in results.cells.values() if cell.failed]
    for cell in failures:
        print(f"failed: {cell.task}, {cell.mixer}, seed {cell.seed}: {cell.failed}")
    write_pages(options, lambda: markdown(results, not options.no_published), lambda path: plot(results, path))
    return 1 if failures else 0


def _options(argv: list[str]) -> argparse.Namespace:
    from mmlong.arena import SIZES, TASKS

    tasks = {task.name: f"{task.about}; reads {task.data}; or {task.release}" for task in TASKS.values()}
    parser = grid_parser("arena", ABOUT, tasks, "trained", "the validation curves")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="a name, or a pattern in quotes, e.g. 'lra/*'")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="debug: a few steps; cpu (default): equal CPU minutes; paper: the benchmark's steps and shapes, for GPUs")  # fmt: skip
    parser.add_argument("--mixers", nargs="+", default=["default"], metavar="MIXER", help="default (the recipe's own), transformer (the benchmark's own dense one in place of the recipe's model), a name, a pattern in quotes, or NAME:OPTION=VALUE,...")  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="M", help="of CPU time for each training of size cpu (default: the task's, 20)")  # fmt: skip
    parser.add_argument("--source", action="append", default=[], metavar="TASK=PATH", help="your copy of the benchmark's data for a task; repeat it for others")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a further option of fit, e.g. trainer.accelerator=gpu")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/arena"), help="where the runs are kept (default runs/arena)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU, for each training (default 1)")
    parser.add_argument("--no_published", action="store_true", help="leave the published numbers out")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.threads < 1 or (options.minutes is not None and options.minutes <= 0):
        raise CommandError("--seeds and --threads are at least 1, and --minutes is positive")
    if options.minutes is not None and options.size != "cpu":
        raise CommandError(f"--minutes is for --size cpu; size {options.size} has its own number of steps")
    return options


def _tasks(asked: list[str]) -> list[Any]:
    from mmlong.arena import TASKS
    from mmlong.registry import nearest

    if not asked:
        raise CommandError("which tasks? e.g. mmlong arena lra/pathfinder32 --json found.json; `mmlong arena --help` lists them")  # fmt: skip
    found: dict[str, Any] = {}
    for text in asked:
        names = fnmatch.filter(TASKS, text)
        if not names:
            raise CommandError(f"there is no task {text!r}{nearest(text, TASKS)}; tasks: {', '.join(TASKS)}")
        found |= {name: TASKS[name] for name in names}
    return list(found.values())


def _mixers(asked: list[str]) -> list[Any]:
    from mmlong.arena.report import DEFAULT, TRANSFORMER
    from mmlong.cli.mixer_words import mixers_of
    from mmlong.mixers import list_mixers

    known = list_mixers()
    own = (DEFAULT, TRANSFORMER)
    return [mixer for text in asked for mixer in ([text] if text in own else mixers_of(text, known))]


def _named(given: list[str], flag: str) -> dict[str, str]:
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise CommandError(f"{flag} {text!r}: it is written NAME=VALUE")
        found[key] = value
    return found


OWN = {
    "seed_everything": "give --seeds",
    "run_dir": "give --runs",
    "runs": "give --runs",
    "ckpt_path": "a run that was stopped goes on by itself",
}
"""Options of ``fit`` that the arena sees to."""


def _check_set(more: dict[str, Any], size: str) -> None:
    """Raise ``CommandError`` for an option that would be overruled in silence."""
    for key in more:
        if key in OWN:
            raise CommandError(f"--set {key}: {OWN[key]}")
        if key == "trainer.max_steps" and size == "cpu":
            raise CommandError(
                "--set trainer.max_steps: size cpu trains as many steps as its CPU minutes hold; give --minutes"
            )


def _train_all(options: argparse.Namespace, results: Any, console: Console) -> None:
    import os

    import torch
    import yaml

    from mmlong.arena import Cell
    from mmlong.cli.arena_run import mixer_name, told, train
    from mmlong.measure.machine import describe

    tasks, mixers = _tasks(options.tasks), _mixers(options.mixers)
    sources = _named(options.source, "--source")
    if unknown := set(sources) - {task.name for task in tasks}:
        raise CommandError(f"--source names {sorted(unknown)[0]!r}, which is not among the tasks to run")
    for given in sources.values():
        if not Path(given).exists():
            raise CommandError(f"--source: {given} is not there")
    more = {key: yaml.safe_load(value) for key, value in _named(options.set, "--set").items()}
    _check_set(more, options.size)
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that train
    results.machine = describe("cpu", options.threads)
    for task in tasks:
        minutes = (options.minutes or task.minutes) if options.size == "cpu" else 0.0
        for mixer in mixers:
            for seed in range(options.seeds):
                path = sources.get(task.name)
                empty = Cell(
                    task.name, mixer_name(mixer), options.size, seed, task.data if path is None else task.release, minutes,
                    options=told(more),
                )  # fmt: skip
                there = results.cells.get(empty.key)
                if there is not None and not there.failed:
                    continue
                console.print(f"{task.name}, {mixer_name(mixer)}, seed {seed}: reads {empty.data}")
                try:
                    cell = train(task, mixer, options.size, seed, minutes, path, options.runs, more)
                except (RuntimeError, ValueError, TypeError) as error:
                    cell = replace(empty, failed=reason(error))
                keep(results, cell, options.json)
                said = cell.failed or ("no test" if cell.accuracy is None else f"test accuracy {cell.accuracy:.1%}")
                console.print(f"{task.name}, {cell.mixer}, seed {seed}: {said} ({cell.steps:,} steps, {cell.cpu_seconds / 60:.1f} CPU minutes)")  # fmt: skip
