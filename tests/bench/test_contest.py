"""A sweep: sides in turn, failures as rows, sizes as asked."""

from __future__ import annotations

from typing import Any

import pytest

from mmlong.bench.contest import Conditions, Subject, against, run_contests


def layers(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [job for job in jobs if job["kind"] == "layer"]


def test_sides_alternate_in_processes_of_their_own(pretend: Any) -> None:
    pretend.seconds = lambda job: 2.0 if job["subject"]["side"] == "ours" else 3.0
    conditions = Conditions([100, 200], dim=16, rounds=3, repeats=2, threads=1, timeout=9.0)
    rows = list(run_contests([against("mamba2", "mamba2-transformers", {})], conditions, pretend))
    assert pretend.jobs[0]["kind"] == "compare"
    asked = layers(pretend.jobs)
    assert [job["subject"]["side"] for job in asked] == ["ours", "theirs"] * 6
    assert [job["length"] for job in asked] == [100] * 6 + [200] * 6
    # Work is counted once a side and length.
    assert [job["count"] for job in asked] == [True, True, False, False, False, False] * 2
    assert all(job["threads"] == 1 and job["timeout"] == 9.0 and job["repeats"] == 2 for job in asked)
    assert [(row.side, row.length) for row in rows] == [
        ("ours", 100), ("mamba2-transformers", 100), ("ours", 200), ("mamba2-transformers", 200),
    ]  # fmt: skip
    for row in rows:
        first = 2.0 if row.side == "ours" else 3.0
        assert row.seconds == (first, 2 * first) * 3
        assert (row.best, row.median) == (first, 1.5 * first)
        assert row.memory_bytes == 2_000_000_000
        assert (row.flops, row.useful_flops, row.difference) == (5 * 10**9, 4 * 10**9, 0.0)


def test_a_side_that_fails_is_not_tried_again_and_the_rest_goes_on(pretend: Any) -> None:
    pretend.failed = lambda job: (
        "out of memory: 9 GB" if job["kind"] == "layer" and job["subject"]["side"] == "theirs" and job["length"] > 100 else None
    )  # fmt: skip
    conditions = Conditions([100, 200, 300], dim=16, rounds=2)
    said: list[str] = []
    sides = against("s4d", "s5", {})
    rows = list(run_contests([sides, [Subject("hyena")]], conditions, pretend, said.append))
    failed = [row for row in rows if row.failed]
    assert [(row.side, row.length, row.failed, row.best) for row in failed] == [
        ("s5", length, "out of memory: 9 GB", None) for length in (200, 300)
    ]
    assert len(rows) == 9
    assert sum(job["subject"]["side"] == "theirs" for job in layers(pretend.jobs)) == 2 + 1 + 1
    assert any("out of memory" in line for line in said)


def test_peers_stop_at_their_length_and_formats_and_modes_are_swept(pretend: Any) -> None:
    conditions = Conditions([10, 20], dtypes=("fp32", "bf16"), modes=("forward", "both"), rounds=1, peer_length=10)
    rows = list(run_contests([against("s4d", "s5", {})], conditions, pretend))
    assert [(r.length, r.dtype, r.mode, r.side) for r in rows] == [
        (length, dtype, mode, side)
        for length in (10, 20)
        for dtype in ("fp32", "bf16")
        for mode in ("forward", "both")
        for side in (("ours", "s5") if length == 10 else ("ours",))
    ]
    assert "compare" not in {job["kind"] for job in pretend.jobs}  # another function: there is nothing to hold equal


def test_quadratic_work_stops_at_its_length(pretend: Any) -> None:
    conditions = Conditions([10, 20, 30], rounds=1, quadratic_length=20)
    rows = list(run_contests([[Subject("moba")], [Subject("s4d")]], conditions, pretend))
    assert [(r.name, r.length) for r in rows] == [
        ("moba", 10), ("s4d", 10), ("moba", 20), ("s4d", 20), ("s4d", 30)
    ]  # fmt: skip


def test_a_mixer_of_a_greatest_length_stops_there(pretend: Any) -> None:
    rows = list(run_contests([[Subject("linformer", {"max_length": 20})]], Conditions([10, 20, 30], rounds=1), pretend))
    assert [r.length for r in rows] == [10, 20]


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_sides_that_differ_are_not_timed(pretend: Any, difference: float) -> None:
    pretend.difference = difference
    rows = list(run_contests([against("local", "longformer", {})], Conditions([100]), pretend))
    assert [job["kind"] for job in pretend.jobs] == ["compare"]
    assert [row.failed for row in rows] == [
        f"ours and transformers LongformerSelfAttention differ by {difference:.2g}: there is nothing to compare"
    ] * 2


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        (Subject("mamba2"), "mamba2"),
        (Subject("mamba2", {"chunk": 8}, "both"), "mamba2 (chunk=8, both)"),
        (Subject("local", {"window": 8}, peer="longformer"), "local (window=8, positions=none, bias=True, both)"),
        (Subject("s4d", ffn="mlp"), "s4d (mlp)"),
    ],
)
def test_names_tell_what_is_not_as_ever(subject: Subject, name: str) -> None:
    assert subject.name == name
