"""A training step of a model, and one token at a time."""

from __future__ import annotations

from typing import Any

import pytest

from mmlong.bench.contest import Conditions
from mmlong.bench.step import build, default_model, measure, run_models
from mmlong.bench.stream import run_streams, shares


def test_a_step_of_the_default_backbone(run_here: Any) -> None:
    model = default_model(8, 33)
    model["shape"]["batch"] = 3
    rows = run_models([model], Conditions([], dtypes=("fp32", "bf16"), rounds=1, repeats=1), run_here)
    assert [(r.dtype, r.batch, r.length, r.dim, r.mode, len(r.seconds)) for r in rows] == [
        (dtype, 3, 33, 8, "step", 1) for dtype in ("fp32", "bf16")
    ]
    # The products with the weights of every linear layer are among what is counted.
    task = build(model["task"])
    weights = sum(m.weight.numel() for m in task.modules() if type(m).__name__ == "Linear")
    for row in rows:
        assert row.useful_flops is not None
        assert 3 * 2 * 99 * weights < row.useful_flops < 10 * 2 * 99 * weights
        assert row.useful_flops % 3 == 0


def test_a_step_leaves_other_weights() -> None:
    model = default_model(8, 17)
    job = {**model, "dtype": "fp32", "repeats": 1, "count": False, "device": "cpu", "trainer": {"max_steps": 2}}
    found = measure(job)
    assert found["tokens"] == 17
    assert found["flops"] is None


def test_formats_take_turns_and_a_failure_is_a_row(pretend: Any) -> None:
    pretend.failed = lambda job: "took more than 1 s and was stopped" if job["dtype"] == "bf16" else None
    rows = run_models([default_model()], Conditions([], dtypes=("fp32", "bf16"), rounds=2), pretend)
    assert [job["dtype"] for job in pretend.jobs] == ["fp32", "bf16", "fp32"]
    assert [(r.dtype, r.length, r.failed is None) for r in rows] == [("fp32", 640, True), ("bf16", 16384, False)]


@pytest.mark.parametrize("mixer", ["mamba2", "attention"])
def test_one_token_at_a_time(mixer: str, run_here: Any) -> None:
    model = {"name": mixer, "mixer": mixer, "options": {}, "dim": 8, "depth": 1, "tokens": 23, "window": 10}
    (found,) = run_streams([model], Conditions([]), run=run_here)
    assert len(found["microseconds"]) == 3  # the last window is a short one
    assert all(us > 0 for us in found["microseconds"])
    assert found["operators"] > 10
    assert 0 <= found["outside_share"] <= 1
    assert 0 <= found["fixed_share"] <= 1
    assert found["state_bytes"] > 0
    assert "prediction" not in found


def test_the_compiled_step_stands_beside_the_other(pretend: Any) -> None:
    model = {"name": "m", "mixer": "mamba2", "options": {}, "dim": 8, "depth": 1, "tokens": 20, "window": 10}
    found = run_streams([model], Conditions([]), compile=True, run=pretend)
    assert [(f["name"], f["compiled"]) for f in found] == [("m", False), ("m, compiled", True)]
    assert found[1]["difference"] == pytest.approx(0.0005)
    # Operators take 0.4 of a second's token; a further row costs a quarter of one.
    assert shares(found[0]) == pytest.approx({"outside_share": 0.6, "fixed_share": 0.75})
    pretend.failed = lambda job: "exit status 1\nTraceback" if job["compile"] else None
    assert "failed" in run_streams([model], Conditions([]), compile=True, run=pretend)[1]
