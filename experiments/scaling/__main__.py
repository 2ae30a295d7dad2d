"""Does more compute help as a power law, and does the model use what it sees? Five sizes and five lengths of the past, fitted, and each fit held against a sixth point.

    python -m mmlong.experiments.scaling text genome --json found.json --markdown found.md --plot found.png

Sizes are widths of the recipe's backbone, each trained on ``--tokens-per-parameter`` tokens a parameter, and tested as the recipe is; compute is counted (:mod:`mmlong.measure.flops`), operations of all training steps. Then the largest of the five reads the test documents with its state carried: bits at position ``t``
of a document, and bits of the same stretches of tokens behind 64, 256, ... tokens of their past and nothing else. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmlong.experiments.command import add_result_options, add_trial_options, answers, experiment_parser, keep, kept
from mmlong.experiments.scaling.context import bits_at, bits_given, stretches
from mmlong.experiments.scaling.fit import PowerLaw, fit_power_law
from mmlong.experiments.scaling.subjects import SUBJECTS, Subject

from mmlong.cli.errors import CommandError
from mmlong.cli.runs import command_line
from mmlong.cli.trial import Trial, TrialFailedError
from mmlong.cli.trial_table import BadTableError, TrialTable
from mmlong.measure.machine import describe
from mmlong.results import markdown_table

FITTED = 5
"""Points that a law is fitted to; the one behind them it is held against."""
DEBUG = {
    "dims": (16, 20, 24, 28, 32, 40), "contexts": (4, 8, 16, 32, 64, 128), "ratio": 0.2, "width": 8, "count": 4,
}  # fmt: skip


def debug_size(subject: Subject) -> Subject:
    """The same in seconds: the recipe's debug size on top, tiny widths, few tokens."""
    recipes = (*subject.recipes, *(f"{name}.debug" for name in subject.recipes))
    options = {key: value for key, value in subject.options.items() if key != "data.batch_size"}
    return dataclasses.replace(subject, recipes=recipes, options=options, **DEBUG)


