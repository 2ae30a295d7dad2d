"""``mmlong diagnose MIXER...``: the face of :mod:`mmlong.diagnose`."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from mmlong.cli.cells import grid_parser, keep, load_cells, reason, write_pages
from mmlong.cli.console import wide_console
from mmlong.cli.errors import CommandError

ABOUT = """\
Train tiny models on generated tasks and say what each mixer can do. One table, one picture; every cell is kept when it is done, so a run that was stopped goes on where it was (--json)."""


def run_diagnose(argv: list[str]) -> int:
    """Run ``mmlong diagnose``; the exit status: 1 if a cell failed.

    Raises:
        CommandError: something is wrong with the command.
    """
    from mmlong.diagnose.report import Findings, markdown, plot, table
    from mmlong.measure.machine import describe

    options = _options(argv)
    findings = load_cells(Findings, "findings", options)
    if not options.show:
        if not options.mixers:
            raise CommandError("which mixers? e.g. mmlong diagnose mamba2 attention 's4*' --json found.json")
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        findings.machine, findings.command = describe("cpu", options.threads), ["mmlong", "diagnose", *argv]
        _learn_all(options, findings, Console(stderr=True))
    wide_console(400).print(table(findings))
    wrong = [said for said in findings.published() if not said[1]]
    for said, holds in findings.published():
        print(("as published: " if holds else "NOT as published: ") + said)
    failures = [cell for cell in findings.cells.values() if cell.failed]
    for cell in failures:
        print(f"failed: {cell.setting.key}: {cell.failed}")
    write_pages(options, lambda: markdown(findings), lambda path: plot(findings, path))
    if wrong:
        print(f"{len(wrong)} of {len(findings.published())} published relations do not show")
    return 1 if failures else 0


def _options(argv: list[str]) -> argparse.Namespace:
    from mmlong.diagnose.probes import PROBES

    tasks = {name: PROBES[name].about for name in PROBES.names()}
    parser = grid_parser("diagnose", ABOUT, tasks, "learned", "the table")
    parser.add_argument(
        "mixers", nargs="*", metavar="MIXER", help="a name, a pattern in quotes, or NAME:OPTION=VALUE,..."
    )
    parser.add_argument("--tasks", default="*", help="names or patterns, by commas (default: all)")
    parser.add_argument("--dims", default="64", help="widths, by commas (default 64)")
    parser.add_argument("--depth", type=int, default=2, help="blocks (default 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of training steps (default 1)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the task's, chosen at a width of 64; wider models may want less)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.depth < 1 or options.scale <= 0 or (options.lr is not None and options.lr <= 0):
        raise CommandError("--seeds and --depth are at least 1, and --scale and --lr are positive")
    return options


def _learn_all(options: argparse.Namespace, findings: Any, console: Console) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mmlong.cli.mixer_words import mixers_of
    from mmlong.diagnose import Cell, Setting, learn, list_probes
    from mmlong.mixers import list_mixers
    from mmlong.registry import nearest

    probes = list(dict.fromkeys(name for part in options.tasks.split(",") for name in list_probes(part.strip())))
    for part in options.tasks.split(","):
        if not list_probes(part.strip()):
            raise CommandError(
                f"--tasks: there is no task {part!r}{nearest(part, list_probes())}; tasks: {', '.join(list_probes())}"
            )
    try:
        dims = [int(part) for part in options.dims.split(",")]
    except ValueError:
        raise CommandError(f"--dims {options.dims!r} are no widths like 32,64") from None
    mixers = [mixer for text in options.mixers for mixer in mixers_of(text, list_mixers(causal=True))]
    settings = [
        Setting(mixer, probe, dim, options.depth, seed, options.scale, options.lr)
        for mixer in mixers for dim in dims for probe in probes for seed in range(options.seeds)
    ]  # fmt: skip
    missing = [s for s in settings if s.key not in findings.cells]
    if done := len(settings) - len(missing):
        console.print(f"{done} of {len(settings)} cells are there already")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(missing))
        for setting in missing:

            def told(step: int, steps: int, accuracy: float, setting: Setting = setting) -> None:
                progress.update(bar, description=f"{setting.key}: step {step}/{steps}, {accuracy:.1%}")

            progress.update(bar, description=setting.key)
            try:
                cell = learn(setting, told)
            except (ValueError, TypeError, RuntimeError) as error:
                cell = Cell(setting, failed=reason(error))
            keep(findings, cell, options.json)
            progress.advance(bar)
            said = cell.failed or ", ".join(f"{test} {value:.1%}" for test, value in cell.accuracy.items())
            console.print(f"{setting.key}: {said} ({cell.steps} steps, {cell.seconds:.0f} s)")
