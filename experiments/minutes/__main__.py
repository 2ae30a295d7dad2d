"""Recipes against what people would pick instead: the same split, the same CPU minutes, several seeds, one run after another.

    python -m mmlong.experiments.minutes RECIPE ... --minutes 12 --seeds 0 1 2 --json found.json --markdown found.md

Who takes part is in :mod:`mmlong.experiments.minutes.contenders`. A training step of each is measured first, on the recipe's own batches and in CPU time, so that what else runs on the machine hardly matters; each then trains as many as the minutes hold, the learning rate falling over them, and is tested
with its last weights. Evaluation is not counted. Every row is kept when it is done, one that failed with the reason, so a command that was stopped goes on; ``--retry`` tries again what failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmlong.experiments.command import add_result_options, add_trial_options, answers, experiment_parser
from mmlong.experiments.minutes import simple
from mmlong.experiments.minutes.contenders import KINDS, SUBJECTS, Contender, contenders

from mmlong.cli.engine import LESS_IS_BETTER
from mmlong.cli.recipes import load_recipes
from mmlong.cli.runs import command_line
from mmlong.cli.trial import Trial, TrialFailedError, run_logged
from mmlong.cli.trial_table import BadTableError, Row, Summary, TrialTable, better_first, summarise
from mmlong.measure.machine import describe
from mmlong.results import markdown_table


def compute(
    table: TrialTable, recipe: str, one: Contender, setting: Mapping[str, Any], args: argparse.Namespace
) -> Row:
    """Run a simple model in a process of its own, unless its row is there, and keep what came of it."""
    given = dict(args.set)
    words = ["-m", "mmlong.experiments.minutes.simple", recipe, *one.program, f"--minutes={args.minutes:g}"]
    if "data.source_path" in given:
        words.append(f"--source={given['data.source_path']}")
    key = hashlib.sha256(json.dumps([load_recipes([recipe]), words]).encode()).hexdigest()[:10]
    if table.done(key, args.retry):
        return table.rows[key]
    command, log = ["python", *words], args.runs / f"{key}.log"
    try:
        said = run_logged(words, log, args.threads)
    except TrialFailedError as error:
        return table.add(Row(key, dict(setting), None, command=command, failed=str(error)))
    found = next(json.loads(x.removeprefix(simple.MARK)) for x in said.splitlines() if x.startswith(simple.MARK))
    return table.add(Row(key, dict(setting), None, found["metrics"], cpu_minutes=found["cpu_minutes"], command=command))


def compare(table: TrialTable, recipe: str, args: argparse.Namespace) -> list[Row]:
    """All rows of one recipe, what is missing run now."""
    recipes = (recipe, f"{recipe}.debug") if args.debug else (recipe,)
    rows = []
    for one in contenders(recipe, load_recipes(list(recipes))):
        if one.kind not in args.only or (args.contenders and one.name not in args.contenders):
            continue
        setting = {"recipe": recipe, "contender": one.name, "kind": one.kind}
        if one.program:
            rows.append(compute(table, recipe, one, setting, args))
            told(recipe, rows[-1])
            continue
        for seed in args.seeds:
            trial = Trial(recipes, {**one.options, **dict(args.set)}, seed)
            name = f"{recipe}, {one.name}, seed {seed}"
            rows.append(
                table.try_one(
                    trial, setting, args.runs, None, args.minutes, args.threads, args.retry,
                    say=lambda what, name=name: print(f"{name}: {what}", flush=True),  # type: ignore[misc]
                )
            )  # fmt: skip
            told(recipe, rows[-1])
    return rows


def told(recipe: str, row: Row) -> None:
    """Say what a row came to."""
    metric = SUBJECTS[recipe].metric
    value = row.failed or (f"{metric} {row.metrics[metric]:.4f}" if metric in row.metrics else f"no {metric}")
    print(f"{recipe}, {row.setting['contender']}: {value}", flush=True)


WHAT = {
    "default": "the recipe",
    "simple": "simple",
    "peers": "the same backbone, other people's layers",
    "mixer": "the same backbone, another mixer",
}


def lines_of(one: Summary) -> list[str]:
    """A row of the markdown, cell by cell."""
    rows = one.rows
    known = [row for row in rows if not row.failed]
    steps = sorted({f"{row.steps:,}" for row in known if row.steps is not None})
    seconds = next((f"{row.step_seconds:.3g}" for row in rows if row.step_seconds is not None), "")
    minutes = [row.cpu_minutes for row in known if row.cpu_minutes is not None]
    parameters = next((f"{row.parameters:,}" for row in known if row.parameters is not None), "")
    seeds = "nothing is drawn" if all(row.seed is None for row in rows) else str(len(one.values))
    return [
        one.setting["contender"], WHAT[one.setting["kind"]], one.told, seeds, ", ".join(steps), seconds,
        f"{sum(minutes) / len(minutes):.2f}" if minutes else "", parameters,
    ]  # fmt: skip


def shorter(recipe: str) -> str:
    """A sentence where other people's layers are tested on shorter rows than the rest, which see more of the past."""
    length = SUBJECTS[recipe].peers.get("data.eval_length")
    ours = load_recipes([recipe])["data"]["init_args"].get("eval_length")
    if length is None or ours is None or length >= ours:
        return ""
    return f"Other people's layers are tested on rows of at most {length:,} tokens, the rest on rows of {ours:,} and with more of the past: a part of the difference may be that."


