"""Equal CPU minutes for what is compared: what the experiments that train several forms of one recipe share.

The CPU seconds of a training step are measured first (process time, so that what else runs on the machine hardly matters); a form trains as many steps as the minutes hold, its learning rate
falling over them as the recipe says, and is tested with its last weights. One thread each, one after another. A row is kept when it is done: a command that was stopped goes on (``--json``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmlong.experiments.command import add_result_options, experiment_parser, keep, kept

from mmlong.cli.train import words_of
from mmlong.cli.trial import alone, folder_option
from mmlong.measure import budget

Row = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        summary: its ``summary.json``.
        row: what every table tells of it.
    """

    summary: dict[str, Any]
    row: Row


def fit(recipes: Sequence[str], options: Mapping[str, Any], seconds: float, minutes: float, seed: int, run: Path) -> Trained:  # fmt: skip
    """Train as many steps as the minutes hold, and test. A run that is finished is not trained again, and one that was stopped goes on, with the steps that it began with.

    Args:
        recipes: one on top of the other.
        options: beside them.
        seconds: CPU seconds of a step.
        minutes: CPU minutes of training.
        seed: of the run.
        run: its folder.
    """
    steps = budget.steps_within(minutes, seconds)
    options = {**options, "trainer.max_steps": steps, "trainer.val_check_interval": steps, "seed_everything": seed}
    command = ["fit", *words_of(recipes, options)]
    with alone(run.with_name(f"{run.name}.lock")):
        if not (run / "summary.json").is_file():
            where = folder_option(run)
            words = ["fit", where] if where.startswith("--ckpt_path") else [*command, where]
            subprocess.run(
                [sys.executable, "-m", "mmlong", *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr,
                close_fds=False,  # it inherits the lock
            )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    computed = summary.get("train_cpu_seconds")
    row = {
        "steps": summary["steps"], "step_seconds": round(seconds, 3), "minutes": minutes, "seed": seed,
        "cpu_minutes": None if computed is None else round(computed / 60, 1),
        "train_minutes": round(summary["train_seconds"] / 60, 1), "command": ["mmlong", *command],
    }  # fmt: skip
    return Trained(summary, row)


def compare(
    experiment: str,
    text: str | None,
    forms: Mapping[str, Sequence[str]],
    train: Callable[[str, str, argparse.Namespace, Path], Row],
    table: Callable[[dict[str, list[Row]]], str],
    argv: Sequence[str] | None = None,
    minutes: float = 12.0,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """The command line of a comparison.

    Args:
        experiment: its name.
        text: its docstring.
        forms: by subject, names of what is compared.
        train: from subject, form, options and a run folder to a row, which has ``form``, ``minutes`` and ``seed``.
        table: Markdown of all rows, by subject.
        argv: words of the command.
        minutes: of each, unless told.
        more: adds options of its own.
    """
    parser = experiment_parser(experiment, text)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=forms, help=", ".join(forms))
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="only these")
    parser.add_argument("--minutes", type=float, default=minutes, help="CPU minutes of training for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs") / experiment)
    add_result_options(parser)
    more(parser)
    args = parser.parse_args(argv)
    for name in args.names:
        if unknown := [form for form in args.forms or () if form not in forms[name]]:
            parser.error(f"{name} has no form {unknown[0]!r}; it has: {', '.join(forms[name])}")
    torch.set_num_threads(1)
    found: dict[str, list[Row]] = kept(args.json, {})
    for name in args.names:
        rows = found.setdefault(name, [])
        for form in args.forms or forms[name]:
            if any((row["form"], row["minutes"], row["seed"]) == (form, args.minutes, args.seed) for row in rows):
                continue
            run = args.runs / name / f"{form.replace(' ', '_')}-{args.minutes:g}-{args.seed}"
            rows.append(train(name, form, args, run))
            print(json.dumps(rows[-1]), flush=True)
            keep(args.json, found)
    if args.markdown:
        args.markdown.write_text(table(found))
    return 0