def train_sizes(name: str, subject: Subject, table: TrialTable, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every size trained: ``dim``, ``parameters``, ``tokens``, ``flops``, ``bits``, ``steps``, the run's folder and command.

    Raises:
        CommandError: one failed; a law needs them all.
    """
    found = []
    for dim in subject.dims:
        trial = Trial(subject.recipes, {**subject.options, "model.backbone.dim": dim, **dict(args.set)}, args.seed)
        try:
            one = table.cost_of(trial, args.runs, args.threads)
        except TrialFailedError as error:
            raise CommandError(f"{name}, dim {dim}: {error}", status=1) from error
        steps = max(1, round(subject.ratio * one.parameters / one.tokens))
        row = table.try_one(
            trial, {"subject": name, "dim": dim}, args.runs, steps, threads=args.threads, retry=args.retry,
            say=lambda what, dim=dim: print(f"{name}, dim {dim}: {what}", flush=True),  # type: ignore[misc]
        )  # fmt: skip
        if row.failed:
            raise CommandError(f"{name}, dim {dim}: {row.failed}", status=1)
        found.append(
            {
                "dim": dim, "parameters": one.parameters, "steps": row.steps, "tokens": one.tokens * (row.steps or 0), "flops": row.flops,
                "cpu_minutes": row.cpu_minutes, "bits": row.metrics["test/bits"], "key": row.key, "command": row.command,
            }
        )  # fmt: skip
        print(
            f"{name}, dim {dim}: {one.parameters:,} parameters, {found[-1]['bits']:.4f} bits a {subject.unit}",
            flush=True,
        )
    return found


def look_back(subject: Subject, run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Bits at positions, and behind pasts of several lengths, of the model of a run."""
    import torch

    from mmlong.cli.build import build, parse
    from mmlong.cli.recipes import load_recipes
    from mmlong.knn.documents import Documents
    from mmlong.models import AutoregressiveModel, load_model

    torch.set_num_threads(args.threads)
    model = load_model(run)
    assert isinstance(model, AutoregressiveModel)
    data, _ = build(*parse(load_recipes([str(run / "config.yaml")]), []))
    data.prepare_data()
    test = Documents(data, "test", model.modality)
    documents = [test.tokens(number) for number in range(len(test))]
    lengths = [tokens.shape[1] for tokens in documents]
    most = max(subject.contexts)
    try:
        targets = stretches(lengths, most, subject.width, subject.count)
    except ValueError as error:
        raise CommandError(str(error), status=1) from error
    edges = [0, *(2**power for power in range(3, most.bit_length()))]
    at = bits_at(model, documents, edges)
    return {
        "position": [[low, high, bits] for low, high, bits in zip(edges, edges[1:], at, strict=False)],
        "past": [[past, bits_given(model, documents, targets, subject.width, past)] for past in subject.contexts],
        "targets": {"width": subject.width, "count": len(targets)},
    }


def checked(points: list[tuple[float, float]]) -> dict[str, Any]:
    """The law of all points but the last, and what it says of that one."""
    (xs, ys), (x, y) = zip(*points[:FITTED], strict=True), points[FITTED]
    law = fit_power_law(xs, ys)
    said = law(x)
    return {"law": dataclasses.asdict(law), "predicted": said, "measured": y, "off": said / y - 1}


def study(name: str, subject: Subject, table: TrialTable, before: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    """All that is found of a subject; ``before``: what an earlier command found."""
    sizes = train_sizes(name, subject, table, args)
    key = [sizes[FITTED - 1]["key"], list(subject.contexts), subject.width, subject.count]
    looked = dict(before.get("context") or {})
    if looked.get("key") != key:
        print(f"{name}: reading the test documents", flush=True)
        looked = {"key": key, **look_back(subject, args.runs / sizes[FITTED - 1]["key"], args)}
    looked["check"] = checked([(past, bits) for past, bits in looked["past"]])
    return {
        "recipe": subject.recipes[0], "unit": subject.unit, "tokens_per_parameter": subject.ratio, "seed": args.seed, "sizes": sizes,
        "check": checked([(one["flops"], one["bits"]) for one in sizes]), "context": looked,
    }  # fmt: skip


def said(law: Mapping[str, float], x: str) -> str:
    """A law as a formula."""
    return f"{law['floor']:.4g} + {law['scale']:.4g} {x}^-{law['exponent']:.4g}"


def _check(check: Mapping[str, Any], x: str) -> str:
    return (
        f"Fit of the first {FITTED}: {said(check['law'], x)}. Of the sixth it says {check['predicted']:.4f}; measured {check['measured']:.4f} "
        f"({100 * check['off']:+.2f} %)."
    )


def markdown(found: Mapping[str, Any]) -> str:
    """Tables, fits and commands."""
    parts = []
    for name, one in found.items():
        unit = one["unit"]
        sizes = [
            [str(s["dim"]), f"{s['parameters']:,}", f"{s['tokens']:,}", f"{s['flops']:.3g}", str(s["cpu_minutes"]), f"{s['bits']:.4f}"]
            for s in one["sizes"]
        ]  # fmt: skip
        head = ["dim", "parameters", "tokens", "FLOPs", "CPU min", f"test bits a {unit}"]
        targets = one["context"]["targets"]
        pasts = [[f"{past:,}", f"{bits:.4f}"] for past, bits in one["context"]["past"]]
        at = ", ".join(f"{low:,} to {high:,}: {bits:.3f}" for low, high, bits in one["context"]["position"] if bits is not None)  # fmt: skip
        commands = "\n".join(f"- dim {s['dim']}: `{command_line(s['command'])}`" for s in one["sizes"])
        parts.append(
            f"## {name}: {one['recipe']}, {one['tokens_per_parameter']:g} tokens a parameter, seed {one['seed']}\n\n"
            + markdown_table(head, sizes) + f"\n{_check(one['check'], 'C')}\n\nDim {one['sizes'][FITTED - 1]['dim']}, {targets['count']} stretches of {targets['width']} tokens of the test documents behind:\n\n"
            + markdown_table(["tokens of the past", f"bits a {unit}"], pasts) + f"\n{_check(one['context']['check'], 'n')}\n\nBits a {unit} at position: {at}.\n\n{commands}\n"
        )  # fmt: skip
    return "\n".join(parts)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A row a subject: loss against compute, against the past, and at positions."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8 * len(found)), layout="constrained")
    for axes, (name, one) in zip(figure.subplots(len(found), 3, squeeze=False), found.items(), strict=True):
        sides = (
            ("FLOPs of training", [(s["flops"], s["bits"]) for s in one["sizes"]], one["check"]),
            ("tokens of the past", one["context"]["past"], one["context"]["check"]),
        )
        for axis, (title, points, check) in zip(axes, sides, strict=False):
            xs, ys = zip(*points, strict=True)
            law = PowerLaw(**check["law"])
            line = np.geomspace(min(xs), max(xs), 100)
            axis.plot(line, [law(x) for x in line], "-", color="0.6", label=said(check["law"], "x"))
            axis.plot(xs[:FITTED], ys[:FITTED], "o", label="fitted")
            axis.plot(xs[FITTED:], ys[FITTED:], "s", label=f"held against ({100 * check['off']:+.1f} %)")
            axis.set_xlabel(title)
            axis.legend(fontsize="small")
        reached = [(low, high, bits) for low, high, bits in one["context"]["position"] if bits is not None]
        axes[2].plot([(low + high) / 2 for low, high, _ in reached], [bits for *_, bits in reached], "o-")
        axes[2].set_xlabel("position in the document")
        for axis in axes:
            axis.set_xscale("log")
            axis.set_ylabel(f"{name}: bits a {one['unit']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@answers
def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = experiment_parser("scaling", __doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=SUBJECTS, help=", ".join(SUBJECTS))
    parser.add_argument("--tokens-per-parameter", type=float, help="how long each size trains (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    add_trial_options(parser, Path("runs/scaling"))
    add_result_options(parser, "RUNS/found.json", plot=True)
    args = parser.parse_args(argv)
    if args.tokens_per_parameter is not None and not args.tokens_per_parameter > 0:
        parser.error("--tokens-per-parameter is above 0")
    file = args.json or args.runs / "found.json"
    try:
        table = TrialTable.load(args.runs / "table.json")
        found = dict(kept(file, {}).get("found", {}))
    except (BadTableError, ValueError, AttributeError) as error:
        parser.error(f"{file}: {error}")
    words = sys.argv[1:] if argv is None else argv
    about = {
        "command": ["python", "-m", "mmlong.experiments.scaling", *words],
        "machine": describe("cpu", args.threads),
    }
    for name in args.names:
        subject = debug_size(SUBJECTS[name]) if args.debug else SUBJECTS[name]
        if args.tokens_per_parameter is not None:
            subject = dataclasses.replace(subject, ratio=args.tokens_per_parameter)
        found[name] = study(name, subject, table, found.get(name, {}), args)
        keep(file, {**about, "found": found})
        for part, x in (("check", "C"), ("context", "n")):
            check = found[name][part]
            print(f"{name}: {_check(check if part == 'check' else check['check'], x)}")
    chosen = {name: found[name] for name in args.names}
    if args.markdown:
        args.markdown.write_text(markdown(chosen))
    if args.plot:
        draw(chosen, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
