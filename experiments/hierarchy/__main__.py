"""Equal CPU minutes (:mod:`mmlong.experiments.equal_minutes`) for the flat backbone and for hierarchies.

``python -m mmlong.experiments.hierarchy NAME ... [--minutes 12] [--seed 0] [--forms FORM ...] [--runs runs] [--json FILE] [--markdown FILE]``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmlong.experiments import equal_minutes
from mmlong.experiments.equal_minutes import Row, fit
from mmlong.experiments.generation.__main__ import measure
from mmlong.experiments.hierarchy.subjects import SUBJECTS

from mmlong.cli.recipes import load_recipes
from mmlong.cli.timing import step_seconds
from mmlong.models import AutoregressiveModel, load_model
from mmlong.results import markdown_table

PAST, DRAWN = 1024, 128
"""Random tokens that are read, and tokens that are then drawn one by one, to time generation."""


def train(name: str, form: str, args: argparse.Namespace, run: Path) -> Row:
    """Measure a step, train as many as the minutes hold, test; what came of it."""
    subject = SUBJECTS[name]
    options = {**subject.shared, **subject.forms[form]}
    seconds, parameters = step_seconds(load_recipes([subject.recipe]), options)
    trained = fit([subject.recipe], options, seconds, args.minutes, args.seed, run)
    model = load_model(run)
    codes = isinstance(model, AutoregressiveModel) and model.modality.codes == 256
    generated = measure(model.eval(), PAST, DRAWN)[0] if codes else None
    return {
        "form": form, "parameters": parameters, **trained.row, subject.metric: trained.summary[subject.metric],
        "token_ms": generated and round(1e3 * generated, 3),
    }  # fmt: skip


def table(found: dict[str, list[Row]]) -> str:
    """Markdown of all that was found."""
    head = ["what", "backbone", "parameters", "steps", "CPU s a step", "result", "generation"]
    lines = []
    for name, rows in found.items():
        metric = SUBJECTS[name].metric
        for row in rows:
            drawn = "" if row["token_ms"] is None else f"{row['token_ms']:.2f} ms a token"
            lines.append(
                [
                    f"`{name}`, {row['minutes']:g} min, seed {row['seed']}", row["form"], f"{row['parameters']:,}", f"{row['steps']:,}",
                    f"{row['step_seconds']:.2f}", f"{metric} {row[metric]:.4f}", drawn,
                ]
            )  # fmt: skip
    return markdown_table(head, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    forms = {name: list(subject.forms) for name, subject in SUBJECTS.items()}
    return equal_minutes.compare("hierarchy", __doc__, forms, train, table, argv)


if __name__ == "__main__":
    sys.exit(main())
