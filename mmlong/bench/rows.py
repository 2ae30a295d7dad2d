"""Results as rows: one for each part, side, length, number format and mode, over all the processes that measured it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Attributes:
        kind: ``mixer``, ``block`` or ``model``.
        name: what it is, for people; rows of one name, side and setting differ in length alone.
        side: ``ours``, or the peer's name.
        against: the peer of the comparison, for both its sides; ``None`` where there is none.
        settings: options, direction and whatever else it was built with.
        dim, batch, length: its size; ``length`` is in tokens of a row.
        dtype: ``fp32``, or ``bf16`` (autocast).
        mode: ``forward`` (no graph) or ``both`` (forward and backward; of a model, the whole training step).
        seconds: of every run, in the order they were taken.
        forward_seconds: of its forward part.
        cpu_seconds: of processor time.
        peak_bytes, baseline_bytes: the most memory held by its process, and what was held before inputs were made; the largest of all processes.
        memory_bytes: between the two, the largest of all processes.
        flops: counted, all of it; ``None`` where it was not counted.
        useful_flops: see :mod:`mmlong.bench.flops`.
        difference: of the two sides' outputs and gradients; ``None`` where there is no peer, or it is another function.
        failed: why there is no result; then ``seconds`` may be empty.
    """

    kind: str
    name: str
    side: str
    against: str | None
    settings: dict[str, Any]
    dim: int
    batch: int
    length: int
    dtype: str
    mode: str
    seconds: tuple[float, ...] = ()
    forward_seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    baseline_bytes: int | None = None
    memory_bytes: int | None = None
    flops: int | None = None
    useful_flops: int | None = None
    difference: float | None = None
    failed: str | None = None

    @property
    def best(self) -> float | None:
        """The shortest run."""
        return min(self.seconds, default=None)

    @property
    def median(self) -> float | None:
        """The median run."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.batch * self.length

    def share(self, machine: dict[str, float]) -> float | None:
        """Useful FLOP/s of the shortest run over the machine's fastest product in this number format."""
        peak = machine.get(f"gemm_{self.dtype}")
        return self.useful_flops / self.best / peak if self.useful_flops and self.best and peak else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of :meth:`as_dict`, from JSON's lists too."""
        tuples = ("seconds", "forward_seconds", "cpu_seconds")
        given: dict[str, Any] = {key: tuple(value) if key in tuples else value for key, value in values.items()}
        return cls(**given)


def gather(row: Row, results: Sequence[dict[str, Any]]) -> Row:
    """``row`` with what its processes found; it failed if one of them did."""
    found = [r for r in results if "failed" not in r]
    times = [t for r in found for t in r["times"]]
    counted = next((r["flops"] for r in found if r.get("flops")), None)
    failed = next((r["failed"] for r in results if "failed" in r), None)
    return replace(
        row,
        seconds=tuple(t["all"] for t in times),
        forward_seconds=tuple(t["forward"] for t in times),
        cpu_seconds=tuple(t["cpu"] for t in times),
        peak_bytes=max((r["peak"] for r in found), default=None),
        baseline_bytes=max((r["baseline"] for r in found), default=None),
        memory_bytes=max((r["memory"] for r in found if r["memory"] is not None), default=None),
        flops=None if counted is None else counted["done"],
        useful_flops=None if counted is None else counted["useful"],
        failed=failed,
    )


def ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """For a row of a peer: its shortest time over ours of the same comparison and setting. ``None`` for our own rows, and where either has no time."""
    if row.side == "ours" or not row.best:
        return None
    same = ("kind", "name", "against", "dim", "batch", "length", "dtype", "mode")
    for other in rows:
        if other.side == "ours" and other.best and all(getattr(other, key) == getattr(row, key) for key in same):
            return row.best / other.best
    return None


@dataclass(frozen=True)
class Growth:
    """How the time and memory of one thing grow with the length: ``seconds ~ length ** exponent``, ``bytes ~ length ** memory``, by least squares of the logarithms; ``memory`` is ``None`` where it was not measured."""

    name: str
    side: str
    against: str | None
    dtype: str
    mode: str
    lengths: tuple[int, ...]
    exponent: float
    memory: float | None = None


def growths(rows: Iterable[Row]) -> list[Growth]:
    """Of everything that was measured at more than one length."""
    lines: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        if row.best:
            key = (row.name, row.side, row.against, row.dtype, row.mode, row.kind, row.dim, row.batch)
            lines.setdefault(key, {})[row.length] = row
    found: list[Growth] = []
    for key, line in lines.items():
        if len(line) > 1:
            memory = {n: row.memory_bytes for n, row in line.items() if row.memory_bytes}
            slope = exponent(memory) if len(memory) == len(line) else None
            found.append(
                Growth(*key[:5], tuple(sorted(line)), exponent({n: r.best for n, r in line.items() if r.best}), slope)
            )
    return found


def exponent(line: Mapping[int, float]) -> float:
    """Least-squares slope of ``log y`` on ``log x``, for at least two different ``x``."""
    xs, ys = [math.log(x) for x in line], [math.log(y) for y in line.values()]
    return statistics.linear_regression(xs, ys).slope
