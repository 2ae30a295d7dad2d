"""Time our mixers against other people's modules of the same mechanism, with the same weights.

``python -m mmlong.experiments.speed [mamba2 ...] [--length 65536] [--dim 256] [--batch 1] [--rounds 2] [--threads 0] [--json]``

The two sides run in turn, each time in a process of its own, and the best time of each counts, so that whatever else the machine does falls on both. Before
that, outputs and input gradients are compared on a short input. On a busy machine look at the ratio of processor times with ``--threads 1``. At the default size, exit status 1 if what is promised does not hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from typing import Any

import torch
from mmlong.experiments.speed.contests import CONTESTS
from rich.console import Console
from rich.table import Table

SIZE = {"length": 65536, "dim": 256, "batch": 1}
"""Where the promises of ``CONTESTS`` are made."""


def job(name: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a new process."""
    sizes = [f"--{key}={getattr(options, key)}" for key in (*SIZE, "repeats", "threads")]
    command = [sys.executable, "-m", "mmlong.experiments.speed.job", name, side, *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {side}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def contest(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Both sides in turn; best times, largest memory."""
    entry = CONTESTS[name]
    difference = job(name, "check", options)["difference"]
    if difference > entry.tolerance:
        raise SystemExit(f"{name}: ours and {entry.rival} differ by {difference:.2g}: there is nothing to compare")
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for i in range(options.rounds):
        for side, found in runs.items():
            found.append(job(name, side, options))
            console.print(f"{name}, round {i + 1}, {side}: {min(t['both'] for t in found[-1]['times']):.2f} s")
    times = {side: [t for r in found for t in r["times"]] for side, found in runs.items()}
    best = {side: {key: min(t[key] for t in all_) for key in all_[0]} for side, all_ in times.items()}
    peak = {side: max(r["peak"] for r in found) for side, found in runs.items()}
    ratio = best["theirs"]["both"] / best["ours"]["both"]
    promised = all(getattr(options, key) == value for key, value in SIZE.items())
    return {
        "name": name,
        "rival": entry.rival,
        **{key: getattr(options, key) for key in SIZE},
        "difference": difference,
        "seconds": {side: r["both"] for side, r in best.items()},
        "forward_seconds": {side: r["forward"] for side, r in best.items()},
        "cpu_seconds": {side: r["cpu"] for side, r in best.items()},
        "peak_bytes": peak,
        "peak_bytes_before": {side: found[0]["before"] for side, found in runs.items()},
        "ratio": ratio,
        "cpu_ratio": best["theirs"]["cpu"] / best["ours"]["cpu"],
        "promised_ratio": entry.ratio if promised else None,
        "promised_bytes": entry.memory if promised else None,
        "holds": not promised or (ratio >= entry.ratio and peak["ours"] <= entry.memory),
    }


def table(results: list[dict[str, Any]], threads: int) -> Table:
    made = Table(title=f"forward + backward, float32, {threads} threads, {platform.machine()}")
    for column in (
        "mixer",
        "tokens",
        "dim",
        "ours",
        "theirs",
        "ratio",
        "promised",
        "CPU ratio",
        "ours GB",
        "theirs GB",
    ):
        made.add_column(column, justify="left" if column == "mixer" else "right")
    for r in results:
        made.add_row(
            r["name"],
            f"{r['batch'] * r['length']:,}",
            str(r["dim"]),
            *(f"{r['seconds'][side]:.2f} s" for side in ("ours", "theirs")),
            f"{r['ratio']:.2f}",
            "" if r["promised_ratio"] is None else f"{r['promised_ratio']:g}",
            f"{r['cpu_ratio']:.2f}",
            *(f"{r['peak_bytes'][side] / 2**30:.2f}" for side in ("ours", "theirs")),
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mmlong.experiments.speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CONTESTS)}; default all")
    for key, value in SIZE.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--repeats", type=int, default=2, help="runs in each process")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in CONTESTS]:
        parser.error(f"unknown contest {unknown[0]!r}; known: {', '.join(CONTESTS)}")
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 110)
    results = [contest(name, options, console) for name in options.names or CONTESTS]
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        console.print(table(results, options.threads or torch.get_num_threads()))
    return 0 if all(r["holds"] for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
