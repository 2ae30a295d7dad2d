"""What was found, kept cell by cell as JSON, shown as a table and as a picture, and held against what is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mmlong.diagnose.cell import Cell, Setting
from mmlong.diagnose.orderings import ORDERINGS
from mmlong.diagnose.probes import PROBES
from mmlong.results import markdown_table, read_json, write_json

FORMAT = 1


class BadFindingsError(ValueError):
    """A file that holds no findings; the message says which and why."""


class Row(NamedTuple):
    """What a row of the table is about.

    Attributes:
        mixer: with its options.
        dim, depth: of the backbone.
        scale: of the probe's number of steps.
        lr: learning rate; ``None`` for the probe's.
    """

    mixer: str
    dim: int
    depth: int
    scale: float
    lr: float | None

    @classmethod
    def of(cls, setting: Setting) -> Row:
        """The row that a setting belongs to."""
        return cls(setting.name, setting.dim, setting.depth, setting.scale, setting.lr)

    @property
    def label(self) -> str:
        """The mixer, and how deep it was, how long and how fast it was trained, where not as usual."""
        deep = "" if self.depth == Setting.depth else f", depth {self.depth}"
        long = "" if self.scale == Setting.scale else f", {self.scale:g} x the steps"
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        return self.mixer + deep + long + rate


@dataclass
class Findings:
    """Cells, and the machine they were found on.

    Attributes:
        cells: by their key, in order.
        machine: :func:`mmlong.measure.machine.describe`.
        command: the words of the last command that added to them.
    """

    cells: dict[str, Cell] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        """Keep a cell, in the place of an earlier one of its setting."""
        self.cells[cell.setting.key] = cell

    def save(self, path: Path) -> None:
        """Write JSON: whole or not at all."""
        content = {
            "format": FORMAT, "command": self.command, "machine": self.machine,
            "cells": [cell.as_dict() for cell in self.cells.values()],
        }  # fmt: skip
        write_json(path, content)

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Read what :meth:`save` wrote.

        Raises:
            BadFindingsError: it cannot be read, or is something else.
        """
        return read_json(path, "findings of mmlong diagnose", cls._of, BadFindingsError, FORMAT)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Findings:
        cells = [Cell.from_dict(cell) for cell in content["cells"]]
        return cls({cell.setting.key: cell for cell in cells}, content["machine"], content["command"])

    def accuracies(self, row: Row, probe: str, test: str) -> list[float]:
        """Of all seeds."""
        return [
            cell.accuracy[test]
            for cell in self.cells.values()
            if Row.of(cell.setting) == row and cell.setting.probe == probe and test in cell.accuracy
        ]

    def mean(self, mixer: str, probe: str, test: str) -> float | None:
        """Over seeds, at the greatest width that was tried and there the best of depths, lengths of training and learning rates, as those who publish such figures search for them; ``None``: not measured."""
        settings = [cell.setting for cell in self.cells.values()]
        rows = {Row.of(one) for one in settings if one.name == mixer and one.probe == probe}
        widest = [row for row in rows if row.dim == max(row.dim for row in rows)]
        found = [self.accuracies(row, probe, test) for row in widest]
        return max((sum(one) / len(one) for one in found if one), default=None)

    def rows(self) -> list[Row]:
        """In order."""
        return list(dict.fromkeys(Row.of(cell.setting) for cell in self.cells.values()))

    def columns(self) -> list[tuple[str, str]]:
        """Probes and tests, in order."""
        probes = dict.fromkeys(cell.setting.probe for cell in self.cells.values())
        return [(probe, test) for probe in probes if probe in PROBES for test in PROBES[probe].tests]

    def published(self) -> list[tuple[str, bool]]:
        """Every published relation that the cells can answer, and whether it holds here."""
        return [said for ordering in ORDERINGS for said in ordering.check(self.mean)]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{100 * sum(values) / len(values):.0f}"
    spread = max(values) - min(values)
    return f"{mean} ±{50 * spread:.0f}" if spread > 0.02 else mean


def _rows(findings: Findings) -> list[list[str]]:
    columns = findings.columns()
    return [
        [row.label, str(row.dim), *(_cell(findings.accuracies(row, *column)) for column in columns)]
        for row in findings.rows()
    ]


def table(findings: Findings) -> Table:
    """Mean accuracy over seeds in per cent, and half the range of the seeds where they differ; a dash where nothing was measured."""
    made = Table(box=None, pad_edge=False)
    made.add_column("mixer", no_wrap=True)
    made.add_column("dim", justify="right")
    columns = findings.columns()
    for probe, test in columns:
        made.add_column(f"{probe}\n{test}", justify="right")
    for row in _rows(findings):
        made.add_row(*row)
    made.add_row("chance", "", *(f"{100 * PROBES[probe].chance:.0f}" for probe, _ in columns))
    return made


def markdown(findings: Findings) -> str:
    """The same, for a README."""
    head = ["mixer", "dim", *(f"{probe} {test}" for probe, test in findings.columns())]
    return markdown_table(head, _rows(findings))


def plot(findings: Findings, path: Path) -> None:
    """The table as a picture, dark where nothing is solved.

    Raises:
        ValueError: there are no cells.
    """
    rows, columns = findings.rows(), findings.columns()
    if not rows:
        raise ValueError("there is nothing to draw: no cell was finished")
    import matplotlib.figure
    import numpy as np

    grid = np.full((len(rows), len(columns)), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if found := findings.accuracies(row, *column):
                grid[i, j] = sum(found) / len(found)
    figure = matplotlib.figure.Figure(figsize=(3 + 0.55 * len(columns), 2.2 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    several = len({row.dim for row in rows}) > 1
    axis.set_yticks(range(len(rows)), [f"{row.label}, {row.dim}" if several else row.label for row in rows])
    axis.set_xticks(range(len(columns)), [f"{probe} {test}" for probe, test in columns], rotation=90)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axis.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color="k" if value > 0.6 else "w"
            )
    figure.colorbar(shown, ax=axis, label="accuracy", shrink=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
