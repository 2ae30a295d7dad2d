"""Recall by distance: eight pairs told early, asked for at any distance (``mmlong diagnose``'s ``far_recall``), trained on up to 512 tokens.

``python -m mmlong.experiments.memory.recall [NAME ...] [--scale 1] [--seed 0] [--json FILE] [--plot FILE] [--markdown FILE] [--weights FOLDER]``

Accuracy on fresh sequences, by how far back what is asked lies at least. Every subject is kept when it is done, so a run that was stopped goes on where it was (``--json``); ``--weights`` keeps the models, which ``needle`` then need not learn anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from mmlong.experiments.command import add_result_options, experiment_parser, parse_names
from mmlong.experiments.memory.subjects import SUBJECTS, WINDOW, as_mixer, keep

from mmlong.diagnose import PROBES, Setting
from mmlong.diagnose.cell import learn_model
from mmlong.diagnose.report import Findings, markdown

PROBE = "far_recall"


def plot(findings: Findings, path: Path) -> None:
    """A line a subject: accuracy over distance."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    tests = PROBES[PROBE].tests
    distances = [size["near"] for size in tests.values()]
    for row in findings.rows():
        found = [findings.accuracies(row, PROBE, test) for test in tests]
        means = [sum(f) / len(f) if f else float("nan") for f in found]
        bare = row.mixer.startswith("local")
        name = row.mixer.split(":")[0] + (" (bare)" if bare else "")
        axis.plot(distances, means, "k--" if bare else "o-", label=name)
    axis.axhline(PROBES[PROBE].chance, color="0.7", linewidth=1)
    axis.axvline(2 * WINDOW, color="0.85", linewidth=6, zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(distances, [f"{d:,}" for d in distances])
    axis.set_xlabel("tokens between, at least (grey: where two windows end)")
    axis.set_ylabel("accuracy")
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = experiment_parser("memory.recall", __doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the probe's number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    add_result_options(parser, plot=True)
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="keep the models there")
    args = parse_names(parser, SUBJECTS, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    from mmlong.measure.machine import describe

    findings = Findings.load(args.json) if args.json and args.json.exists() else Findings()
    findings.machine, findings.command = (
        describe("cpu", args.threads),
        ["python", "-m", "mmlong.experiments.memory.recall", *sys.argv[1:]],
    )
    for name in args.names:
        setting = Setting(as_mixer(name), PROBE, seed=args.seed, scale=args.scale)
        if setting.key in findings.cells:
            continue
        cell, model = learn_model(
            setting, lambda step, steps, right, n=name: print(f"{n}: {step}/{steps}, {right:.1%}", flush=True)
        )
        findings.add(cell)
        if args.weights:
            keep(model, args.weights, setting)
        said = cell.failed or ", ".join(f"{test} {value:.1%}" for test, value in cell.accuracy.items())
        print(f"{name}: {said} ({cell.steps} steps, {cell.seconds:.0f} s)", flush=True)
        if args.json:
            findings.save(args.json)
    if args.plot:
        plot(findings, args.plot)
    if args.markdown:
        args.markdown.write_text(markdown(findings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
