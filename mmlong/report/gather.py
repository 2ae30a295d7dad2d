"""A run folder as plain data: everything that is there, and in words what is missing or damaged.

Nothing is executed and no model is built: text, numbers and the bytes of pictures and sounds. A run that is still going, was stopped, or lost a file gives what it has.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mmlong.report.calibration import Prediction
from mmlong.report.settings import read_yaml
from mmlong.training.metrics_csv import read_metrics

CONFIG = "config.yaml"
CLASSIFIED = ("index", "truth", "prediction", "probability")
T = TypeVar("T")


class BadRunError(Exception):
    """There is nothing to report of: what is wrong, and what to do."""


@dataclass(frozen=True)
class Sample:
    """A file to be shown.

    Attributes:
        path: of the file.
        truth, prediction: names of classes; empty where there are none.
        probability: of the prediction, or not a number.
        index: id of the sample in the test split; ``None`` for what a model made.
        source: the file or record that the sample was packed from, where that is known.
    """

    path: Path
    truth: str = ""
    prediction: str = ""
    probability: float = math.nan
    index: int | None = None
    source: str = ""


@dataclass
class Run:
    """What a run folder holds.

    Attributes:
        folder: of the run.
        config: ``config.yaml`` as read; empty if there is none. ``config_text`` is the file.
        later: further configurations that a resumed run had, by file name.
        story: ``run.json``: recipes, command line, data, and every command that worked on the run.
        summary: ``summary.json``, which a run has when its training is over.
        evaluations: ``test.json`` and ``validate.json``, of later commands.
        metrics: rows of ``metrics.csv``.
        predictions: of a classifier's test.
        examples: samples of the test, with truth and prediction where it has them.
        made: samples that the model drew.
        sheets: pictures that the run drew itself, where there are no examples to show in their place.
        checkpoints: names of files, with the last step first.
        missing: what is not there or damaged, a sentence each.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    later: dict[str, dict[str, Any]] = field(default_factory=dict)
    story: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: list[dict[str, str]] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    examples: list[Sample] = field(default_factory=list)
    made: list[Sample] = field(default_factory=list)
    sheets: list[Sample] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The recipe, as far as it is known, and the folder."""
        recipe = self.summary.get("recipe") or self.story.get("recipe") or self.config.get("recipe")
        return f"{recipe} · {self.folder.name}" if recipe else self.folder.name

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return bool(self.summary)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The commands that worked on the run, in order."""
        return [part for part in listed(self.story.get("parts")) if isinstance(part, dict)]

    @property
    def last_step(self) -> int | None:
        """Steps that are in the metrics, counted from 1; ``None`` if none is."""
        return max((int(row["step"]) for row in self.metrics), default=-1) + 1 or None


def listed(value: Any) -> list[Any]:
    """A list, or an empty one of anything else: files that people edit may hold anything."""
    return value if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """A dictionary, or an empty one of anything else."""
    return value if isinstance(value, dict) else {}


def gather(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        BadRunError: it is no folder, or holds nothing that a run leaves.
    """
    if not folder.is_dir():
        raise BadRunError(f"{folder}: no such folder")
    run = Run(folder)
    config = _read(run, CONFIG, _text, "the configuration is not known")
    if config is not None:
        run.config_text = config
        run.config = _parsed(run, CONFIG, config) or {}
    for path in sorted(folder.glob("config-from-*.yaml")):
        text = _read(run, path.name, _text, "")
        parsed = _parsed(run, path.name, text) if text is not None else None
        if parsed is not None:
            run.later[path.name] = parsed
    run.story = _read(run, "run.json", _json, "the recipe, the machine and the data's licence were not recorded") or {}
    run.metrics = _read(run, "metrics.csv", _metrics, "there are no curves") or []
    run.summary = _read(run, "summary.json", _json, "training did not come to its end, or is still going on") or {}
    for name in ("test.json", "validate.json"):
        if (folder / name).exists() and (found := _read(run, name, _json, "")):
            run.evaluations[name] = found
    run.checkpoints = [path.name for path in sorted((folder / "checkpoints").glob("*.ckpt"), key=_step, reverse=True)]
    if not (run.config_text or run.summary or run.metrics or run.story):
        raise BadRunError(
            f"{folder} is no run folder: it has no {CONFIG}, run.json, metrics.csv or summary.json. `mmlong fit` makes one, under runs/"
        )
    run.predictions = _predictions(run)
    run.examples = _examples(run)
    run.made = _made(folder)
    if not run.examples:
        run.sheets = [Sample(path) for path in (folder / "predictions.png",) if path.is_file()]
    return run


def _read(run: Run, name: str, read: Callable[[Path], T], without: str) -> T | None:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(f"{name} is not there: {without}")
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        run.missing.append(f"{name} is damaged and left out: {error}")
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(_text(path))
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not names with values")
    return content


def _metrics(path: Path) -> list[dict[str, str]]:
    rows = read_metrics(path)
    for row in rows:
        for key, value in row.items():
            float(value) if key != "epoch" else None
    return rows


def _parsed(run: Run, name: str, text: str) -> dict[str, Any] | None:
    try:
        return read_yaml(text)
    except ValueError as error:
        run.missing.append(f"{name} {error}")
        return None


def _step(path: Path) -> tuple[int, str]:
    found = re.search(r"step=(\d+)", path.name)
    return (int(found[1]) if found else -1, path.name)


def _predictions(run: Run) -> list[Prediction]:
    one = run.folder / "predictions.csv"
    paths = [one] if one.is_file() else sorted(run.folder.glob("predictions.rank*.csv"))
    found: dict[int, Prediction] = {}
    for path in paths:
        rows = _read(run, path.name, _rows, "") or []
        if rows and not set(CLASSIFIED) <= set(rows[0]):
            return []  # of another task: numbers, tags
        for row in rows:
            try:
                p = Prediction(int(row["index"]), row["truth"], row["prediction"], float(row["probability"]))
                if not 0 <= p.probability <= 1:
                    raise ValueError(f"probability {p.probability}")
            except (ValueError, TypeError) as error:
                run.missing.append(f"{path.name} is damaged and left out: {error}")
                return []
            found[p.index] = p
    return [found[index] for index in sorted(found)]


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _examples(run: Run) -> list[Sample]:
    folder = run.folder / "examples"
    if not folder.is_dir():
        return []
    samples = []
    for row in _read(run, "examples/examples.csv", _rows, "what the examples are is not known") or []:
        name = row.get("file") or ""
        # A name and neither a path nor a link: a page holds no file from elsewhere.
        if not name or Path(name).name != name or not _own(folder / name):
            run.missing.append(f"examples/{name} is not there")
            continue
        try:
            probability = float(row.get("probability") or "nan")
            index = int(row["index"])
        except (ValueError, TypeError, KeyError):
            run.missing.append(f"examples/examples.csv is damaged in the row of {name}")
            continue
        samples.append(
            Sample(folder / name, row.get("truth") or "", row.get("prediction") or "", probability, index, row.get("source") or "")
        )  # fmt: skip
    return samples


def _made(folder: Path) -> list[Sample]:
    found = [*sorted(folder.glob("samples*")), *sorted((folder / "generated").glob("samples*"))]
    return [Sample(path) for path in found if _own(path)]


def _own(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
