"""``mmlong sweep``: a recipe with every combination of some options, seed by seed, each in a process of its own; the best by validation.

The table is kept run by run (``sweep.json``): a sweep that was killed goes on where it was, inside a run too, and what is done is not done again. What fails is a row with the reason. The test split is not looked at unless asked for: what is chosen by it is
measured by nothing.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes, main_recipes
from mmlong.cli.sweep_grid import Axis, combinations, parse_axes, short_names
from mmlong.cli.train import check_config, hush, pairs, split_arguments, words_of
from mmlong.results import markdown_table

if TYPE_CHECKING:
    from mmlong.cli.trial_table import Summary

USAGE = """\
usage: mmlong sweep -c RECIPE [-c RECIPE ...] --grid KEY=V1,V2 [KEY=V1,V2 ...] [--minutes M | --steps N] [--seeds S ...] [--KEY VALUE ...] [options]

Train a recipe with every combination of some options, each run in a process of its own, and say which is best on validation.
A sweep that was stopped goes on when the same command is given again; runs that are done are not repeated.

  -c RECIPE       a YAML file, or the name of a packaged recipe; several are merged, the later wins
  --grid          keys with the values to try, between commas: model.optim.lr=1e-3,3e-3 'model.backbone.mixers=[s4d],[{{name: mamba2, expand: 1}}]'
  --KEY VALUE     any key of the recipe, the same for all runs
  --minutes M     CPU minutes of training for each run: a step is measured first, and as many are trained as fit
  --steps N       steps of each run (default: the recipe's)
  --seeds S ...   of weights and dropout (default 0)
  --by METRIC     what is compared (default: the recipe's best_by, e.g. val/accuracy)
  --test          also test every run
  --threads N     of torch, in each run (default 1)
  --retry         try again what failed
  --out FOLDER    table, runs, logs and picture (default: runs/sweep/RECIPE)
  --markdown FILE write the table there too

recipes: {recipes}
"""


def run_sweep(argv: list[str]) -> int:
    """Run ``mmlong sweep``; the exit status: 1 if a run failed.

    Raises:
        CommandError: something is wrong with the command or the recipe; nothing was trained.
    """
    if not argv or any(arg in ("-h", "--help") for arg in argv):
        print(USAGE.format(recipes=", ".join(main_recipes())), end="")
        return 0 if argv else 2
    options, rest = _options(argv)
    names, overrides = split_arguments(rest)
    if not names:
        raise CommandError(f"which recipe? e.g. mmlong sweep -c image/mnist784 --grid model.optim.lr=1e-3,3e-3; recipes: {', '.join(main_recipes())}")  # fmt: skip
    axes = parse_axes(options.grid)
    hush()
    config = load_recipes(names)
    shared = dict(pairs(overrides))
    _check(config, names, shared, axes)
    from mmlong.cli.engine import LESS_IS_BETTER
    from mmlong.cli.trial import Trial
    from mmlong.cli.trial_table import BadTableError, TrialTable, better_first, summarise
    from mmlong.measure.machine import describe

    by = options.by or shared.get("best_by") or config.get("best_by") or "val/accuracy"
    out = options.out or Path("runs") / "sweep" / str(config["recipe"])
    try:
        table = TrialTable.load(out / "sweep.json")
    except BadTableError as error:
        raise CommandError(str(error), status=1) from error
    table.about = {"command": ["mmlong", "sweep", *argv], "machine": describe("cpu", options.threads), "by": by}
    settings = list(combinations(axes))
    plan = [(setting, seed) for setting in settings for seed in options.seeds]
    rows, titles = [], short_names([axis.key for axis in axes])
    for number, (setting, seed) in enumerate(plan, 1):
        told = f"{number} of {len(plan)}: {_named(setting, titles)}, seed {seed}"
        given: dict[str, Any] = {**shared, **setting}
        if not options.test:
            given.setdefault("test_after_fit", "null")
        row = table.try_one(
            Trial(tuple(names), given, seed), setting, out / "runs", options.steps, options.minutes, options.threads, options.retry,
            say=lambda what, told=told: print(f"{told}: {what}", flush=True),  # type: ignore[misc]
        )  # fmt: skip
        rows.append(row)
        print(f"{told}: {row.failed or _metric(row.metrics, by)}", flush=True)
    less = by.endswith(LESS_IS_BETTER)
    found = better_first(summarise(rows, by), less)
    _show(found, titles, by)
    try:
        if options.markdown:
            options.markdown.write_text(markdown(found, titles, by))
        if any(one.values for one in found):
            print(f"drawn in {draw(found, axes, titles, by, out / 'sweep.png')}")
    except OSError as error:
        raise CommandError(f"cannot write: {error}", status=1) from error
    _say_best(found, names, shared, titles, by)
    return 1 if any(row.failed for row in rows) else 0


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own = argparse.ArgumentParser(prog="mmlong sweep", add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--grid", nargs="+", action="extend", default=[])
    own.add_argument("--minutes", type=float)
    own.add_argument("--steps", type=int)
    own.add_argument("--seeds", type=int, nargs="+", default=[0])
    own.add_argument("--by")
    own.add_argument("--threads", type=int, default=1)
    own.add_argument("--test", action="store_true")
    own.add_argument("--retry", action="store_true")
    own.add_argument("--out", type=Path)
    own.add_argument("--markdown", type=Path)
    try:
        options, rest = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise CommandError(str(error).removeprefix("argument ")) from error
    if not options.grid:
        raise CommandError("what is to be tried? e.g. --grid model.optim.lr=1e-3,3e-3")
    if options.minutes is not None and options.steps is not None:
        raise CommandError("--minutes and --steps are two ways to say how long: give one of them")
    if (options.minutes is not None and not options.minutes > 0) or (options.steps is not None and options.steps < 1):
        raise CommandError("--minutes is above 0, --steps at least 1")
    if options.threads < 1 or len(set(options.seeds)) < len(options.seeds):
        raise CommandError("--threads is at least 1, and no seed comes twice")
    return options, rest


def _check(config: dict[str, Any], names: list[str], shared: dict[str, str], axes: list[Axis]) -> None:
    """Refuse a key that does not exist, or a value of another type, before anything is trained."""
    from mmlong.cli.build import parse

    for axis in axes:
        if axis.key in shared:
            raise CommandError(f"{axis.key} is in --grid and given besides: one of the two")
    for key in (*shared, *(axis.key for axis in axes)):
        if key in ("run_dir", "ckpt_path", "runs", "seed_everything", "print_config"):
            hint = "give --seeds" if key == "seed_everything" else "the sweep sees to it (--out)"
            raise CommandError(f"--{key}: {hint}")
    for setting in combinations(axes):
        words = words_of((), {**shared, **setting})
        check_config(config, words, " + ".join(names))
        parse(config, words)


def _named(setting: dict[str, Any], titles: dict[str, str]) -> str:
    return ", ".join(f"{titles[key]} {value}" for key, value in setting.items())


def _metric(metrics: dict[str, float], by: str) -> str:
    if by in metrics:
        return f"{by} {metrics[by]:.4f}"
    return (
        f"no {by}; it has {', '.join(sorted(name for name in metrics if name.startswith(('val/', 'test/')))) or 'none'}"
    )


def _lines(found: list[Summary], titles: dict[str, str], by: str) -> list[list[str]]:
    """Head and rows."""
    lines = [[*titles.values(), by, "seeds", "steps", "CPU minutes", "parameters", ""]]
    for one in found:
        rows = one.rows
        steps = sorted({row.steps for row in rows if row.steps is not None})
        minutes = [row.cpu_minutes for row in rows if row.cpu_minutes is not None]
        parameters = next((f"{row.parameters:,}" for row in rows if row.parameters is not None), "")
        tested = sorted({name for row in rows for name in row.metrics if name.startswith("test/") and name != by})
        more = [
            f"{name} {sum(v) / len(v):.4f}"
            for name in tested
            if (v := [r.metrics[name] for r in rows if name in r.metrics])
        ]
        why = [f"seed {row.seed}: {row.failed}" for row in rows if row.failed]
        lines.append(
            [
                *(str(one.setting[key]) for key in titles), one.told, str(len(one.values)), ", ".join(f"{n:,}" for n in steps),
                f"{sum(minutes) / len(minutes):.2f}" if minutes else "", parameters, "; ".join([*more, *why]),
            ]
        )  # fmt: skip
    return lines


def _show(found: list[Summary], titles: dict[str, str], by: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from mmlong.cli.console import wide_console

    head, *rows = _lines(found, titles, by)
    made = Table(box=None, pad_edge=False)
    for title in head:
        made.add_column(Text(title))
    for row in rows:
        made.add_row(*map(Text, row))
    wide_console(400).print(made)


def markdown(found: list[Summary], titles: dict[str, str], by: str) -> str:
    """The table, for a README."""
    head, *rows = _lines(found, titles, by)
    return markdown_table(head, rows)


def _say_best(found: list[Summary], names: list[str], shared: dict[str, str], titles: dict[str, str], by: str) -> None:
    from mmlong.cli.runs import command_line

    best = found[0]
    if best.mean is None:
        print(f"no run has {by}")
        return
    words = ["mmlong", "fit", *words_of(names, {**shared, **best.setting})]
    print(f"best: {_named(best.setting, titles)}: {by} {best.told}\ntrain it with: {command_line(words)}")


def number_of(text: str) -> float | None:
    """A value that is a number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def draw(found: list[Summary], axes: list[Axis], titles: dict[str, str], by: str, path: Path) -> Path:
    """The metric of every seed, and the mean: over the first key whose values are numbers, a line for each setting of the others; without one, a row a setting."""
    from matplotlib.figure import Figure

    told = [one for one in found if one.values]
    axis = next((a for a in axes if len(a.values) > 1 and all(number_of(v) is not None for v in a.values)), None)
    figure = Figure(figsize=(7, 4.2 if axis else 1.6 + 0.3 * len(told)), layout="constrained")
    plot = figure.subplots()
    if axis is None:
        for place, one in enumerate(reversed(told)):
            plot.plot(one.values, [place] * len(one.values), "o", color="C0", alpha=0.6)
            plot.plot([fmean(one.values)], [place], "|", color="k", markersize=14)
        plot.set_yticks(range(len(told)), [_named(one.setting, titles) for one in reversed(told)])
        plot.set_xlabel(by)
    else:
        groups: dict[str, list[Summary]] = {}
        for one in told:
            groups.setdefault(_named({k: v for k, v in one.setting.items() if k != axis.key}, titles), []).append(one)
        for number, (name, group) in enumerate(sorted(groups.items())):
            points = sorted((float(one.setting[axis.key]), one) for one in group)
            color = f"C{number % 10}"
            plot.plot(
                [x for x, _ in points], [fmean(one.values) for _, one in points], "-", color=color, label=name or None
            )
            for x, one in points:
                plot.plot([x] * len(one.values), one.values, "o", color=color, alpha=0.6)
        places = sorted(float(v) for v in axis.values)
        if places[0] > 0 and places[-1] / places[0] >= 8:
            plot.set_xscale("log")
        plot.set_xlabel(titles[axis.key])
        plot.set_ylabel(by)
        if any(groups):
            plot.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
