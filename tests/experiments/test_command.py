"""What the command lines of experiments share: names, files that are gone on with, answers in a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from mmlong.experiments.command import (
    add_result_options,
    add_trial_options,
    answers,
    experiment_parser,
    keep,
    kept,
    parse_names,
)

from mmlong.cli.errors import CommandError


def test_a_parser_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    parser = experiment_parser("minutes", "What it is.\n\nAnd more.")
    add_trial_options(parser, Path("runs/minutes"))
    add_result_options(parser, "RUNS/found.json", plot=True)
    args = parse_names(parser, ["a", "b"], ["--set", "x.y=1", "--json", "f.json"])
    assert args.names == ["a", "b"]
    assert (args.set, args.runs, args.json, args.plot) == ([("x.y", "1")], Path("runs/minutes"), Path("f.json"), None)
    for words, said in ((["--help"], "python -m mmlong.experiments.minutes"), (["--set", "x"], "is not KEY=VALUE")):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        told = capsys.readouterr()
        assert said in told.out + told.err
        assert "And more" not in told.out


def test_names_are_of_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_names(experiment_parser("x", None), ["a", "b"], ["b"]).names == ["b"]
    with pytest.raises(SystemExit):
        parse_names(experiment_parser("x", None), ["a", "b"], ["c"])
    assert "'c' is none of a, b" in capsys.readouterr().err


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "f.json"
    assert kept(file, []) == []
    keep(file, [{"a": 1}])
    assert kept(file, []) == [{"a": 1}]
    keep(None, [1])
    assert kept(None, {}) == {}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(CommandError("no such thing", status=3), 3, "no such thing\n"), (KeyboardInterrupt(), 130, "stopped; the same command goes on\n")],
)  # fmt: skip
def test_errors_are_answered_in_a_line(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    @answers
    def main(argv: Sequence[str] | None = None) -> int:
        if argv:
            raise error
        return 7

    assert main([]) == 7
    assert main(["x"]) == status
    assert capsys.readouterr().err == said
