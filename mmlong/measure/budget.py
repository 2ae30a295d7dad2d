"""Training for so many CPU minutes: what a step takes is measured first, then as many are trained as the minutes hold.

The learning rate falls over all steps, so their number must be known before the first; a clock that stops a run would stop it anywhere on that curve. CPU time is this process's, all its threads together: what else runs
on the machine hardly matters to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Batch = TypeVar("Batch")

LEAST = 3
"""Steps that are timed at least."""
ENOUGH = 4.0
"""CPU seconds of steps after which no more are timed."""


def step_seconds(step: Callable[[Batch], Any], batches: Iterable[Batch], enough: float = ENOUGH) -> float:
    """CPU seconds of a step, on average, behind one that sets up and is not counted.

    Args:
        step: one training step.
        batches: the first sets up; of the others at least :data:`LEAST` are taken, and more until ``enough`` seconds are full or the batches end. Rows of uneven length want many.
        enough: CPU seconds of steps.

    Raises:
        ValueError: fewer batches than that.
    """
    found = iter(batches)
    count, begun = -1, 0.0
    for batch in found:
        step(batch)
        count += 1
        if count == 0:
            begun = time.process_time()
        elif count >= LEAST and time.process_time() - begun >= enough:
            break
    if count < LEAST:
        raise ValueError(f"a step is timed over at least {LEAST + 1} batches, got {count + 1}")
    return (time.process_time() - begun) / count


def steps_within(minutes: float, seconds: float) -> int:
    """Steps of ``seconds`` CPU seconds each that CPU minutes hold, at least one.

    Raises:
        ValueError: no time, or steps that take none.
    """
    if not minutes > 0 or not seconds > 0:
        raise ValueError(f"steps of {seconds:g} s in {minutes:g} minutes: both must be above 0")
    return max(1, int(60 * minutes / seconds))
