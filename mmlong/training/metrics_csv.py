"""Metrics of a run in one CSV that a resumed run goes on with. (Lightning's own CSVLogger begins a new file.)"""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

METRICS = "metrics.csv"


class MetricsCSV(Logger):
    """``metrics.csv``: one row a step that logged something; columns are added as metrics appear.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / METRICS
        self.columns: list[str] = []
        self.rows: list[dict[str, str]] = read_metrics(self.path) if self.path.is_file() else []
        for row in self.rows:
            self.columns += [key for key in row if key not in self.columns]
        self._written = len(self.rows)
        self._stale = False

    @property
    def name(self) -> str:
        """Of the run folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds the whole configuration."""

    def keep_until(self, step: int) -> None:
        """Keep the rows of the first ``step`` steps (0 to ``step - 1``); a resumed run writes the later ones again."""
        kept = [row for row in self.rows if int(row["step"]) < step]
        if len(kept) < len(self.rows):
            self.rows, self._stale = kept, True

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add a row, or to the last row if it is of the same step."""
        values = {"step": str(step or 0), **{key: _text(value) for key, value in metrics.items() if key != "step"}}
        fresh = [key for key in values if key not in self.columns]
        self.columns += fresh
        self._stale |= bool(fresh)
        if self.rows and self.rows[-1]["step"] == values["step"] and not any(
            self.rows[-1].get(key) not in (None, value) for key, value in values.items() if key != "epoch"
        ):  # fmt: skip
            self.rows[-1].update(values)
            self._stale |= self._written == len(self.rows)
        else:
            self.rows.append(values)

    @rank_zero_only
    def save(self) -> None:
        """Write what is new; the whole file, in one step, where columns or earlier rows changed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._stale or not self.path.exists():
            partial = self.path.with_name(self.path.name + ".partial")
            with open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(partial, self.path)
        elif self._written < len(self.rows):
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerows(self.rows[self._written :])
        self._written, self._stale = len(self.rows), False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rest."""
        if self.rows:
            self.save()


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a ``metrics.csv``, without its empty fields; a last row cut short by a kill is left out."""
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(whole.splitlines())
    return [
        {key: value for key, value in row.items() if value}
        for row in rows
        if None not in row and row.get("step", "").isdigit()
    ]


def column(rows: list[dict[str, str]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    found = [(int(row["step"]), float(row[key])) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]
