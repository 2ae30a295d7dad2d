"""The table of oracles: whom every mixer is held against, and the largest differences.

``python -m mmlong.experiments.oracles [--out experiments/oracles/README.md]``

Runs the tests marked ``oracle`` (a few minutes on one thread) and writes the table. Exit status 0 if they pass, every mixer of the house has a row, and its output, its final
state (if it has one that is more than a cache) and its input gradient are each compared in one of its rows; else 1, with what is missing on stderr, and nothing is written.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mmlong.experiments.oracles.collect import QUANTITIES, Row, read, run

from mmlong.mixers import MIXERS, list_mixers
from mmlong.mixers.document import DocumentMixer
from mmlong.results import markdown_table

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "fla": "fla-core",
    "scipy": "scipy",
    "minGRU-pytorch": "minGRU-pytorch",
    "mambapy": "mambapy",
    "lru-pytorch": "lru-pytorch",
    "s5-pytorch": "s5-pytorch",
    "performer-pytorch": "performer-pytorch",
    "linear-attention-transformer": "linear-attention-transformer",
    "timm": "timm",
    "rotary-embedding-torch": "rotary-embedding-torch",
    "axial-attention": "axial-attention",
    "block-recurrent-transformer-pytorch": "block-recurrent-transformer-pytorch",
    "h-transformer-1d": "h-transformer-1d",
    "compressive-transformer-pytorch": "compressive-transformer-pytorch",
    "isab-pytorch": "isab-pytorch",
    "linformer": "linformer",
    "long-short-transformer": "long-short-transformer",
    "memorizing-transformers-pytorch": "memorizing-transformers-pytorch",
    "memory-compressed-attention": "memory-compressed-attention",
    "native-sparse-attention-pytorch": "native-sparse-attention-pytorch",
    "nystrom-attention": "nystrom-attention",
    "reformer-pytorch": "reformer-pytorch",
    "routing-transformer": "routing-transformer",
    "sinkhorn-transformer": "sinkhorn-transformer",
}
"""First word of an oracle -> its distribution."""

HEAD = """# Oracles

    python -m mmlong.experiments.oracles

Written by that command from the tests marked `oracle` in `tests/mixers`; not by hand. Each row is a mixer beside code that nobody here wrote, with its weights copied
across (or with the layer written out around somebody else's recurrence), or beside its definition, written out plainly in the test: the paper's equations token by token, or over all pairs. Figures are the largest absolute
difference over all the row's tests (lengths, options, carried states, documents), "of" the largest value beside it: outputs; the final state; the gradient with respect to the
input of a random function of both. Some of the others' code computes in float32 whatever it is given, which bounds the agreement in float64. Where a row has no state, that code does not give it.

"""


def house() -> list[str]:
    """Registered mixers that are the house's own."""
    return [name for name in list_mixers() if MIXERS[name].__module__.startswith("mmlong.mixers.")]


def missing(rows: Sequence[Row]) -> list[str]:
    """What no row shows, one line each."""
    found = []
    for name in house():
        seen = {q for row in rows if row.mixer == name for q in row.worst}
        traits = MIXERS[name].traits
        # What a mixer keeps slot by slot is what came in, not a result: that it is right shows in how it goes on, which the conformance suite looks at.
        caches = issubclass(MIXERS[name], DocumentMixer)
        has_state = traits.causal and traits.streaming and traits.state != "none" and not caches
        wanted = [q for q in QUANTITIES if q != "state" or has_state]
        lacking = [q for q in wanted if q not in seen]
        if lacking:
            found.append(f"{name}: no test marked oracle shows its {', '.join(lacking)}")
    return found


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    head = ["mixer", "held against", "dtype", "output", "state", "input gradient"]
    lines, before = [], ""
    for row in rows:
        cells = ["" if q not in row.worst else "{:.1e} of {:.2g}".format(*row.worst[q]) for q in QUANTITIES]
        name = "" if row.mixer == before else f"`{row.mixer}`"
        lines.append([name, row.oracle, row.dtype, *cells])
        before = row.mixer
    return markdown_table(head, lines)


def versions(rows: Sequence[Row]) -> str:
    """Those of the packages that the rows name."""
    used = {row.oracle.partition(":")[0] for row in rows if not row.ours}
    unknown = used - set(PACKAGES)
    if unknown:
        raise ValueError(f"oracles of unknown packages: {', '.join(sorted(unknown))}; known: {', '.join(PACKAGES)}")
    told = [f"{PACKAGES[name]} {metadata.version(PACKAGES[name])}" for name in PACKAGES if name in used | {"torch"}]
    return f"With {', '.join(told)}, on a CPU ({platform.machine()}).\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="oracles", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "README.md", help="where to write the table"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = run(report)
        if status:
            print(f"oracles: the tests did not pass (pytest's exit status {status}); nothing written", file=sys.stderr)
            return 1
        rows = read(report)
    lacking = missing(rows)
    if lacking:
        print("\n".join(["oracles: not complete; nothing written", *lacking]), file=sys.stderr)
        return 1
    options.out.write_text(f"{HEAD}{versions(rows)}\n{table(rows)}", encoding="utf-8")
    names = {row.mixer for row in rows}
    others = {row.mixer for row in rows if not row.ours}
    print(f"{len(names)} mixers, {len(others)} of them beside others' code: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
