"""The arena: the field's long-sequence benchmarks, which the command ``mmlong arena`` runs: what the tasks are, what is published of them, and what was found."""

from __future__ import annotations

from mmlong.arena.published import PUBLISHED, Published
from mmlong.arena.report import BadResultsError, Cell, Results, markdown, plot, table
from mmlong.arena.tasks import SIZES, TASKS, ArenaTask, swap_mixer

__all__ = [
    "PUBLISHED",
    "SIZES",
    "TASKS",
    "ArenaTask",
    "BadResultsError",
    "Cell",
    "Published",
    "Results",
    "markdown",
    "plot",
    "swap_mixer",
    "table",
]
