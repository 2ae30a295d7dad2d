"""What was found in the arena, kept cell by cell as JSON, and shown as a table and a picture with what is published beside it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mmlong.arena.published import PUBLISHED
from mmlong.arena.tasks import TASKS
from mmlong.results import markdown_table, read_json, write_json

FORMAT = 1
DEFAULT, TRANSFORMER = "default", "transformer"
"""The recipe's own mixers; the benchmark's own Transformer in place of the recipe's model."""


class BadResultsError(ValueError):
    """A file that holds no results; the message says which and why."""


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        task, mixer, size, seed: what.
        data: what it read: the user's copy, what is drawn, or what stands in.
        minutes: CPU minutes that were allowed; 0 where steps were.
        accuracy: on the test split, 0 to 1; ``None`` where it failed.
        steps, samples, parameters: of the training.
        cpu_seconds: that training took.
        curve: (step, validation accuracy).
        command: that trained it.
        failed: why, in a line; empty where it did not.
        options: further options of the training, ``KEY=VALUE``.
    """

    task: str
    mixer: str
    size: str
    seed: int
    data: str
    minutes: float = 0.0
    accuracy: float | None = None
    steps: int = 0
    samples: int = 0
    parameters: int = 0
    cpu_seconds: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()
    command: tuple[str, ...] = ()
    failed: str = ""
    options: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, str, float, tuple[str, ...]]:
        """What makes it the same cell."""
        return self.task, self.mixer, self.size, self.seed, self.data, self.minutes, self.options

    @property
    def row(self) -> tuple[str, str]:
        """The mixer, and how it was trained, in words: its row of the table."""
        budget = f"{self.size}, {self.minutes:g} min" if self.minutes else self.size
        return self.mixer, ", ".join([budget, *self.options])


@dataclass
class Results:
    """Cells, and the machine they were found on.

    Attributes:
        cells: by key, in order.
        machine: :func:`mmlong.measure.machine.describe`.
    """

    cells: dict[tuple[Any, ...], Cell] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def add(self, cell: Cell) -> None:
        """Keep a cell, in the place of an earlier one."""
        self.cells[cell.key] = cell

    def save(self, path: Path) -> None:
        """Write JSON: whole or not at all."""
        cells = [dataclasses.asdict(cell) for cell in self.cells.values()]
        write_json(path, {"format": FORMAT, "machine": self.machine, "cells": cells})

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what :meth:`save` wrote.

        Raises:
            BadResultsError: it cannot be read, or is something else.
        """
        return read_json(path, "results of mmlong arena", cls._of, BadResultsError, FORMAT)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Results:
        made = [
            Cell(**{**cell, "curve": tuple((int(s), float(a)) for s, a in cell["curve"]), "command": tuple(cell["command"]), "options": tuple(cell["options"])})
            for cell in content["cells"]
        ]  # fmt: skip
        return cls({cell.key: cell for cell in made}, dict(content["machine"]))

    def tasks(self) -> list[str]:
        """Tasks that have a cell, in the arena's order."""
        there = {cell.task for cell in self.cells.values()}
        return [name for name in TASKS if name in there]

    def rows(self) -> list[tuple[str, str]]:
        """Rows of the table, in order."""
        return list(dict.fromkeys(cell.row for cell in self.cells.values()))

    def of(self, task: str, row: tuple[str, str]) -> list[Cell]:
        """The cells of a task in a row: its seeds."""
        return [cell for cell in self.cells.values() if cell.task == task and cell.row == row]


def told(cells: list[Cell]) -> str:
    """Mean accuracy in per cent, with half the range of several seeds; a star where what was read stands in for the benchmark's data; a dash where nothing is."""
    found = [cell.accuracy for cell in cells if cell.accuracy is not None]
    if not found:
        return "failed" if cells else "-"
    text = f"{100 * sum(found) / len(found):.1f}"
    if len(found) > 1:
        text += f" ±{50 * (max(found) - min(found)):.1f}"
    return text + ("*" if any(stands_in(cell) for cell in cells) else "")


