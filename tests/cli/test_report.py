"""``mmlong report``: a real run, from training to the page, and what is wrong with a command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str]]


def _rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_its_page_shows(mmlong: Call, recipe: str) -> None:
    status, said = mmlong("fit", "-c", recipe, "--trainer.max_steps=3", "--run_dir", "run", "--model.optim.lr=2e-3")
    assert status == 0, said
    story = json.loads(Path("run/run.json").read_text())
    assert story["data"]["source"] == "random pixels"
    assert story["data"]["licence"] == "none needed"
    assert story["class_names"] == ["a", "b", "c"]
    assert story["task"] == "ClassifyTask"
    assert story["recipes"]["noise"]["trainer"]["max_steps"] == 8
    (part,) = story["parts"]
    assert part["command"].startswith("mmlong fit -c noise.yaml")
    assert part["machine"]["device"] == "cpu"
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["tokens"] == 3 * 8 * 256
    assert summary["train_cpu_seconds"] > 0
    predictions = _rows("run/predictions.csv")
    assert [int(row["index"]) for row in predictions] == list(range(21))
    right = sum(row["truth"] == row["prediction"] for row in predictions)
    assert right / 21 == pytest.approx(summary["test/accuracy"], abs=1e-6)
    examples = _rows("run/examples/examples.csv")
    assert len(examples) == right + min(8, 21 - right) == len(list(Path("run/examples").glob("*.png")))
    for row in examples:
        assert {key: row[key] for key in predictions[0]} == predictions[int(row["index"])]

    status, said = mmlong("report", "run", "--influence", "--influence_length", "64")
    assert status == 0, said
    page = Path("run/report.html").read_text()
    assert "run/report.html" in said
    assert page.count("data:image/png;base64,") == len(examples) + 1
    assert "trainer.max_steps" in page.partition("What differs from noise")[2]
    assert "64 outputs" in page
    assert "who influences whom" in page.lower()

    # Another command on the same run is a part of its story, and a prediction writes what the test wrote.
    status, said = mmlong("fit", "--ckpt_path", "run", "--trainer.max_steps=4")
    assert status == 0, said
    story = json.loads(Path("run/run.json").read_text())
    assert len(story["parts"]) == 2
    assert story["recipes"]["noise"]["trainer"]["max_steps"] == 8
    written = Path("run/predictions.csv").read_text()
    status, said = mmlong("predict", "--ckpt_path", "run")
    assert status == 0, said
    assert Path("run/predictions.csv").read_text() == written
    status, said = mmlong("report", "--compare", "run", "run", "--out", "deep/both.html")
    assert status == 0, said
    assert "All settings are the same" in Path("deep/both.html").read_text()


@pytest.mark.parametrize(
    ("words", "status", "answer"),
    [
        (["nothing"], 2, "nothing: no such folder, and no run of a recipe of this name under runs/"),
        (["empty"], 1, "empty is no run folder"),
        (["part", "part"], 2, "2 runs: --compare puts them on one page"),
        (["part", "part", "--compare"], 2, "--compare needs --out FILE"),
        (["part", "--compare", "--out", "x.html"], 2, "two to 8 runs can be compared on a page, not 1"),
        (["part", "part", "--compare", "--influence", "--out", "x.html"], 2, "--influence is of one run"),
        (["part", "--influence"], 1, "config.json is missing"),
        (["part", "--influence_length", "1", "--influence"], 2, "--influence_length is at least 2"),
        (["part", "--out", "empty"], 1, "--out empty: Is a directory"),
    ],
)
def test_what_is_wrong_with_a_command(
    mmlong: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int, answer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("part").mkdir()
    Path("part/metrics.csv").write_text("step,train/loss\n0,1.5\n")
    found, said = mmlong("report", *words)
    assert found == status
    assert answer in said
    assert not Path("x.html").exists()


def test_a_run_that_has_only_begun_is_found_by_its_recipe(
    mmlong: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stamp in ("1", "2"):
        folder = Path("runs/kind/name") / stamp
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("recipe: kind/name\n")
    status, said = mmlong("report", "kind/name")
    assert status == 0
    assert "runs/kind/name/2/report.html" in said
    assert "summary.json is not there" in said
