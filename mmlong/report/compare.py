"""The page of several runs: final metrics in a table, curves over each other, and the settings that are not the same."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from mmlong.report.curves import COLOURS, chart, number
from mmlong.report.document import Section, document
from mmlong.report.elements import Content, Markup, details, join, table, tag
from mmlong.report.gather import Run
from mmlong.report.metrics import UNITS, lines_of, quantities, test_results, title_of
from mmlong.report.page import UNKNOWN, gigabytes, measured
from mmlong.report.settings import differing
from mmlong.training.metrics_csv import column
from mmlong.training.progress import duration

MOST = COLOURS
"""Runs on a page: as many as there are colours."""


def comparison_page(runs: Sequence[Run]) -> str:
    """The page.

    Raises:
        ValueError: fewer than two runs, or more than there are colours.
    """
    if not 2 <= len(runs) <= MOST:
        raise ValueError(f"two to {MOST} runs can be compared on a page, not {len(runs)}")
    letters = list(ascii_uppercase[: len(runs)])
    who = table(
        "The runs",
        ["", "run", "folder"],
        [[letter, run.name, str(run.folder)] for letter, run in zip(letters, runs, strict=True)],
        class_="wrap",
    )
    sections = [
        Section("metrics", "Final metrics", _finals(runs, letters)),
        Section("curves", "Curves", _curves(runs, letters)),
        Section("settings", "Settings that differ", _settings(runs, letters)),
    ]
    missing = [f"{letter}: {said}" for letter, run in zip(letters, runs, strict=True) for said in run.missing]
    notice = None
    if missing:
        notice = tag(
            "div",
            tag("strong", "Not all of these runs are whole"),
            tag("ul", [tag("li", m) for m in missing]),
            class_="notice",
            role="note",
        )
    return document(f"{len(runs)} runs compared", [who, notice], sections, "Made by mmlong report --compare.")


def _finals(runs: Sequence[Run], letters: Sequence[str]) -> Markup:
    rows: list[list[Content]] = []
    tests = [test_results(run) for run in runs]
    for name in dict.fromkeys(key for one in tests for key in one):
        rows.append([f"test {title_of(name)}", *(measured(name, one[name]) if name in one else "—" for one in tests)])
    for name in dict.fromkeys(key for run in runs for row in run.metrics for key in row if key.startswith("val/")):
        cells = []
        for run in runs:
            steps, values = column(run.metrics, name)
            cells.append(
                f"{measured(name.removeprefix('val/'), values[-1])} (after step {steps[-1] + 1:,})" if values else "—"
            )
        rows.append([f"last validation {title_of(name.removeprefix('val/'))}", *cells])
    for key, name, say in (
        ("steps", "steps", number), ("tokens", "tokens trained on", number), ("train_seconds", "training", duration), ("train_cpu_seconds", "CPU time", duration),
        ("tokens_per_second", "tokens a second", number), ("parameters", "parameters", number), ("peak_memory_bytes", "peak memory", gigabytes),
    ):  # fmt: skip
        rows.append(
            [
                name,
                *(say(run.summary[key]) if isinstance(run.summary.get(key), (int, float)) else UNKNOWN for run in runs),
            ]
        )
    rows.append(["finished", *("yes" if run.finished else "no" for run in runs)])
    return table("Final metrics", ["", *letters], rows)


def _curves(runs: Sequence[Run], letters: Sequence[str]) -> Markup:
    names = dict.fromkeys(name for run in runs for name in quantities(run.metrics))
    drawn = []
    for place, name in enumerate(names):
        lines = [
            line
            for colour, (letter, run) in enumerate(zip(letters, runs, strict=True))
            for line in lines_of(run.metrics, name, letter, colour)
        ]
        one = chart(lines, f"chart-{place}", title_of(name), UNITS.get(name, "nats" if name == "loss" else ""))
        if one is not None:
            drawn.append(one)
    if not drawn:
        return tag("p", "There are no numbers to draw.")
    return join(
        tag("p", "Broken lines are training, whole ones validation.", class_="soft"), tag("div", drawn, class_="charts")
    )


def _settings(runs: Sequence[Run], letters: Sequence[str]) -> Markup:
    without = [letter for letter, run in zip(letters, runs, strict=True) if not run.config]
    known = [(letter, run) for letter, run in zip(letters, runs, strict=True) if run.config]
    said = tag("p", f"Without a configuration, and left out: {', '.join(without)}.", class_="bad") if without else None
    if len(known) < 2:
        return join(said, tag("p", "There are no two configurations to compare."))
    rows = [[name, *values] for name, values in differing([run.config for _, run in known])]
    if not rows:
        return join(said, tag("p", "All settings are the same."))
    told = table(f"{len(rows)} settings differ", ["setting", *(letter for letter, _ in known)], rows, class_="wrap")
    return join(said, told if len(rows) <= 40 else details(f"{len(rows)} settings", told))
