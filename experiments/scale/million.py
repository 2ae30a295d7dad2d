"""One exact training step on a million tokens.

``python -m mmlong.experiments.scale.million [--tokens 1048576] [--dim 128] [--depth 4] [--segment 16384] [--data text|genome] [--mixer mamba2] [--keep 1] [--threads 0] [--json]``

Prints, and with ``--json`` as JSON:

- ``tokens``, ``seconds``: of one step (forward, backward, optimiser) in segments, and the ``bits`` a token that the fresh model needs;
- ``peak_gb``: the most memory that the step's process, a fresh one, has held (10^9 bytes, Python and torch included);
- ``time_ratio``: seconds a token against the same model on 16,384 tokens without segments, measured before and after, the best of each three, and of both the mean;
- ``grad_error``: the gradient in segments against the one without on 65,536 tokens, the length of the difference over the length of the gradient; ``grad_error_worst``: the same of the
  single parameter where it is largest.

At the default size, exit status 1 if what is promised does not hold: 4 GB, a ratio of 1.45 (recomputing costs 4/3), an error of 1e-4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from mmlong.experiments.scale.job import add_options
from rich.console import Console
from rich.table import Table

REFERENCE = 1 << 14
COMPARED = 1 << 16
PROMISED = {"peak_gb": 4.0, "time_ratio": 1.45, "grad_error": 1e-4}
SIZE = {"tokens": 1 << 20, "dim": 128, "depth": 4, "mixer": "mamba2"}
"""Where the promises are made; of either data."""


def job(what: str, options: argparse.Namespace, tokens: int, *more: str) -> dict[str, Any]:
    """One measurement in a new process."""
    same = [
        f"--{key}={getattr(options, key)}" for key in ("dim", "depth", "mixer", "segment", "keep", "data", "threads")
    ]
    command = [sys.executable, "-m", "mmlong.experiments.scale.job", what, f"--tokens={tokens}", *same, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} of {tokens:,} tokens: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures."""

    def reference() -> float:
        seconds = job("step", options, min(REFERENCE, options.tokens), "--whole", "--repeats=3")["seconds"]
        console.print(f"{min(REFERENCE, options.tokens):,} tokens without segments: {seconds:.2f} s")
        return seconds / min(REFERENCE, options.tokens)

    before = reference()
    console.print(f"{options.tokens:,} tokens in segments of {options.segment:,} ...")
    whole = job("step", options, options.tokens)
    console.print(f"... {whole['seconds']:.1f} s")
    per_token = (before + reference()) / 2
    compared = min(COMPARED, options.tokens)
    error = job("compare", options, compared)
    return {
        **{key: getattr(options, key) for key in ("tokens", "dim", "depth", "mixer", "segment", "keep", "data")},
        "seconds": whole["seconds"],
        "peak_gb": whole["peak"] / 1e9,
        "time_ratio": whole["seconds"] / options.tokens / per_token,
        "grad_error": error["error"],
        "grad_error_worst": error["worst"],
        "grad_error_tokens": compared,
        "bits": whole["bits"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mmlong.experiments.scale.million", description=__doc__)
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    options = parser.parse_args()
    console = Console(stderr=options.json)
    result = measure(options, console)
    promised = all(getattr(options, key) == value for key, value in SIZE.items())
    result["holds"] = not promised or all(result[key] <= most for key, most in PROMISED.items())
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        table = Table(title="one exact training step")
        table.add_column("figure")
        table.add_column("found", justify="right")
        table.add_column("promised", justify="right")
        for key, value in result.items():
            shown = f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if key == "tokens" else str(value)
            table.add_row(key, shown, f"{PROMISED[key]:g}" if promised and key in PROMISED else "")
        console.print(table)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
