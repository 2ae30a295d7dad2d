"""What trials came to: rows that are kept as soon as they are there, and their mean and spread over seeds.

The file is JSON and written whole or not at all. A row is named by what was trained (:meth:`mmlong.cli.trial.Trial.key`), so a command that was stopped finds what is done, and one with another recipe, grid or budget trains anew.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmlong.cli.trial import Cost, Trial, TrialFailedError, cost, fit_words, last_metrics, train
from mmlong.measure.budget import steps_within
from mmlong.results import read_json, write_json

FORMAT = 1


class BadTableError(ValueError):
    """A file that holds no such table; the message says which and why."""


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        key: see above.
        setting: what tells it from the others, by name; seeds aside.
        seed: of weights and dropout; ``None`` where nothing is drawn.
        metrics: by name, of the run's last validation and of its test.
        steps, step_seconds, cpu_minutes, parameters, flops: trained steps; CPU seconds of one, measured before; CPU minutes of all of the training; parameters; floating-point operations of all steps. ``None`` where it has none.
        command: as a person would type it.
        failed: why there are no metrics; empty if there are.
    """

    key: str
    setting: dict[str, Any]
    seed: int | None
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int | None = None
    step_seconds: float | None = None
    cpu_minutes: float | None = None
    parameters: int | None = None
    flops: float | None = None
    command: list[str] = field(default_factory=list)
    failed: str = ""


@dataclass
class TrialTable:
    """Rows and costs by key, in a file.

    Attributes:
        path: the file; ``None``: nothing is kept.
        about: what else is said of all rows.
    """

    path: Path | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None) -> TrialTable:
        """What an earlier command kept there, or an empty one.

        Raises:
            BadTableError: the file is something else.
        """
        if path is None or not path.exists():
            return cls(path)
        return read_json(path, "table of trials", partial(cls._of, path), BadTableError, FORMAT)

    @classmethod
    def _of(cls, path: Path, content: dict[str, Any]) -> TrialTable:
        rows = {row["key"]: Row(**row) for row in content["rows"]}
        return cls(path, rows, {key: Cost(**one) for key, one in content["costs"].items()}, content["about"])

    def save(self) -> None:
        """Write the file."""
        if self.path is None:
            return
        rows, costs = [asdict(row) for row in self.rows.values()], {key: asdict(c) for key, c in self.costs.items()}
        write_json(self.path, {"format": FORMAT, "about": self.about, "costs": costs, "rows": rows})

    def add(self, row: Row) -> Row:
        """Keep a row, in the place of an earlier one of its key."""
        self.rows[row.key] = row
        self.save()
        return row

    def done(self, key: str, retry: bool = False) -> bool:
        """Whether there is a row; with ``retry`` one that did not fail."""
        return key in self.rows and not (retry and self.rows[key].failed)

    def try_one(
        self, trial: Trial, setting: Mapping[str, Any], folder: Path, steps: int | None = None, minutes: float | None = None, threads: int = 1,
        retry: bool = False, say: Callable[[str], None] = lambda _: None,
    ) -> Row:  # fmt: skip
        """Train a trial unless it is there, and keep what came of it, a failure too.

        Args:
            trial, setting: what, and what tells it apart.
            folder: where run folders and logs go.
            steps, minutes: how long: steps, or CPU minutes; neither: as the recipe says.
            threads: of torch.
            retry: try again what failed.
            say: is told where it works.
        """
        key = trial.key(trial.seed, steps, minutes)
        if self.done(key, retry):
            return self.rows[key]
        run = folder / key
        common: dict[str, Any] = {"key": key, "setting": dict(setting), "seed": trial.seed}
        try:
            if minutes is not None:
                say(f"measuring a step; {folder / trial.key('cost')}.log")
                steps = steps_within(minutes, self.cost_of(trial, folder, threads).seconds)
            found = self.costs.get(trial.key("cost"))
            say(f"{'training' if steps is None else f'{steps:,} steps'}; {run}.log")
            summary = train(trial, run, steps, threads)
        except TrialFailedError as error:
            return self.add(Row(**common, steps=steps, command=["mmlong", *fit_words(trial, steps)], failed=str(error)))
        tested = {name: float(value) for name, value in summary.items() if name.startswith("test/")}
        seconds = summary.get("train_cpu_seconds")
        return self.add(
            Row(
                **common, metrics={**last_metrics(run), **tested}, steps=summary["steps"],
                step_seconds=None if found is None else round(found.seconds, 4),
                cpu_minutes=None if seconds is None else round(seconds / 60, 2), parameters=summary["parameters"],
                flops=None if found is None else float(found.flops) * summary["steps"],
                command=["mmlong", *fit_words(trial, steps)],
            )
        )  # fmt: skip

    def cost_of(self, trial: Trial, folder: Path, threads: int = 1) -> Cost:
        """What a step takes, measured once for all seeds.

        Raises:
            TrialFailedError: it cannot be built or run.
        """
        key = trial.key("cost")
        if key not in self.costs:
            self.costs[key] = cost(trial, folder / f"{key}.log", threads)
            self.save()
        return self.costs[key]


@dataclass(frozen=True)
class Summary:
    """The rows of one setting.

    Attributes:
        setting: what they have in common.
        values: of the metric, one a seed that did not fail.
        rows: all of them.
    """

    setting: dict[str, Any]
    values: list[float]
    rows: list[Row]

    @property
    def mean(self) -> float | None:
        """Over seeds; ``None`` if all failed."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def told(self) -> str:
        """Mean, least and greatest, for people."""
        if not self.values:
            return "failed"
        if len(self.values) == 1:
            return f"{self.values[0]:.4f}"
        return f"{statistics.fmean(self.values):.4f} ({min(self.values):.4f} to {max(self.values):.4f})"


def summarise(rows: Iterable[Row], metric: str) -> list[Summary]:
    """Rows by setting, in order. A row without the metric counts as one without a value."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(row.setting, sort_keys=True), []).append(row)
    return [
        Summary(group[0].setting, [row.metrics[metric] for row in group if metric in row.metrics], group)
        for group in found.values()
    ]


def better_first(summaries: Sequence[Summary], less: bool) -> list[Summary]:
    """Best mean first, those that failed last. A setting of which a seed failed stands behind those of which none did."""

    def order(one: Summary) -> tuple[bool, bool, float]:
        mean = one.mean
        return mean is None, any(row.failed for row in one.rows), 0.0 if mean is None else mean if less else -mean

    return sorted(summaries, key=order)
