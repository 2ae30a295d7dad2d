"""``mmlong estimate``: lengths as people write them, the report, and the estimate against a step that was run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from mmlong.cli import main
from mmlong.cli.errors import CommandError
from mmlong.cli.estimate import parse_length, run_estimate

SMALL = ["-c", "text/stdlib_ar", "--model.backbone.dim", "16", "--model.backbone.mixers=[mamba2]", "--batch", "2"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e9", 10**9), ("1_000_000", 10**6), ("64k", 65536), ("1,024", 1024), ("1.5M", 3 << 19), ("7", 7)],
)
def test_lengths(text: str, value: int) -> None:
    assert parse_length(text) == value


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "1e-3", "64kB", ""])
def test_no_lengths(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number of at least 1"):
        parse_length(text)


def test_a_billion_tokens_on_64_ranks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    words = [
        *SMALL,
        "--length",
        "1e9",
        "--ranks",
        "64",
        "--device",
        "h100",
        "--model.segment",
        "512",
        "--json",
        str(file),
    ]
    assert run_estimate(words) == 0
    said = capsys.readouterr().out
    assert "2 x 1,000,000,000 tokens, 64 ranks (sequence_parallel)" in said
    report = json.loads(file.read_text())
    memory = report["memory"]
    assert sum(size for name, size in memory.items() if name != "peak") == pytest.approx(memory["peak"])
    assert (
        memory["states between segments"] > 30000 * 2 * 1000
    )  # as many states as there are segments in a rank's piece
    assert report["bubble"] == pytest.approx(63 / 65)
    flops = report["flops"]
    assert flops["step"] == pytest.approx(flops["forward"] + flops["forward_again"] + flops["backward"])
    assert report["seconds"]["step"] > flops["step"] / report["device"]["peaks"]["float32"]


def test_images_of_a_fixed_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-c", "image/mnist784", "--batch", "1", "--model.backbone.dim", "16", "--model.backbone.depth", "1"]
    assert run_estimate([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 784
    with pytest.raises(CommandError, match="has 784 pixels, whatever --length says"):
        run_estimate([*words, "--length", "64"])


def test_a_step_of_music_is_as_many_tokens_as_voices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_estimate(["-c", "music/chorales_ar", "--length", "100"]) == 0
    assert "one step of 4 x 400 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--length", "many"], "no whole number"),
        (["--device", "h10"], "did you mean 'h100'"),
        (["--ranks", "2", "--strategy", "fsdq", "--length", "64"], "did you mean 'fsdp'"),
        (["--ranks", "2", "--check"], "leave --ranks out"),
        (["--model.segmnt", "4"], "segment"),
    ],
)
def test_bad_commands(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *SMALL, *words]) in (1, 2)
    assert said in capsys.readouterr().err


def test_help_and_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--help"]) == 0
    assert "--ranks R" in capsys.readouterr().out
    assert main(["estimate", "--length", "5"]) == 2
    assert "which recipe?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_estimate_is_what_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "-c",
        "text/stdlib_ar",
        "--length",
        "1024",
        "--batch",
        "2",
        "--model.backbone.depth",
        "2",
        "--check",
        "--json",
        "-",
    ]
    assert run_estimate(words) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert abs(measured["peak_error"]) < 0.2
    assert measured["flops_error"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.backbone.ffn={name: switch, experts: 2}"], "took an even share of the tokens"),
        (["--model.backbone.parts=[mamba2, {dynamic: 4, parts: [mamba2]}]"], "counted at the length aimed at"),
    ],
)
def test_work_that_depends_on_values(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    """Of a recipe, and the report says what was supposed."""
    assert run_estimate([*SMALL, *options, "--model.segment", "32", "--length", "64"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_without_a_device_it_says_how_to_ask_for_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_estimate(SMALL) == 0
    assert "--device here measures this one" in capsys.readouterr().out
