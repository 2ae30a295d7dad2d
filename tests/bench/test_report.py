"""Reports: saved and read back, drawn, shown; and what was aimed at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmlong.bench import table as preset
from mmlong.bench.contest import Conditions, run_contests
from mmlong.bench.report import BadReportError, Report, machine_line, plot, table
from mmlong.bench.step import default_model, run_models


@pytest.fixture
def report(pretend: Any) -> Report:
    """The preset's table as if run: ours takes 1 s at 65,536 tokens, twice as long at 131,072; peers fail."""
    pretend.seconds = lambda job: (
        job["length"] / 65536 if job["kind"] == "layer" else 0.5 if job["dtype"] == "bf16" else 1.0
    )
    pretend.failed = lambda job: (
        "killed by SIGKILL" if job.get("subject", {}).get("side") == "theirs" and job["kind"] == "layer" else None
    )
    machine = {
        "processor": "A", "gpu": None, "threads": 2, "versions": {"torch": "2"}, "commit": "abc",
        "peaks": {"gemm_fp32": 89e9, "gemm_bf16": 2e11, "copy": 1e10},
    }  # fmt: skip
    made = Report(["mmlong", "bench", "table"], {"rounds": 1}, machine)
    made.rows += run_contests(preset.contests(preset.FIRST), Conditions([65536, 131072], rounds=1), pretend)
    made.rows += run_models([default_model()], Conditions([], dtypes=("fp32", "bf16"), rounds=1), pretend)
    return made


def test_saved_and_read_back(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "deep" / "r.json")
    assert Report.load(tmp_path / "deep" / "r.json") == report
    content = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert {row["ratio"] for row in content["rows"]} == {None}  # no peer ran
    assert content["rows"][0]["share_of_gemm_peak"] == pytest.approx(4e9 / 89e9)
    assert {round(g["exponent"], 6) for g in content["growth"]} == {1.0}


def test_files_that_are_no_report(tmp_path: Path) -> None:
    for text, message in (
        ("{", "holds no report of mmlong bench"),
        ("[]", "holds no report"),
        ("{}", "holds no report of mmlong bench: 'format'"),
        ('{"format": 99}', "has format 99; this reads 1"),
        (
            '{"format": 1, "command": [], "settings": {}, "machine": {}, "streams": [], "rows": [{"a": 1}]}',
            "holds no report",
        ),
    ):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(BadReportError, match=message):
            Report.load(tmp_path / "r.json")
    with pytest.raises(BadReportError, match="cannot be read: No such file"):
        Report.load(tmp_path / "none.json")


def test_table_and_picture(report: Report, tmp_path: Path) -> None:
    console = Console(width=200, record=True)
    console.print(table(report))
    said = console.export_text()
    assert said.count("killed by SIGKILL") == 8
    assert "65,536" in said
    assert "commit abc" in machine_line(report.machine)
    plot(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot(Report([], {}, {}), tmp_path / "q.png")


def test_aims_are_scaled_by_the_machine(report: Report) -> None:
    said = {what: (aimed, found, holds) for what, aimed, found, holds in preset.verdicts(report)}
    # Half as fast a machine as the reference: twice the seconds.
    assert said["mamba2, 65,536 tokens"] == ("4.40 s", "1.00 s", True)
    assert said["hyena, memory"] == ("3 GB", "2.00 GB", True)
    assert said["hyena, growth from 65,536 to 131,072"] == ("length^1.05", "length^1.00", True)
    assert said["default backbone, dim 256: training step"] == ("50% of GEMM", "4%", False)
    assert said["default backbone, dim 256: training step, bf16 over fp32"] == ("1.5 times", "2.00 times", True)
    assert sum("growth from" in what for what in said) == len(preset.FIRST)
    # The same bytes at both lengths, as if run.
    assert said["hyena, growth of memory from 65,536 to 131,072"] == ("length^1.05", "length^0.00", True)
    report.machine["peaks"] = {"gemm_fp32": 8.9e12}
    assert not dict((w, h) for w, _, _, h in preset.verdicts(report))["mamba2, 65,536 tokens"]