def markdown(rows: Sequence[Row], minutes: float) -> str:
    """A table a recipe, best first, every row's command below it, and what failed with the reason."""
    parts = []
    for recipe in dict.fromkeys(row.setting["recipe"] for row in rows):
        metric = SUBJECTS[recipe].metric
        found = better_first(
            summarise([row for row in rows if row.setting["recipe"] == recipe], metric), metric.endswith(LESS_IS_BETTER)
        )
        head = [
            "who",
            "what",
            f"{metric}, mean (least to greatest)",
            "seeds",
            "steps",
            "CPU s a step",
            "CPU min trained",
            "parameters",
        ]
        body = markdown_table(head, map(lines_of, found))
        commands = "\n".join(f"- {one.setting['contender']}: `{command_line(one.rows[0].command)}`" for one in found)
        failed = [
            f"- {row.setting['contender']}, seed {row.seed}: {row.failed}"
            for one in found
            for row in one.rows
            if row.failed
        ]
        if note := shorter(recipe):
            body += f"\n{note}\n"
        parts.append(f"## {recipe}, {minutes:g} CPU minutes\n\n{body}\nCommands (of the first seed):\n\n{commands}\n")
        if failed:
            parts.append("Failed:\n\n" + "\n".join(failed) + "\n")
    return "\n".join(parts)


@answers
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 1 if a row failed."""
    parser = experiment_parser("minutes", __doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", choices=SUBJECTS, help=", ".join(SUBJECTS))
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU minutes of training for each (default 12)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and dropout (default 0 1 2)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="only these sorts")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these")
    add_trial_options(parser, Path("runs/minutes"))
    add_result_options(parser, "RUNS/found.json")
    args = parser.parse_args(argv)
    if not args.minutes > 0 or args.threads < 1:
        parser.error("--minutes is above 0, --threads at least 1")
    try:
        table = TrialTable.load(args.json or args.runs / "found.json")
    except BadTableError as error:
        parser.error(str(error))
    words = sys.argv[1:] if argv is None else argv
    table.about = {
        "command": ["python", "-m", "mmlong.experiments.minutes", *words], "minutes": args.minutes, "machine": describe("cpu", args.threads)
    }  # fmt: skip
    rows: list[Row] = []
    for recipe in args.recipes:
        rows += compare(table, recipe, args)
    if args.markdown:
        args.markdown.write_text(markdown(rows, args.minutes))
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
