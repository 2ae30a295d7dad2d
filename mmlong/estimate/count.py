"""The counts of one training step at any length: followed at that length where that is quick, and else at a few lengths and carried on by the declared cost.

A step is followed on hollow parameters (:mod:`mmlong.estimate.hollow`), so nothing is computed and nothing large is held; what takes time is the number of operators, which grows with the length. Beyond
:data:`DIRECT` tokens a row, lengths that leave the same remainder are followed instead, one for each term that the cost can have: ``1`` and ``L`` for mixers of cost ``n``, and ``L log L``,
``L sqrt L`` or ``L^2`` where one says so; and of many rows one and two, since rows are alike. The work of a mixer of cost ``n`` is a loop over equal pieces, so what is carried on is exact; memory is the largest
of several moments, each of which is. In segments the terms are those of the number of segments, with its square where the state grows with what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mmlong.estimate.meter import Meter, tensor_bytes
from mmlong.estimate.step import Batch, TrainingStep
from mmlong.mixers import Mixer
from mmlong.models import Model

MakeBatch = Callable[[int, int | None], Batch]

Counts = dict[str, float]
"""By name: ``flops CLASS DTYPE``, ``moved CLASS DTYPE`` (bytes), ``kernels``, ``forward`` (its share of the flops), ``kept`` (bytes held for the backward when the loss is there), ``peak`` (bytes at most,
beside what is there between steps) and ``batch`` (its bytes)."""

DIRECT = 1 << 15
"""Tokens of a row up to which a step is followed at its own length."""
UNIT = 1 << 13
"""Tokens between the lengths that are followed: a multiple of every chunk and block, and long enough that rows are worked on one by one as they are at any greater length."""
FIRST_SEGMENTS = 4
"""From so many segments on, every one more adds the same: the first has no state before it, the last finds no gradients to add to, and the moment of most memory lies beyond both."""

_TERMS: dict[str, Callable[[float], float]] = {
    "n": lambda x: x,
    "n log n": lambda x: x * math.log(x),
    "n sqrt n": lambda x: x * math.sqrt(x),
    "n^2": lambda x: x * x,
}


def count_step(step: TrainingStep, batch: Batch) -> Counts:
    """Follow or run one optimiser step that has settled (:meth:`TrainingStep.settle`), and count it."""
    with Meter() as meter:
        # With accumulation all batches but the first find gradients: two show it, and the others are like the second.
        for _ in range(min(step.accumulate, 2)):
            before, alive = _totals(meter), meter.alive
            loss = step.forward(batch)
            forward = _flops(_totals(meter)) - _flops(before)
            kept = meter.alive - alive
            loss.backward()
            del loss
        one = _less(_totals(meter), before)
        step.update()
        step.optimizer.zero_grad()
    counts = _totals(meter)
    more = max(step.accumulate - 2, 0)
    counts = {key: value + more * one.get(key, 0) for key, value in counts.items()}
    return {
        **counts,
        "forward": forward * step.accumulate,
        "kept": kept,
        "peak": meter.peak,
        "batch": tensor_bytes(batch.values()),
    }


def _totals(meter: Meter) -> Counts:
    return {
        **{f"flops {kind} {dtype}": count for (kind, dtype), count in meter.flops.items() if count},
        **{f"moved {kind} {dtype}": count for (kind, dtype), count in meter.moved.items() if count},
        "kernels": meter.kernels,
    }


def _flops(counts: Counts) -> float:
    return sum(value for key, value in counts.items() if key.startswith("flops "))


def _less(counts: Counts, other: Counts) -> Counts:
    return {key: value - other.get(key, 0) for key, value in counts.items()}


def total_flops(counts: Counts) -> float:
    """Floating-point operations of the step."""
    return _flops(counts)


def grows(model: Model) -> bool:
    """Whether the state between pieces grows with the tokens seen."""
    return any(isinstance(m, Mixer) and m.traits.state == "growing" for m in model.modules())


def terms(model: Model, segmented: bool) -> list[str]:
    """The terms, beside a constant, that the step's counts can have in the length, or in the number of segments."""
    costs = {m.traits.cost for m in model.modules() if isinstance(m, Mixer)} | {"n"}
    if segmented:
        # A piece has one length: what grows is what it finds before it.
        return ["n", "n^2"] if grows(model) or costs != {"n"} else ["n"]
    return [name for name in _TERMS if name in costs]


def sampled_lengths(length: int, segment: int | None, count: int) -> list[int]:
    """Lengths to follow for ``length``: itself alone, or ``count`` shorter ones with its remainder."""
    unit = UNIT if segment is None else segment
    first = 1 if segment is None else FIRST_SEGMENTS
    found = [length % unit + unit * (first + place) for place in range(count)]
    return [length] if found[-1] >= length or (segment is None and length <= DIRECT) else found


def carry_on(samples: dict[int, Counts], names: list[str], length: int) -> Counts:
    """The counts at ``length`` from those at other lengths, one for each of ``names`` and one for the constant.

    Raises:
        ValueError: another number of samples.
    """
    lengths = sorted(samples)
    if len(lengths) != len(names) + 1:
        raise ValueError(f"{len(names)} terms and a constant take {len(names) + 1} lengths, got {len(lengths)}")

    def row(x: float) -> list[float]:
        return [1.0, *(_TERMS[name](x) for name in names)]

    # How much of each sample the answer holds; of affine counts about (1 - n) and n.
    shares = np.linalg.solve(np.array([row(x / UNIT) for x in lengths]).T, np.array(row(length / UNIT)))
    keys = {key for counts in samples.values() for key in counts}
    return {
        key: max(float(sum(s * samples[x].get(key, 0) for s, x in zip(shares, lengths, strict=True))), 0.0)
        for key in sorted(keys)
    }


def counts_at(
    step: TrainingStep, make: MakeBatch, rows: int, length: int | None, segment: int | None, known: dict[int, Counts]
) -> Counts:
    """The counts of a step on rows of ``length``.

    Args:
        step: settled, with hollow weights.
        make: ``(rows, length)`` to a batch.
        rows: B.
        length: L; ``None`` where the modality fixes it.
        segment: tokens a piece, ``None`` for whole rows.
        known: what was carried on from already, by length; added to.
    """
    if length is None:
        return count_step(step, make(rows, None))
    if segment is not None and segment >= length:
        segment = None
    names = terms(step.model, segment is not None)
    lengths = sampled_lengths(length, segment, len(names) + 1)
    if lengths == [length]:
        return count_step(step, make(rows, length))
    for one in lengths:
        if one not in known:
            few = [count_step(step, make(n, one)) for n in range(1, min(rows, 2) + 1)]
            known[one] = few[-1] if rows <= 2 else _more_rows(few[0], few[1], rows)
    return carry_on({one: known[one] for one in lengths}, names, length)


def _more_rows(one: Counts, two: Counts, rows: int) -> Counts:
    return {key: (rows - 1) * two.get(key, 0) - (rows - 2) * one.get(key, 0) for key in sorted(one.keys() | two.keys())}
