"""Equal CPU minutes (:mod:`mmlong.experiments.equal_minutes`) for a joint model and for each of its modalities alone: bits of each.

``python -m mmlong.experiments.joint NAME ... [--source FOLDER] [--minutes 5] [--seed 0] [--forms FORM ...] [--debug] [--json FILE] [--markdown FILE]``

All are the same recipe: the model alone is the joint one with one order of one span. Steps are timed on the recipe's own first batches, whose lengths are the data's. What a modality costs with nothing before it is what the two have in
common; what it costs behind the other is what only the joint model can.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlong.experiments import equal_minutes
from mmlong.experiments.equal_minutes import Row, fit

from mmlong.cli.recipes import load_recipes
from mmlong.cli.timing import own_step_seconds
from mmlong.results import markdown_table

SUBJECTS = {
    "digits_words": ("sound", "word"),
    "cells_sentences": ("picture", "sentence"),
    "pictures_sounds": ("picture", "sound"),
}
"""Recipes of ``joint/``, and their two modalities."""
JOINT = "joint"


def forms(modalities: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is compared, and the options of each."""
    alone = {
        f"{name} alone": {"model.orders": [[name]], "best_by": f"val/{name}/bits", "model.samples": 0}
        for name in modalities
    }
    return {JOINT: {"model.samples": 0}, **alone}


def step_seconds(recipes: Sequence[str], options: dict[str, Any]) -> tuple[float, int]:
    """CPU seconds of one training step of this process's threads on the first batches of the recipe's data, and the parameters."""
    return own_step_seconds(load_recipes(list(recipes)), options)


def train(name: str, form: str, args: argparse.Namespace, run: Path) -> Row:
    """Measure a step, train as many as the minutes hold, test; what came of it."""
    recipes = [f"joint/{name}", *([f"joint/{name}.debug"] if args.debug else [])]
    options = forms(SUBJECTS[name])[form]
    if args.source is not None:
        options = {**options, "data.source_path": str(args.source)}
    seconds, parameters = step_seconds(recipes, options)
    trained = fit(recipes, options, seconds, args.minutes, args.seed, run)
    found = {key.removeprefix("test/"): value for key, value in trained.summary.items() if key.startswith("test/")}
    return {"form": form, "parameters": parameters, **trained.row, "test": measures(found, SUBJECTS[name])}


def measures(found: dict[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """What a test told of each modality, by what came before it: of a model of one modality, nothing."""
    told = {}
    for name, other in (modalities, modalities[::-1]):
        for what in ("bits", "exact"):
            alone = found.get(f"{name}_after_nothing/{what}", found.get(f"{name}/{what}"))
            if alone is not None:
                told[f"{name}/{what}"] = alone
            if (behind := found.get(f"{name}_after_{other}/{what}")) is not None:
                told[f"{name} after {other}/{what}"] = behind
    return told


def table(found: dict[str, list[Row]]) -> str:
    """Markdown of all that was found: a table for each subject, and what sharing cost."""
    parts = []
    for subject, rows in found.items():
        names = list(dict.fromkeys(key for row in rows for key in row["test"]))
        heads = [key.replace("/bits", ", bits").replace("/exact", ", all right") for key in names]
        lines = [
            [
                f"{row['form']}, {row['minutes']:g} min, seed {row['seed']}", f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['step_seconds']:.3f}",
                *(f"{row['test'][key]:.4f}" if key in row["test"] else "" for key in names),
            ]
            for row in rows
        ]  # fmt: skip
        made = markdown_table([f"`{subject}`", "parameters", "steps", "CPU s a step", *heads], lines)
        parts.append("\n".join([made, *verdicts(rows, SUBJECTS[subject])]))
    return "\n\n".join(parts) + "\n"


def verdicts(rows: list[Row], modalities: Sequence[str]) -> list[str]:
    """For each modality, minutes and seed that both were trained for: what sharing did to its bits."""
    by = {(row["form"], row["minutes"], row["seed"]): row["test"] for row in rows}
    said = []
    for (form, minutes, seed), shared in by.items():
        for name in modalities if form == JOINT else ():
            if (alone := by.get((f"{name} alone", minutes, seed))) is not None:
                apart = shared[f"{name}/bits"] - alone[f"{name}/bits"]
                said.append(
                    f"After {minutes:g} CPU minutes each (seed {seed}), sharing {'costs' if apart > 0 else 'saves'} {name} {abs(apart):.4f} bits ({alone[f'{name}/bits']:.4f} alone, {shared[f'{name}/bits']:.4f} joint)."
                )
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, help="folder or file of data that comes in no package")
        parser.add_argument("--debug", action="store_true", help="the debug size of each recipe")

    every = {name: list(forms(modalities)) for name, modalities in SUBJECTS.items()}
    return equal_minutes.compare("joint", __doc__, every, train, table, argv, 5.0, more)


if __name__ == "__main__":
    sys.exit(main())
