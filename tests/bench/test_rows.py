"""Rows: what is taken from many processes, ratios, shares and growth; the way to JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlong.bench.rows import Row, exponent, gather, growths, ratio


def row(**fields: Any) -> Row:
    made: dict[str, Any] = {
        "kind": "mixer", "name": "m", "side": "ours", "against": None, "settings": {}, "dim": 8, "batch": 1, "length": 100,
        "dtype": "fp32", "mode": "both", **fields,
    }  # fmt: skip
    return Row(**made)


def test_gathered_from_processes() -> None:
    results: list[dict[str, Any]] = [
        {"times": [{"forward": 1.0, "all": 3.0, "cpu": 6.0}], "peak": 10, "baseline": 4, "memory": 6, "flops": {"done": 9, "useful": 6}},
        {"times": [{"forward": 0.5, "all": 2.0, "cpu": 4.0}], "peak": 12, "baseline": 3, "memory": None, "flops": None},
        {"failed": "killed by SIGKILL"},
    ]  # fmt: skip
    found = gather(row(), results)
    assert (found.seconds, found.forward_seconds, found.cpu_seconds) == ((3.0, 2.0), (1.0, 0.5), (6.0, 4.0))
    assert (found.peak_bytes, found.baseline_bytes, found.memory_bytes) == (12, 4, 6)
    assert (found.flops, found.useful_flops, found.failed) == (9, 6, "killed by SIGKILL")
    nothing = gather(row(), [{"failed": "x"}])
    assert (nothing.best, nothing.median, nothing.memory_bytes, nothing.flops) == (None, None, None, None)


def test_share_of_the_machines_peak() -> None:
    found = row(seconds=(2.0, 1.0), useful_flops=25)
    assert found.share({"gemm_fp32": 100.0}) == 0.25
    assert found.share({"gemm_bf16": 100.0}) is None
    assert row(seconds=(1.0,)).share({"gemm_fp32": 100.0}) is None


def test_ratio_is_to_ours_of_the_same_setting() -> None:
    rows = [
        row(against="p", seconds=(2.0,)), row(against="p", side="p", seconds=(6.0, 5.0)), row(against="q", side="q", seconds=(1.0,)),
        row(against="p", side="p", seconds=(9.0,), length=200), row(against="p", seconds=(), length=200, failed="x"),
    ]  # fmt: skip
    assert [ratio(r, rows) for r in rows] == [None, 2.5, None, None, None]


@given(
    st.floats(0.2, 3.0), st.floats(1e-6, 10.0),
    st.lists(st.integers(1, 1 << 20), min_size=2, max_size=6, unique=True),
)  # fmt: skip
def test_the_exponent_of_a_power_is_found(power: float, scale: float, lengths: list[int]) -> None:
    assert exponent({n: scale * n**power for n in lengths}) == pytest.approx(power, rel=1e-4, abs=1e-4)


def test_growth_of_each_line_apart() -> None:
    rows = [row(length=n, seconds=(float(n), 9e9), memory_bytes=n**3) for n in (10, 20, 40)]
    rows += [row(length=n, seconds=(n**2.0,), side="p", against="p") for n in (20, 10)]
    rows += [row(length=10, seconds=(1.0,), dtype="bf16"), row(length=80, failed="x")]
    found = growths(rows)
    assert [(g.side, g.lengths) for g in found] == [("ours", (10, 20, 40)), ("p", (10, 20))]
    assert [g.exponent for g in found] == pytest.approx([1.0, 2.0])
    assert found[0].memory == pytest.approx(3.0)


seconds = st.lists(st.floats(1e-9, 1e6), max_size=3).map(tuple)


@given(seconds, st.none() | st.integers(0, 10**15), st.none() | st.text(), st.dictionaries(st.text(), st.integers()))
def test_to_json_and_back(times: tuple[float, ...], count: int | None, failed: str | None, settings: dict) -> None:
    made = row(seconds=times, forward_seconds=times, flops=count, memory_bytes=count, failed=failed, settings=settings)
    assert Row.from_dict(json.loads(json.dumps(made.as_dict()))) == made
