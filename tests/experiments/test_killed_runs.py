"""The experiment itself, small: a run that is killed, or two ranks that are killed twice, end where an undisturbed one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmlong.experiments.resume.__main__ import disturb


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers", "accumulate", "ema"), [(1, 2, 1, False), (2, 1, 2, True)])
def test_killed_runs_end_the_same_to_the_bit(
    tmp_path: Path, ranks: int, workers: int, accumulate: int, ema: bool
) -> None:
    tally = disturb(ranks, ranks, workers, 40, accumulate, ema, seed=0, work=tmp_path, quiet=True)
    assert tally.kills == ranks
    assert tally.torn == 0
    assert tally.identical == tally.runs