def stands_in(cell: Cell) -> bool:
    """Whether its number does not compare with a published one, because its data are others."""
    task = TASKS.get(cell.task)
    return task is not None and task.is_stand_in(cell.data)


def chances(results: Results, name: str) -> list[tuple[bool, float]]:
    """Accuracy of guessing on each kind of data of a task that was read: whether it stands in, and how much."""
    return sorted(
        {(stands_in(cell), TASKS[name].chance_on(cell.data)) for cell in results.cells.values() if cell.task == name}
    )


def _lines(results: Results, published: bool) -> tuple[list[str], list[list[str]]]:
    tasks = results.tasks()
    head = ["mixer", "size", *(TASKS[name].key for name in tasks)]
    rows = []
    for row in results.rows():
        rows.append([*row, *(told(results.of(task, row)) for task in tasks)])
    if rows:
        guessed = (
            ", ".join(f"{100 * chance:.0f}{'*' * star}" for star, chance in chances(results, name)) for name in tasks
        )
        rows.append(["chance", "", *guessed])
    if published:
        for known in PUBLISHED:
            values = [known.accuracy.get(TASKS[name].key) for name in tasks]
            if any(value is not None for value in values):
                shown = ["" if v is None else v if isinstance(v, str) else f"{v:.2f}" for v in values]
                rows.append([known.system, f"published: {known.source}", *shown])
    return head, rows


def table(results: Results, published: bool = True) -> Table:
    """Test accuracy by mixer and task, with the published rows below."""
    head, rows = _lines(results, published)
    made = Table(box=None, pad_edge=False)
    for place, name in enumerate(head):
        made.add_column(name, no_wrap=not place, justify="left" if place < 2 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(results: Results, published: bool = True) -> str:
    """The same, for a README, with what was read below it."""
    head, rows = _lines(results, published)
    text = markdown_table(head, rows)
    star = " (\\*)"
    data = dict.fromkeys(
        f"`{cell.task}`: {cell.data}{star if stands_in(cell) else ''}" for cell in results.cells.values()
    )
    return text + ("\nRead: " + "; ".join(data) + ".\n" if data else "")


def plot(results: Results, path: Path) -> None:
    """Validation accuracy over samples seen, a panel a task, with chance and the published range as lines.

    Raises:
        ValueError: there are no cells.
    """
    import matplotlib.figure

    tasks = results.tasks()
    if not tasks:
        raise ValueError("there is nothing to draw: no cell was finished")
    across = min(len(tasks), 4)
    down = math.ceil(len(tasks) / across)
    figure = matplotlib.figure.Figure(figsize=(3.6 * across, 3 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, name in zip(axes, tasks, strict=False):
        for cell in results.cells.values():
            if cell.task != name or not cell.curve:
                continue
            each = cell.samples / max(cell.steps, 1)
            axis.plot([step * each for step, _ in cell.curve], [100 * a for _, a in cell.curve], label=f"{cell.mixer}, seed {cell.seed}")  # fmt: skip
        for _, chance in chances(results, name):
            axis.axhline(100 * chance, color="0.6", linestyle=":", linewidth=1)
        numbers = [v for row in PUBLISHED if isinstance(v := row.accuracy.get(TASKS[name].key), float)]
        if numbers and not any(stands_in(cell) for cell in results.cells.values() if cell.task == name):
            axis.axhspan(min(numbers), max(numbers), color="0.9", zorder=0)
        axis.set_title(f"{name}{' (stand-in)' if any(stands_in(c) for c in results.cells.values() if c.task == name) else ''}", fontsize=9)  # fmt: skip
        axis.set_xlabel("samples seen", fontsize=8)
        axis.set_ylabel("validation accuracy, %", fontsize=8)
        axis.tick_params(labelsize=8)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    for axis in list(figure.axes)[len(tasks) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
