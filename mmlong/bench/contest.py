"""A sweep over layers: who is measured under which conditions, the sides of a comparison in turn, each time in a process of its own.

Sides alternate (ours, theirs, ours, theirs, ...), so that whatever else the machine does falls on both. A side that fails is not tried again; the other, and the rest of the sweep, go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmlong.bench.peers import PEERS
from mmlong.bench.process import Job, RunJob, run_job
from mmlong.bench.rows import Row, gather
from mmlong.mixers import MIXERS

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """One side: a mixer or block of ours, or one of the two modules of a peer's pair.

    Attributes:
        mixer: registered name.
        options: of ours.
        direction: ``causal``, ``alternate`` or ``both``; ``None`` for the mixer's usual one. A peer fixes its own.
        ffn: the feed-forward of a block; ``None`` for the mixer alone.
        peer: whose pair it is of.
        side: ``ours`` or ``theirs``.
    """

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    direction: str | None = None
    ffn: str | None = None
    peer: str | None = None
    side: str = "ours"

    @property
    def name(self) -> str:
        """For people: the mixer, and what is not as ever."""
        own = PEERS[self.peer].options if self.peer is not None else {}
        said = [f"{key}={value}" for key, value in {**own, **self.options}.items()]
        if self.direction is not None:
            said.append(self.direction)
        elif self.peer is not None and PEERS[self.peer].direction != "causal":
            said.append(PEERS[self.peer].direction)
        if self.ffn is not None:
            said.append(self.ffn)
        return f"{self.mixer} ({', '.join(said)})" if said else self.mixer


def against(mixer: str, peer: str, options: dict[str, Any]) -> list[Subject]:
    """Both sides of a comparison."""
    return [Subject(mixer, options, peer=peer, side=side) for side in ("ours", "theirs")]


@dataclass(frozen=True)
class Conditions:
    """Under which everything is measured.

    Attributes:
        lengths: tokens of a row.
        dim, batch: width and rows.
        dtypes: of ``fp32`` and ``bf16`` (autocast).
        modes: of ``forward`` (no graph) and ``both`` (forward and backward).
        rounds: processes of each side.
        repeats: timed runs in each process.
        threads: of torch; 0 for its own choice.
        device: ``cpu`` or ``cuda``.
        max_memory: bytes that a process may take on a CPU; ``None`` for any.
        timeout: seconds that a process may take; ``None`` for any.
        peer_length: peers run up to this length only; ``None`` for all.
        quadratic_length: mixers of ours whose cost is ``n^2`` run up to this length only; ``None`` for all.
    """

    lengths: Sequence[int]
    dim: int = 256
    batch: int = 1
    dtypes: Sequence[str] = ("fp32",)
    modes: Sequence[str] = ("both",)
    rounds: int = 2
    repeats: int = 2
    threads: int = 0
    device: str = "cpu"
    max_memory: int | None = None
    timeout: float | None = None
    peer_length: int | None = None
    quadratic_length: int | None = None

    def where(self) -> Job:
        """What every job is told."""
        return {key: getattr(self, key) for key in ("threads", "device", "max_memory", "timeout")}


def run_contests(
    contests: Sequence[Sequence[Subject]], conditions: Conditions, run: RunJob = run_job, say: Say = lambda _: None
) -> Iterator[Row]:
    """Measure.

    Args:
        contests: each one side, or two that run in turn.
        conditions: see there.
        run: runs a job.
        say: is told of each process.

    Yields:
        rows as they are done: by length, number format, mode and contest.
    """
    checked = {i: _compare(sides, conditions, run, say) for i, sides in enumerate(contests)}
    for length in conditions.lengths:
        for dtype in conditions.dtypes:
            for mode in conditions.modes:
                for i, sides in enumerate(contests):
                    here = [side for side in sides if length <= _longest(side, conditions)]
                    size = {"dim": conditions.dim, "batch": conditions.batch, "length": length}
                    job = {"kind": "layer", **conditions.where(), **size, "dtype": dtype, "mode": mode}
                    yield from _contest(here, job, conditions, checked[i], run, say)


def _longest(side: Subject, conditions: Conditions) -> float:
    """The greatest length at which a side runs: one that its options allow, too."""
    options = {**(PEERS[side.peer].options if side.peer is not None else {}), **side.options}
    limits = [options.get("max_length")]
    if side.side != "ours":
        limits.append(conditions.peer_length)
    elif MIXERS[side.mixer].traits.cost == "n^2":
        limits.append(conditions.quadratic_length)
    return min((n for n in limits if n is not None), default=math.inf)


def _contest(
    sides: Sequence[Subject], job: Job, conditions: Conditions, checked: dict[str, Any], run: RunJob, say: Say
) -> Iterator[Row]:
    results: list[list[dict[str, Any]]] = [[checked] if "failed" in checked else [] for _ in sides]
    for number in range(conditions.rounds):
        for side, found in zip(sides, results, strict=True):
            if any("failed" in r for r in found):
                continue
            full = {**job, "subject": asdict(side), "repeats": conditions.repeats, "count": number == 0}
            found.append(run(full))
            what = f"{side.name}, {_side(side)}, {job['length']:,} tokens, {job['dtype']}, {job['mode']}"
            say(f"{what}, process {number + 1}: {_told(found[-1])}")
    for side, found in zip(sides, results, strict=True):
        row = Row(
            kind="mixer" if side.ffn is None else "block",
            name=side.name,
            side=_side(side),
            against=side.peer,
            settings=asdict(side),
            **{key: job[key] for key in ("dim", "batch", "length", "dtype", "mode")},
            difference=checked.get("difference"),
        )
        yield gather(row, found)


def _side(subject: Subject) -> str:
    return "ours" if subject.side == "ours" else str(subject.peer)


def _told(result: dict[str, Any]) -> str:
    if "failed" in result:
        return str(result["failed"]).split("\n")[0]
    memory = "" if result["memory"] is None else f", {result['memory'] / 1e9:.2f} GB"
    return f"{min(t['all'] for t in result['times']):.3g} s{memory}"


def _compare(sides: Sequence[Subject], conditions: Conditions, run: RunJob, say: Say) -> dict[str, Any]:
    """The difference of two sides that are the same function, or why there is nothing to compare."""
    peer = None if sides[0].peer is None else PEERS[sides[0].peer]
    if peer is None or not peer.same:
        return {}
    job = {"kind": "compare", **conditions.where(), "subject": asdict(sides[0]), "dim": conditions.dim}
    found = run({**job, "length": max(conditions.lengths)})
    if "difference" in found and not found["difference"] <= peer.tolerance:  # not a number is no agreement either
        found = {"failed": f"ours and {peer.title} differ by {found['difference']:.2g}: there is nothing to compare"}
    agree = found.get("failed") or f"ours and {peer.title} agree, to {found['difference']:.1g}"
    say(f"{sides[0].name}: {agree}".split("\n")[0])
    return found
