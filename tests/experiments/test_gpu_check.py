"""The script that a person with a GPU runs: on a CPU, what it finds right, what it finds wrong, and what it says of what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmlong.experiments.gpu_check import cases, measure
from mmlong.experiments.gpu_check.__main__ import main
from mmlong.experiments.gpu_check.cases import CASES, Sizes
from torch import Tensor

from mmlong.mixers import list_mixers
from mmlong.ops.backends import Backend
from mmlong.ops.short_conv_backends import SHORT_CONV

SIZES = Sizes(batch=3, length=41, heads=2, groups=1, width=4, state=4)


def case(op: str, name: str) -> cases.Case:
    return next(c for c in CASES if (c.op, c.name) == (op, name))


def test_every_op_that_has_backends_is_in_it() -> None:
    from mmlong.ops import backends

    assert set(backends._OPS) == {c.op for c in CASES if c.backends is not None}
    assert all(c.backends is None or c.backends is backends._OPS[c.op] for c in CASES)
    assert {c.op for c in CASES if c.timed} == set(backends._OPS)


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "gpu_check: torch sees no CUDA device here; --device cpu checks what a CPU can\n"


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    some = ["short_conv", "gated_norm", "swiglu", "diagonal", "mixers"]
    assert main(["--device", "cpu", "--tokens", "33", "--json", str(out), "--only", *some]) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["device"] == "cpu"
    assert report["counts"]["FAIL"] == 0
    rows = report["rows"]
    whats = {row["what"].partition(":")[0] for row in rows}
    assert whats == {"short_conv", "gated_norm", "swiglu", "diagonal", "mixer"}
    # On a CPU there is nothing to hold a mixer against that does not run in pieces.
    told = {row["what"].split()[1].strip(",") for row in rows if row["what"].startswith("mixer")}
    assert told == set(list_mixers(streaming=True))
    compared = [row for row in rows if row["status"] == "PASS"]
    assert all(0 <= row["error"] <= row["allowed"] for row in compared)
    assert any(row["error"] > 0 for row in compared)
    absent = {row["backend"]: row["note"] for row in rows if row["status"] == "absent"}
    assert absent == {n: "runs on cuda only, the tensors are on cpu" for n in ("causal_conv1d", "mamba_ssm")}
    shown = capsys.readouterr().out
    assert shown.count("causal_conv1d") == 1, "what is absent has one line"


@pytest.mark.parametrize("op", ["attention", "pattern_attention", "linear_attention", "long_conv", "rotary"])
def test_every_question_is_answered_rightly_on_a_cpu(op: str) -> None:
    for one in CASES:
        if one.op == op:
            rows = measure.check_op(one, SIZES, "cpu", ["fp32", "bf16"])
            assert {row.status for row in rows} <= {"PASS", "absent", "refused"}, one.name
            assert sum(row.status == "PASS" for row in rows) >= 2, one.name
            assert all(row.note for row in rows if row.status != "PASS")


def _with(monkeypatch: pytest.MonkeyPatch, run: Any, **options: Any) -> list[measure.Row]:
    monkeypatch.setitem(SHORT_CONV._known, "new", Backend("new", run, masks=frozenset({"resets"}), **options))
    rows = measure.check_op(case("short_conv", "biased, silu"), SIZES, "cpu", ["fp32"])
    return [row for row in rows if row.backend == "new"]


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SHORT_CONV["portable"].run

    def wrong(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        # The output is right; one tap's gradient is not.
        cut = torch.cat([weight[:, :1].detach(), weight[:, 1:]], 1)
        return right(x, cut, *rest)

    (row,) = _with(monkeypatch, wrong)
    assert (row.status, row.note) == ("FAIL", "gradient of weight")
    (row,) = _with(monkeypatch, right)
    assert row.status == "PASS"


def test_what_is_not_a_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SHORT_CONV["portable"].run

    def wrong(*given: Any) -> tuple[Tensor, Tensor]:
        y, tail = right(*given)
        return y / (y != y.flatten()[0]).to(y), tail

    (row,) = _with(monkeypatch, wrong)
    assert row.status == "FAIL"


def test_what_falls_over_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def falls(*_: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("an illegal memory access was encountered")

    (row,) = _with(monkeypatch, falls)
    assert (row.status, row.note) == ("FAIL", "RuntimeError: an illegal memory access was encountered")


def test_absent_refused_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlong.ops.backends import load

    right = SHORT_CONV["portable"].run
    (row,) = _with(monkeypatch, right, available=lambda: (False, "needs nowhere, not installed"))
    assert (row.status, row.note) == ("absent", "needs nowhere, not installed")
    (row,) = _with(monkeypatch, right, fits=lambda request: f"takes pieces of 5, not {request.sizes['length']}")
    assert (row.status, row.note) == ("refused", "takes pieces of 5, not 41")
    (row,) = _with(monkeypatch, lambda *_: load("no_such_package", "it", "short_conv", "new"))
    assert row.status == "FAIL"
    assert "importing it fails" in row.note


def test_a_mixer_that_forgets_its_past_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlong.mixers.mamba2 import Mamba2

    mix = Mamba2.mix

    def forgets(self: Any, x: Tensor, state: Any, layout: Any) -> Any:
        return mix(self, x, state if state is None else {**state, "ssm": 0 * state["ssm"]}, layout)

    monkeypatch.setattr(Mamba2, "mix", forgets)
    assert {row.status for row in measure.check_mixers(["mamba2"], "cpu", 8, 30, ["fp32"])} == {"FAIL"}


def test_tokens_that_are_too_few_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--tokens", "3"])
    assert "must be at least 16" in capsys.readouterr().err
