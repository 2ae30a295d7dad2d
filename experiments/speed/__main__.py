"""Time our mixers against other people's modules of the same mechanism, with the same weights, and hold the promises of it.

``python -m mmlong.experiments.speed [mamba2 ...] [--length 65536] [--dim 256] [--batch 1] [--rounds 2] [--threads 0] [--json]``

The measurement is ``mmlong bench mixers --against``: the two sides in turn, each time in a process of its own, the best time of each; before that, outputs and input gradients are compared on a short
input. On a busy machine look at the ratio of processor times with ``--threads 1``. At the default size, exit status 1 if what is promised does not hold.
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import partial
from typing import Any

import torch
from mmlong.experiments.speed.contests import CONTESTS
from rich.console import Console
from rich.table import Table

from mmlong.bench.contest import Conditions, against, run_contests
from mmlong.bench.peers import PEERS, MissingPackageError, require
from mmlong.bench.process import RunJob, run_job
from mmlong.cli.console import wide_console

SIZE = {"length": 65536, "dim": 256, "batch": 1}
"""Where the promises of ``CONTESTS`` are made."""


def contest(name: str, options: argparse.Namespace, console: Console, run: RunJob = run_job) -> dict[str, Any]:
    """Both sides in turn; best times, largest memory."""
    entry = CONTESTS[name]
    peer = PEERS[entry.peer]
    conditions = Conditions(
        [options.length], options.dim, options.batch, rounds=options.rounds, repeats=options.repeats, threads=options.threads
    )  # fmt: skip
    sides = against(peer.mixer, entry.peer, {})
    say = partial(console.print, soft_wrap=True)
    rows = dict(zip(("ours", "theirs"), run_contests([sides], conditions, run, say), strict=True))
    for side, row in rows.items():
        if row.failed is not None:
            raise SystemExit(f"{name}, {side}: {row.failed}")
    best = {side: min(row.seconds) for side, row in rows.items()}
    cpu = {side: min(row.cpu_seconds) for side, row in rows.items()}
    peak = {side: row.peak_bytes or 0 for side, row in rows.items()}
    ratio = best["theirs"] / best["ours"]
    promised = all(getattr(options, key) == value for key, value in SIZE.items())
    return {
        "name": name,
        "rival": peer.title,
        **{key: getattr(options, key) for key in SIZE},
        "difference": rows["ours"].difference,
        "seconds": best,
        "forward_seconds": {side: min(row.forward_seconds) for side, row in rows.items()},
        "cpu_seconds": cpu,
        "peak_bytes": peak,
        "peak_bytes_before": {side: row.baseline_bytes for side, row in rows.items()},
        "ratio": ratio,
        "cpu_ratio": cpu["theirs"] / cpu["ours"] if cpu["ours"] else None,
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
            "-" if r["cpu_ratio"] is None else f"{r['cpu_ratio']:.2f}",
            *(f"{r['peak_bytes'][side] / 2**30:.2f}" for side in ("ours", "theirs")),
        )
    return made


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m mmlong.experiments.speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CONTESTS)}; default all")
    for key, value in SIZE.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--repeats", type=int, default=2, help="runs in each process")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in CONTESTS]:
        parser.error(f"unknown contest {unknown[0]!r}; known: {', '.join(CONTESTS)}")
    names = options.names or list(CONTESTS)
    try:
        require([PEERS[CONTESTS[name].peer] for name in names])
    except MissingPackageError as error:
        raise SystemExit(str(error)) from error
    console = wide_console(110, stderr=options.json)
    results = [contest(name, options, console) for name in names]
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        console.print(table(results, options.threads or torch.get_num_threads()))
    return 0 if all(r["holds"] for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
