"""Prove on a GPU, once, that every op and backend computes what it computes on a CPU, and say how fast.

``python -m mmlong.experiments.gpu_check [--device cuda] [--only attention linear_attention ... mixers] [--tokens 777] [--length 16384] [--no-speed] [--json FILE]``

For every op, question and backend there is: outputs, final state and gradients in float32, bfloat16 and float16 against the same inputs in float64 on a CPU, where the tests prove them. Then
seconds and peak memory of forward and backward at ``--length`` tokens. Then every mixer: this device against a CPU, and whole against pieces with the state carried. ``absent`` is not
installed, or not for this device; ``refused`` says itself that it cannot do this. A float32 product in TF32 is allowed its coarseness.

Exit status 0 if nothing FAILs, 1 if something does, 2 without a CUDA device. ``--device cpu`` runs the proofs, with what there is on a CPU, and no timing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from mmlong.experiments.gpu_check.cases import CASES, Sizes
from mmlong.experiments.gpu_check.measure import TYPES, Row, check_mixers, check_op, time_op
from rich.console import Console
from rich.table import Table

from mmlong.cli.console import wide_console
from mmlong.mixers import list_mixers

STYLES = {"PASS": "green", "FAIL": "bold red", "absent": "dim", "refused": "yellow"}


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    if device == "cuda":
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        found |= {"gpu": name, "capability": f"{capability[0]}.{capability[1]}", "cuda": torch.version.cuda}
    return found | {"float32_matmul_precision": torch.get_float32_matmul_precision()}


def run(options: argparse.Namespace, console: Console) -> list[Row]:
    """All rows; each is told as it comes."""
    device, gpu = options.device, options.device == "cuda"
    width = 64 if gpu else 16
    small = Sizes(batch=3, length=options.tokens, heads=4, groups=2, width=width, state=width)
    large = Sizes(batch=1, length=options.length, heads=8, groups=1, width=64, state=64)
    rows: list[Row] = []

    def tell(more: list[Row]) -> None:
        rows.extend(more)
        for row in more:
            if row.status == "FAIL":
                console.print(f"FAIL {row.what}, {row.backend}, {row.dtype}: {row.note}", markup=False)

    for case in CASES:
        if case.op in options.only:
            console.print(f"{case.op}: {case.name} ...", markup=False)
            tell(check_op(case, small, device, list(TYPES)))
            if gpu and case.timed and options.speed:
                tell(time_op(case, large, device, ["fp32", "bf16"]))
    if "mixers" in options.only:
        for name in list_mixers():
            console.print(f"mixer {name} ...", markup=False)
            tell(check_mixers([name], device, 128 if gpu else 16, options.tokens, ["fp32", "bf16"]))
    return rows


def show(rows: list[Row], console: Console) -> None:
    """The table; a backend that is absent has one line an op."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "backend", "type", "error", "allowed", "ms", "GB", "note"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading in ("error", "allowed", "ms", "GB") else "left"
        )
    missing: set[tuple[str, str]] = set()
    for row in rows:
        if row.status == "absent":
            op = row.what.partition(":")[0]
            if (op, row.backend) not in missing:
                missing.add((op, row.backend))
                table.add_row("absent", op, row.backend, "", "", "", "", "", row.note, style=STYLES["absent"])
            continue
        number = ("" if n is None else f"{n:.1e}" for n in (row.error, row.allowed))
        ms = "" if row.seconds is None else f"{1e3 * row.seconds:.2f}"
        gb = "" if row.gigabytes is None else f"{row.gigabytes:.2f}"
        style = STYLES[row.status]
        table.add_row(row.status, row.what, row.backend, row.dtype, *number, ms, gb, row.note, style=style)
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parts = [*dict.fromkeys(case.op for case in CASES), "mixers"]
    parser = argparse.ArgumentParser(prog="python -m mmlong.experiments.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="ops, and mixers (default: all)")
    parser.add_argument("--tokens", type=int, default=777, help="of a row that is compared, at least 16")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the row that is timed")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="compare only")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    options = parser.parse_args(argv)
    if options.tokens < 16 or options.length < 16:
        parser.error("--tokens and --length must be at least 16")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; --device cpu checks what a CPU can", file=sys.stderr)
        return 2
    console = wide_console(200)
    rows = run(options, console)
    show(rows, console)
    counts = {status: sum(row.status == status for row in rows) for status in STYLES}
    found = machine(options.device)
    console.print(f"\n{found}\n{counts}", markup=False)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": found, "counts": counts, "rows": [r.dict() for r in rows]}, indent=2)
        )
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
