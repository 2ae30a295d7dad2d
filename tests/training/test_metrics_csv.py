from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mmlong.training.metrics_csv import MetricsCSV, column, read_metrics

ROWS = st.lists(st.dictionaries(st.sampled_from(["a", "b", "c/d"]), st.floats(-1e3, 1e3), min_size=1), max_size=8)


@given(ROWS, st.integers(0, 8), st.integers(0, 3))
def test_what_is_logged_is_read_back_across_resumes(
    tmp_path_factory: object, rows: list[dict[str, float]], at: int, done: int
) -> None:
    folder = Path(tmp_path_factory.mktemp("run"))  # type: ignore[attr-defined]
    log = MetricsCSV(folder)
    for step, row in enumerate(rows[:at]):
        log.log_metrics(row, step)
        log.save()
    kept = min(done, at)
    again = MetricsCSV(folder)
    again.keep_until(kept)
    for step, row in enumerate(rows[kept:], kept):
        again.log_metrics(row, step)
    again.finalize("success")
    if rows:
        found = read_metrics(folder / "metrics.csv")
        for key in ("a", "b", "c/d"):
            wanted = [(step, f"{row[key]:.6g}") for step, row in enumerate(rows) if key in row]
            assert [(int(row["step"]), row[key]) for row in found if key in row] == wanted


def test_a_row_cut_short_is_left_out(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    for step in range(3):
        log.log_metrics({"loss": step / 8}, step)
    log.save()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-3])
    assert column(read_metrics(path), "loss") == ([0, 1], [0.0, 0.125])


def test_metrics_of_one_step_share_a_row_unless_they_contradict(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 1.0}, 4)
    log.log_metrics({"b": 2.0}, 4)
    log.log_metrics({"a": 3.0}, 4)
    log.save()
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": "4", "a": "1", "b": "2"}, {"step": "4", "a": "3"}]
