"""Equal CPU minutes for the flat backbone and for hierarchies, one after another, one thread each.

``python -m mmlong.experiments.hierarchy NAME ... [--minutes 12] [--seed 0] [--forms FORM ...] [--runs runs] [--json FILE] [--markdown FILE]``

The CPU seconds of a training step are measured first (process time, so that what else runs on the machine hardly matters); a form trains as many steps as the minutes hold, its learning rate
falling over them as the recipe says, and is tested with its last weights. A row is kept when it is done: a command that was stopped goes on (``--json``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from mmlong.experiments.generation.__main__ import measure
from mmlong.experiments.hierarchy.subjects import SUBJECTS, Subject

from mmlong.cli.build import build, parse
from mmlong.cli.recipes import load_recipes
from mmlong.estimate.step import TrainingStep, synthetic_batch
from mmlong.measure import budget
from mmlong.models import AutoregressiveModel, Model, load_model

PAST, DRAWN = 1024, 128
"""Random tokens that are read, and tokens that are then drawn one by one, to time generation."""


def given(options: dict[str, Any]) -> list[str]:
    """Options as words of a command."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def step_seconds(recipe: str, options: dict[str, Any]) -> tuple[float, int]:
    """CPU seconds of one training step of this process's threads, and the model's parameters."""
    config = load_recipes([recipe])
    _, task = build(*parse(config, given(options)))
    init = {
        **config["data"]["init_args"],
        **{key.removeprefix("data."): v for key, v in options.items() if key.startswith("data.")},
    }
    model: Model = task.model
    length = model.modality.tokens_per_sample() or init["length"]
    batch = synthetic_batch(task, init["batch_size"], length, init.get("windows") == "stream")
    if not model.modality.initialised:
        model.modality.initialise(batch["raw"])
    step = TrainingStep(task, {**config["trainer"], "precision": None, "accumulate_grad_batches": 1})
    return budget.step_seconds(step, [batch] * (budget.LEAST + 1)), model.num_parameters()


def train(subject: Subject, form: str, minutes: float, seed: int, run: Path) -> dict[str, Any]:
    """Measure a step, train as many as the minutes hold, test; what came of it. A run that is finished is not trained again."""
    options = {**subject.shared, **subject.forms[form]}
    seconds, parameters = step_seconds(subject.recipe, options)
    steps = budget.steps_within(minutes, seconds)
    options |= {"trainer.max_steps": steps, "trainer.val_check_interval": steps, "seed_everything": seed}
    command = ["fit", "-c", subject.recipe, *given(options)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not (run / "summary.json").is_file():
        subprocess.run(
            [sys.executable, "-m", "mmlong", *command, f"--run_dir={run}"],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr,
        )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads((run / "summary.json").read_text())
    steps = summary["steps"]
    model = load_model(run)
    codes = isinstance(model, AutoregressiveModel) and model.modality.codes == 256
    generated = measure(model.eval(), PAST, DRAWN)[0] if codes else None
    return {
        "form": form, "parameters": parameters, "steps": steps, "step_seconds": round(seconds, 3), "minutes": minutes, "seed": seed,
        "cpu_minutes": round((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60, 1),
        "train_minutes": round(summary["train_seconds"] / 60, 1), subject.metric: summary[subject.metric],
        "token_ms": generated and round(1e3 * generated, 3), "command": ["mmlong", *command],
    }  # fmt: skip


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown of all that was found."""
    lines = [
        "| what | backbone | parameters | steps | CPU s a step | result | generation |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        metric = SUBJECTS[name].metric
        for row in rows:
            drawn = "" if row["token_ms"] is None else f"{row['token_ms']:.2f} ms a token"
            lines.append(
                f"| `{name}`, {row['minutes']:g} min, seed {row['seed']} | {row['form']} | {row['parameters']:,} | {row['steps']:,} | {row['step_seconds']:.2f} | {metric} {row[metric]:.4f} | {drawn} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmlong.experiments.hierarchy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="+", metavar="NAME", choices=SUBJECTS, help=", ".join(SUBJECTS))
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="only these")
    parser.add_argument("--minutes", type=float, default=12.0, help="CPU minutes of training for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/hierarchy"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args(argv)
    for name in args.names:
        if unknown := [form for form in args.forms or () if form not in SUBJECTS[name].forms]:
            parser.error(f"{name} has no form {unknown[0]!r}; it has: {', '.join(SUBJECTS[name].forms)}")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = (
        json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    )
    for name in args.names:
        rows = found.setdefault(name, [])
        for form in args.forms or SUBJECTS[name].forms:
            if any((row["form"], row["minutes"], row["seed"]) == (form, args.minutes, args.seed) for row in rows):
                continue
            run = args.runs / name / f"{form.replace(' ', '_')}-{args.minutes:g}-{args.seed}"
            rows.append(train(SUBJECTS[name], form, args.minutes, args.seed, run))
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
