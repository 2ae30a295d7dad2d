"""The experiment that takes a step on a million tokens, at small sizes: real data, the same gradient, memory that hardly grows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import pytest
from mmlong.experiments.scale import job, million

from mmlong.estimate.meter import Meter


def options(**given: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    job.add_options(parser)
    small = {"tokens": 3000, "dim": 16, "depth": 2, "segment": 512, **given}
    return parser.parse_args([f"--{key}={value}" for key, value in small.items()])


def test_tokens_are_the_documents_of_the_source() -> None:
    pytest.importorskip("pyrodigal")
    batch = job.read("genome", 900_000)
    assert bytes(batch["raw"][0, :4].tolist()).isalpha()
    assert batch["resets"].nonzero()[:, 1].tolist() == [0, 862_283]
    text = job.read("text", 3000)
    assert text["raw"].shape == text["resets"].shape == (1, 3000)
    assert bool(text["resets"][0, 0])
    with pytest.raises(SystemExit, match="holds 2,463,666 tokens, fewer than the 3,000,000 asked for"):
        job.read("genome", 3_000_000)


@pytest.mark.parametrize("keep", [1, "sqrt"])
@pytest.mark.parametrize("data", ["text", "genome"])
def test_the_gradient_is_that_of_the_whole(data: str, keep: Any) -> None:
    if data == "genome":
        pytest.importorskip("pyrodigal")
    found = job.compare(options(data=data, keep=keep))
    assert 0 < found["error"] < 1e-5
    assert 0 < found["worst"] < 1e-3


def test_what_is_alive_hardly_grows_with_the_tokens() -> None:
    """Counted, not measured: eight bytes a token of input, and a state every segment."""

    def peak(tokens: int) -> int:
        given = options(tokens=tokens)
        task, batch = job.build(given, given.segment), job.read("text", tokens)
        with Meter() as meter:
            task.nats(batch)[0].backward()
        return meter.peak

    short, long = peak(2048), peak(8192)
    assert long - short < 40 * (8192 - 2048)
    assert long < 1.2 * short


def test_the_command_prints_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With its measurements in this process: starting Python four times would be most of the test."""

    def here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "mmlong.experiments.scale.job"]
        monkeypatch.setattr(sys, "argv", command[2:])
        job.main()
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", here)
    monkeypatch.setattr(
        sys, "argv", ["million", "--tokens=2000", "--dim=16", "--depth=1", "--segment=700", "--keep=2", "--json"]
    )
    assert million.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2000
    assert found["bits"] == pytest.approx(8, abs=1)
    assert 0.05 < found["peak_gb"] < 64
    assert found["seconds"] > 0
    assert found["time_ratio"] > 0
    assert found["grad_error"] < 1e-5
    assert found["grad_error_worst"] < 1e-3
