"""A budget of CPU minutes: what is timed, and how many steps fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlong.measure import budget
from mmlong.measure.budget import LEAST, step_seconds, steps_within


def test_the_first_step_is_not_counted_and_the_rest_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(budget.time, "process_time", lambda: clock[0])
    took = iter([100.0, 1.0, 2.0, 3.0, 2.0, 50.0])

    def step(batch: int) -> None:
        clock[0] += next(took)

    # Three are fewer than the 7 seconds asked for, four are enough.
    assert step_seconds(step, range(99), enough=7.0) == pytest.approx(2.0)
    assert next(took) == 50.0


def test_short_data_is_timed_as_far_as_it_goes() -> None:
    seen: list[int] = []
    assert step_seconds(seen.append, range(LEAST + 1), enough=1e9) >= 0
    assert seen == list(range(LEAST + 1))
    with pytest.raises(ValueError, match="at least 4 batches, got 3"):
        step_seconds(seen.append, range(LEAST))
    with pytest.raises(ValueError, match="got 0"):
        step_seconds(seen.append, [])


@given(st.floats(1e-3, 1e4), st.floats(1e-4, 1e3))
def test_steps_fill_the_minutes_and_no_more(minutes: float, seconds: float) -> None:
    steps = steps_within(minutes, seconds)
    assert steps >= 1
    assert steps == 1 or steps * seconds <= 60 * minutes * (1 + 1e-9)
    assert (steps + 1) * seconds > 60 * minutes * (1 - 1e-9)


@pytest.mark.parametrize(("minutes", "seconds"), [(0, 1), (1, 0), (-1, 1), (float("nan"), 1)])
def test_no_time_is_refused(minutes: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        steps_within(minutes, seconds)
