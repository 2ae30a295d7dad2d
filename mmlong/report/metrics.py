"""Curves and final numbers of a run's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmlong.report.curves import Line, chart, number
from mmlong.report.elements import Markup, details, table
from mmlong.report.gather import Run
from mmlong.training.metrics_csv import column
from mmlong.training.pictures import smooth

UNITS = {"bits": "bits a number of the data", "tokens_per_second": "tokens a second"}
TITLES = {
    "learning_rate": "Learning rate",
    "tokens_per_second": "Throughput",
    "auc": "AUC",
    "mse": "MSE",
    "mae": "MAE",
    "f1": "F1",
}
SPLITS = {"train": "training", "val": "validation"}
FIRST = ("loss", "bits", "accuracy", "balanced_accuracy")
LAST = ("learning_rate", "tokens_per_second")
SMOOTHED = 40
"""Points from which on a line of training is drawn smoothed, the points themselves faint behind it."""


def quantities(rows: Sequence[dict[str, str]]) -> list[str]:
    """What was measured in training and validation, without the split: ``loss``, ``accuracy``; the important first."""
    names = dict.fromkeys(key.partition("/")[2] for row in rows for key in row if key.partition("/")[0] in SPLITS)
    found = sorted(names, key=lambda n: (n in LAST, FIRST.index(n) if n in FIRST else len(FIRST), n))
    # A task that reports bits trains on them: its loss is the same curve, unless something is added to it.
    if "bits" in found and "loss" in found and column(list(rows), "train/bits") == column(list(rows), "train/loss"):
        found.remove("loss")
    return found


def title_of(quantity: str) -> str:
    """``balanced_accuracy`` to ``Balanced accuracy``."""
    return TITLES.get(quantity, quantity.replace("_", " ").replace("/", ", ").capitalize())


def lines_of(rows: Sequence[dict[str, str]], quantity: str, name: str = "", colour: int = 0) -> list[Line]:
    """A quantity in training and validation.

    Args:
        rows: of the metrics.
        quantity: without the split.
        name: of the run, where there are several; then both splits have the run's colour and validation is not broken, training is.
        colour: of training; validation has the next where there is one run.
    """
    lines = []
    for place, (split, said) in enumerate(SPLITS.items()):
        steps, values = column(list(rows), f"{split}/{quantity}")
        if not steps:
            continue
        look = colour if name else colour + place
        label = f"{name}, {said}" if name else said
        if split == "train" and len(steps) >= SMOOTHED and quantity not in LAST:
            if not name:
                lines.append(Line(label, steps, values, look, faint=True))
            values, label = smooth(values, max(len(values) // 20, 2)), f"{label}, smoothed"
        lines.append(Line(label, steps, values, look, dashed=bool(name) and split == "train"))
    return lines


def curves(rows: Sequence[dict[str, str]], names: Sequence[str]) -> list[Markup]:
    """A chart of each quantity."""
    # By number: a metric's name may hold what an id must not.
    places = {name: place for place, name in enumerate(quantities(rows))}
    charts = [
        chart(lines_of(rows, q), f"chart-{places[q]}", title_of(q), UNITS.get(q, "nats" if q == "loss" else ""))
        for q in names
    ]
    return [one for one in charts if one is not None]


def numbers_behind(rows: Sequence[dict[str, str]], names: Sequence[str]) -> Markup:
    """The validation's numbers, or the training's where there are none, for those who read rather than look."""
    split = "val" if any(key.startswith("val/") for row in rows for key in row) else "train"
    keys = [f"{split}/{q}" for q in names if any(f"{split}/{q}" in row for row in rows)]
    told = [row for row in rows if any(key in row for key in keys)]
    every = -(-len(told) // 50)
    shown = told[::-1][::every][::-1] if told else []
    cells = [[row["step"], *(number(float(row[key])) if key in row else "" for key in keys)] for row in shown]
    said = f"{SPLITS[split].capitalize()} at {len(shown)} of {len(told)} measured steps"
    head = ["step", *(title_of(key.partition("/")[2]) for key in keys)]
    return details("The numbers behind the curves", table(said, head, cells))


def spans(rows: Sequence[dict[str, str]]) -> list[list[Any]]:
    """Of each validation metric the last, lowest and highest value, and the steps."""
    found = []
    for name in dict.fromkeys(key for row in rows for key in row if key.startswith("val/")):
        steps, values = column(list(rows), name)
        least, most = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
        found.append([
            title_of(name.removeprefix("val/")), f"{number(values[-1])} (after step {steps[-1] + 1:,})", f"{number(values[least])} (after step {steps[least] + 1:,})",
            f"{number(values[most])} (after step {steps[most] + 1:,})",
        ])  # fmt: skip
    return found


def test_results(run: Run) -> dict[str, float]:
    """The test's metrics, by name without the split: of the end of training; of a later ``mmlong test`` where there was none."""
    for source in (run.summary, run.evaluations.get("test.json", {})):
        found = {
            k.removeprefix("test/"): float(v)
            for k, v in source.items()
            if k.startswith("test/") and isinstance(v, (int, float))
        }
        if found:
            return found
    return {}
