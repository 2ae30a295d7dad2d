"""The page of one run: what it was, what came out, its curves, what it gets right and wrong, what it made, what it cost, and its whole configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mmlong.report.classifier import calibration, confusion_table, per_class
from mmlong.report.curves import number
from mmlong.report.document import Section, document
from mmlong.report.elements import Content, Markup, details, join, table, tag
from mmlong.report.gather import Run, listed, mapping
from mmlong.report.media import Budget, gallery
from mmlong.report.metrics import LAST, curves, numbers_behind, quantities, spans, test_results, title_of
from mmlong.report.settings import NOT_SET, changed, flatten, shown
from mmlong.training.progress import duration

UNKNOWN = "not recorded"
PERCENT = ("accuracy", "balanced_accuracy")


def report_page(run: Run, influence: Markup | None = None, budget: Budget | None = None) -> str:
    """The page.

    Args:
        run: what its folder holds.
        influence: of :func:`mmlong.report.influence.influence_figure`, where it was asked for.
        budget: how many bytes of files it may carry.
    """
    budget = budget or Budget()
    sections = [
        Section("about", "What it was", about(run)),
        Section("results", "What came out", results(run)),
        Section("curves", "Curves", _curves(run)),
        *_classifier(run),
        *_samples(run, budget),
    ]
    if influence is not None:
        sections.append(Section("influence", "Who influences whom", influence))
    sections += [Section("cost", "What it cost", cost(run)), Section("settings", "Settings", settings(run))]
    opening = [tag("p", sentence(run), class_="soft"), notice(run, budget), facts(run)]
    return document(run.name, opening, sections, f"Made by mmlong report of {run.folder.resolve()}.")


def sentence(run: Run) -> str:
    """The run in one line."""
    task = run.story.get("task") or str(mapping(run.config.get("model")).get("class_path", "")).rpartition(".")[2]
    data = mapping(run.story.get("data")).get("dataset_name") or flatten(run.config).get("data.dataset")
    state = (
        "finished" if run.finished else f"not finished, at step {run.last_step:,}" if run.last_step else "not finished"
    )
    return ", ".join(str(part) for part in (task, f"on {data}" if data else "", state) if part)


def notice(run: Run, budget: Budget) -> Markup | None:
    """What is missing, and how an unfinished run goes on."""
    missing = [*run.missing, *budget.refused]
    if run.predictions and "accuracy" in (tested := test_results(run)):
        right = sum(p.truth == p.prediction for p in run.predictions) / len(run.predictions)
        if abs(right - tested["accuracy"]) > 1e-4:
            missing.append(
                f"predictions.csv is of other weights or samples than the test: {right:.4f} of it is right, the test's accuracy is {tested['accuracy']:.4f}"
            )
    if not missing:
        return None
    on = None
    if not run.finished and run.checkpoints:
        on = tag(
            "p",
            "Go on with ",
            tag("code", f"mmlong fit --ckpt_path {run.folder}"),
            f" (the newest checkpoint is {run.checkpoints[0]}).",
        )
    elif not run.finished:
        on = tag("p", "It has no checkpoint to go on from.")
    head = "This page is not whole" if run.finished else "This run is not finished"
    return tag("div", tag("strong", head), tag("ul", [tag("li", m) for m in missing]), on, class_="notice", role="note")


def measured(name: str, value: float) -> str:
    """A metric as people say it."""
    return f"{value:.2%}" if name in PERCENT else f"{value:.4f}"


def gigabytes(size: Any) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f} GiB" if isinstance(size, (int, float)) else UNKNOWN


def facts(run: Run) -> Markup | None:
    """The most important numbers."""
    s = run.summary
    rows = [(f"test {title_of(k)}", measured(k, v)) for k, v in test_results(run).items()]
    if isinstance(s.get("train_seconds"), (int, float)):
        rows.append(("training", duration(s["train_seconds"])))
    steps = s.get("steps") or run.last_step
    if steps:
        rows.append(("steps", number(steps)))
    for key, name in (("parameters", "parameters"), ("tokens_per_second", "tokens a second")):
        if s.get(key):
            rows.append((name, number(s[key])))
    if s.get("peak_memory_bytes"):
        rows.append(("peak memory", gigabytes(s["peak_memory_bytes"])))
    return tag("dl", [tag("div", tag("dt", k), tag("dd", v)) for k, v in rows], class_="facts") if rows else None


def about(run: Run) -> Markup:
    """Recipe, commands, data, seed, versions, machine."""
    data, parts = mapping(run.story.get("data")), run.parts
    rows: list[list[Content]] = [
        ["recipe", " + ".join(mapping(run.story.get("recipes"))) or str(run.config.get("recipe", UNKNOWN))],
    ]
    for place, part in enumerate(parts):
        name = "command" if len(parts) == 1 else f"command {place + 1}"
        after = f", from {part['from']}" if part.get("from") else ""
        rows.append([name, [tag("code", str(part.get("command", UNKNOWN))), f" ({part.get('began', UNKNOWN)}{after})"]])
    if not parts:
        rows.append(["command", tag("code", str(run.summary["command"])) if "command" in run.summary else UNKNOWN])
    rows += [
        ["data", str(data.get("source") or flatten(run.config).get("data.dataset") or UNKNOWN)],
        ["licence of the data", str(data.get("licence") or UNKNOWN)],
    ]
    if run.story.get("class_names"):
        names = [str(name) for name in listed(run.story["class_names"])]
        rows.append(["classes", f"{len(names)}: {', '.join(names)}"])
    rows.append(["seed", shown(run.config.get("seed_everything", UNKNOWN))])
    rows.append(["weights", f"the {run.summary['weights']}" if run.summary.get("weights") else UNKNOWN])
    machines = [mapping(part.get("machine")) for part in parts]
    rows.append(["machine", "; then ".join(dict.fromkeys(machine(m, run) for m in machines)) or UNKNOWN])
    found = mapping(machines[-1].get("versions")) if machines else {}
    versions = {**{k: v for k, v in found.items() if k in ("torch", "numpy")}, **mapping(run.summary.get("versions"))}
    rows.append(["versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or UNKNOWN])
    commits = dict.fromkeys(str(m["commit"]) for m in machines if m.get("commit"))
    if commits:
        rows.append(
            [
                "commit of mmlong",
                f"{', '.join(commits)}{' (+: files differed from it)' if any(c.endswith('+') for c in commits) else ''}",
            ]
        )
    rows.append(["folder", str(run.folder.resolve())])
    return table("The run", [], rows, class_="wrap")


def machine(told: dict[str, Any], run: Run) -> str:
    """A machine in one line."""
    s = run.summary
    parts = [
        told.get("gpu"), told.get("processor"), f"{told['cores']} cores" if told.get("cores") else None,
        f"{told['threads']} threads" if told.get("threads") else None, f"on {told['device']}" if told.get("device") else None,
        f"{s['ranks']} ranks" if isinstance(s.get("ranks"), int) and s["ranks"] > 1 else None, told.get("system"),
        f"Python {told['python']}" if told.get("python") else None,
    ]  # fmt: skip
    return ", ".join(str(part) for part in parts if part)


def results(run: Run) -> Markup:
    """The test, later evaluations, and validation over the run."""
    parts: list[Content] = []
    if found := test_results(run):
        parts.append(table("Test", ["metric", "value"], [[title_of(k), measured(k, v)] for k, v in found.items()]))
    for name, values in run.evaluations.items():
        numbers = [[k, number(v)] for k, v in values.items() if isinstance(v, (int, float))]
        parts.append(
            table(
                f"{name}: measured later, of {values.get('checkpoint', 'an unknown checkpoint')}",
                ["metric", "value"],
                numbers,
            )
        )
    if told := spans(run.metrics):
        parts.append(table("Validation while training", ["metric", "last", "lowest", "highest"], told))
    if run.summary.get("skipped_samples"):
        parts.append(
            tag("p", f"Bad samples were skipped {number(run.summary['skipped_samples'])} times.", class_="bad")
        )
    return join(parts) if parts else tag("p", "Nothing was measured.")


def _curves(run: Run) -> Markup:
    names = [name for name in quantities(run.metrics) if name not in LAST]
    drawn = curves(run.metrics, names)
    if not drawn:
        return tag("p", "There are no numbers to draw.")
    return join(tag("div", drawn, class_="charts"), numbers_behind(run.metrics, names))


def _classifier(run: Run) -> list[Section]:
    if not run.predictions:
        return []
    names = [str(name) for name in listed(run.story.get("class_names"))]
    told = f"Of the {len(run.predictions):,} test samples in predictions.csv."
    body = join(
        tag("p", told, class_="soft"), confusion_table(run.predictions, names), per_class(run.predictions, names)
    )
    return [
        Section("confusion", "What is taken for what", body),
        Section("calibration", "How far to believe it", calibration(run.predictions)),
    ]


def _samples(run: Run, budget: Budget) -> list[Section]:
    parts: list[Content] = []
    judged = any(sample.prediction for sample in run.examples)
    if shown_ := gallery(run.examples, "test sample", budget):
        said = "Samples of the test with truth and prediction, mistakes first" if judged else "Samples of the test"
        parts += [tag("h3", said), shown_]
    if made := gallery(run.made, "drawn sample", budget):
        parts += [tag("h3", "What the model made"), made]
    if sheets := gallery(run.sheets, "sheet", budget):
        parts += [tag("h3", "Drawn by the run"), sheets]
    return [Section("samples", "Samples", join(parts))] if parts else []


def cost(run: Run) -> Markup:
    """Time, tokens, memory, and throughput over the run."""
    s = run.summary
    ranks = s.get("ranks") if isinstance(s.get("ranks"), int) else 1
    rows: list[list[Content]] = []

    def row(name: str, key: str, say: Any) -> None:
        rows.append([name, say(s[key]) if isinstance(s.get(key), (int, float)) else UNKNOWN])

    row("training alone, without evaluation and checkpoints", "train_seconds", duration)
    row(
        "CPU time of that, all threads together" + (", of the first rank" if ranks and ranks > 1 else ""),
        "train_cpu_seconds",
        duration,
    )
    if str(s.get("device", "")).startswith("cuda") and isinstance(s.get("train_seconds"), (int, float)):
        rows.append(["GPU time (training times ranks)", duration(s["train_seconds"] * (ranks or 1))])
    row("the last command from beginning to end, test included", "command_seconds", duration)
    row("tokens trained on", "tokens", number)
    row("tokens a second, on average", "tokens_per_second", number)
    row("peak memory", "peak_memory_bytes", gigabytes)
    if len(run.parts) > 1:
        rows.append(
            [
                "parts",
                f"{len(run.parts)} commands worked on it; training time, CPU time and tokens are of all, the rest of the last",
            ]
        )
    drawn = curves(run.metrics, [name for name in quantities(run.metrics) if name in LAST])
    return join(table("Cost", [], rows), tag("div", drawn, class_="charts") if drawn else None)


def settings(run: Run) -> Markup:
    """What differs from the recipe, and everything."""
    parts: list[Content] = []
    recipes = mapping(run.story.get("recipes"))
    if recipes and run.config:
        (first, base), *further = recipes.items()
        rows = changed(
            mapping(base), [mapping(one) for _, one in further], _words(run.story.get("overrides")), run.config
        )
        head = ["setting", f"in {first}", "in this run"]
        parts.append(
            table(f"What differs from {first}", head, rows, class_="wrap")
            if rows
            else tag("p", f"Nothing differs from {first}.")
        )
    elif run.config:
        parts.append(
            tag("p", "What differs from the recipe is not known: the run did not record its recipe.", class_="soft")
        )
    if run.config_text:
        parts.append(
            details(
                "The whole configuration (config.yaml)",
                tag("pre", run.config_text, tabindex=0, role="region", aria_label="config.yaml"),
            )
        )
    for name, later in run.later.items():
        before, after = flatten(run.config), flatten(later)
        keys = sorted(key for key in {*before, *after} if before.get(key, NOT_SET) != after.get(key, NOT_SET))
        rows = [(key, shown(before.get(key, NOT_SET)), shown(after.get(key, NOT_SET))) for key in keys]
        parts.append(table(f"{name}: how the run went on", ["setting", "before", "after"], rows, class_="wrap"))
    if run.summary:
        text = json.dumps(run.summary, indent=2, ensure_ascii=False)
        parts.append(
            details(
                "Everything that was summed up (summary.json)",
                tag("pre", text, tabindex=0, role="region", aria_label="summary.json"),
            )
        )
    return join(parts) if parts else tag("p", "The configuration is not known.")


def _words(value: Any) -> Sequence[str]:
    return [str(word) for word in listed(value)]
