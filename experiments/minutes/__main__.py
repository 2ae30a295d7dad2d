"""Recipes against what people would pick instead: the same split, the same CPU minutes, several seeds, one run after another.

    python -m mmlong.experiments.minutes --json found.json --markdown found.md
    python -m mmlong.experiments.minutes RECIPE ... --minutes 12 --seeds 0 1 2 --json found.json

Who takes part, and for how many minutes, is in :mod:`mmlong.experiments.minutes.contenders`. A training step of each is measured first, on the recipe's own batches and in CPU time, so that what else runs on the machine hardly matters; each then trains as many as the minutes hold, the learning rate falling over them, and is tested
with its last weights. Evaluation is not counted. Every row is kept when it is done, one that failed with the reason, so a command that was stopped goes on; ``--retry`` tries again what failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
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
from mmlong.registry import nearest
from mmlong.results import markdown_table


def compute(
    table: TrialTable, recipe: str, one: Contender, setting: Mapping[str, Any], args: argparse.Namespace
) -> Row:
    """Run a simple model in a process of its own, unless its row is there, and keep what came of it."""
    given = dict(args.set)
    words = ["-m", "mmlong.experiments.minutes.simple", recipe, *one.program, f"--minutes={setting['minutes']:g}"]
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
    minutes = SUBJECTS[recipe].minutes if args.minutes is None else args.minutes
    rows = []
    for one in contenders(recipe, load_recipes(list(recipes))):
        if one.kind not in args.only or (args.contenders and one.name not in args.contenders):
            continue
        setting = {"recipe": recipe, "contender": one.name, "kind": one.kind, "minutes": minutes}
        if one.program:
            rows.append(compute(table, recipe, one, setting, args))
            told(recipe, rows[-1])
            continue
        for seed in args.seeds:
            trial = Trial(recipes, {**one.options, **dict(args.set)}, seed)
            name = f"{recipe}, {one.name}, seed {seed}"
            rows.append(
                table.try_one(
                    trial, setting, args.runs, None, minutes, args.threads, args.retry,
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


def best(summaries: Sequence[Summary], kind: str, named: bool = True) -> str:
    """The best of a kind in a cell, or what stands where there is none."""
    found = [one for one in summaries if one.setting["kind"] == kind]
    if not found:
        return ""
    first = found[0]
    return f"{first.told}: {first.setting['contender']}" if named and first.values else first.told


def overview(tables: Mapping[tuple[str, float], Sequence[Summary]]) -> str:
    """A line a recipe: itself, and the best of each sort beside it."""
    head = ["recipe", "CPU min", "test metric", "the recipe", *(f"best {WHAT[kind]}" for kind in KINDS if kind not in ("default", "peers")), WHAT["peers"]]  # fmt: skip
    body = [
        [
            f"`{recipe}`", f"{minutes:g}", SUBJECTS[recipe].metric.removeprefix("test/").replace("_", " "), best(found, "default", False),
            best(found, "simple"), best(found, "mixer"), best(found, "peers", False),
        ]
        for (recipe, minutes), found in tables.items()
    ]  # fmt: skip
    return markdown_table(head, body)


def markdown(rows: Iterable[Row]) -> str:
    """A line a recipe; then a table a recipe, best first, every row's command below it, and what failed with the reason."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.setting["recipe"], row.setting["minutes"]), []).append(row)
    tables = {
        (recipe, minutes): better_first(
            summarise(groups[recipe, minutes], SUBJECTS[recipe].metric),
            SUBJECTS[recipe].metric.endswith(LESS_IS_BETTER),
        )
        for recipe, minutes in sorted(groups, key=lambda one: (list(SUBJECTS).index(one[0]), one[1]))
    }
    return "\n".join([overview(tables), *(table_of(*key, found) for key, found in tables.items())])


def table_of(recipe: str, minutes: float, found: Sequence[Summary]) -> str:
    """One recipe's, for so many minutes."""
    metric = SUBJECTS[recipe].metric
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
    text = f"## {recipe}, {minutes:g} CPU minutes\n\n{markdown_table(head, map(lines_of, found))}"
    if note := shorter(recipe):
        text += f"\n{note}\n"
    commands = "\n".join(f"- {one.setting['contender']}: `{command_line(one.rows[0].command)}`" for one in found)
    text += f"\nCommands (of the first seed):\n\n{commands}\n"
    failed = [
        f"- {row.setting['contender']}, seed {row.seed}: {row.failed}"
        for one in found
        for row in one.rows
        if row.failed
    ]
    return text + ("\nFailed:\n\n" + "\n".join(failed) + "\n" if failed else "")


@answers
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 1 if a row failed."""
    parser = experiment_parser("minutes", __doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--minutes", type=float, help="CPU minutes of training for each (default: the recipe's of these, " + ", ".join(f"{name} {one.minutes:g}" for name, one in SUBJECTS.items()) + ")")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and dropout (default 0 1 2)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="only these sorts")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--show", action="store_true", help="nothing is run; the tables of what --json holds")
    add_trial_options(parser, Path("runs/minutes"))
    add_result_options(parser, "RUNS/found.json")
    args = parser.parse_args(argv)
    for name in args.recipes:
        if name not in SUBJECTS:
            parser.error(
                f"there is no table of {name!r}{nearest(name, SUBJECTS)}; there is one of {', '.join(SUBJECTS)}"
            )
    if (args.minutes is not None and not args.minutes > 0) or args.threads < 1:
        parser.error("--minutes is above 0, --threads at least 1")
    try:
        table = TrialTable.load(args.json or args.runs / "found.json")
    except BadTableError as error:
        parser.error(str(error))
    if args.show:
        return show(table, args)
    words = sys.argv[1:] if argv is None else argv
    table.about = {
        "command": ["python", "-m", "mmlong.experiments.minutes", *words], "machine": describe("cpu", args.threads)
    }  # fmt: skip
    rows = [row for recipe in args.recipes or SUBJECTS for row in compare(table, recipe, args)]
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    return 1 if any(row.failed for row in rows) else 0


def show(table: TrialTable, args: argparse.Namespace) -> int:
    """Tables of the rows that are there."""
    rows = [
        row
        for row in table.rows.values()
        if row.setting["recipe"] in (args.recipes or SUBJECTS) and args.minutes in (None, row.setting["minutes"])
    ]
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    else:
        print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
