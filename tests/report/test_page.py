"""Pages of whole, unfinished and damaged runs: well-formed, of themselves alone, escaped, and plain about what is missing."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmlong.report import BadRunError, comparison_page, gather, report_page
from mmlong.report.media import Budget

from .conftest import CLASSES, HOSTILE, Page, parse, write_run


def check(page: str) -> Page:
    """What must hold of every page."""
    parsed = parse(page)
    assert parsed.wrong == []
    assert parsed.open == []
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    known = set(ids)
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href"):
            value = attrs.get(name)
            assert value is None or value.startswith("data:") or value.removeprefix("#") in known, (tag, value)
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attrs.get(name) or "").split()) <= known
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    for image in parsed.all("img"):
        assert image.get("alt")
    for table in range(len(parsed.all("table"))):
        assert len(parsed.all("caption")) > table
    for svg in parsed.all("svg"):
        assert svg.get("aria-labelledby") or svg.get("aria-hidden") == "true"
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert parsed.all("html") == [{"lang": "en"}]
    return parsed


def test_a_page_of_a_whole_run(run_folder: Path) -> None:
    run = gather(run_folder)
    assert run.missing == []
    parsed = check(report_page(run))
    for said in (
        "made/up · run", "ClassifyTask, on made, finished", "mmlong fit -c made/up", "drawn by <hand>", "CC0", "A <Fast> One", "abc+", "python 3.11",
        "test Accuracy 80.00%", "2 min", "4,321", "1.00 GiB", "Loss", "Throughput", "24 of 30 right", "Expected calibration error",
        "tokens trained on 123,456", "CPU time", "The whole configuration (config.yaml)", *CLASSES,
    ):  # fmt: skip
        assert said in parsed.said, said
    assert "not whole" not in parsed.said
    rows = re.findall(r"What differs from made/up(.*?)The whole configuration", parsed.said)[0]
    assert "model.optim.lr 0.001 0.002" in rows
    assert "trainer.max_steps 100 60" in rows
    assert "dim" not in rows  # the same as in the recipe
    # The chart of the loss says where it begins and ends, for those who do not see it.
    assert "validation: 0.5 at step 19, 0.5 at step 59" in parsed.said


def test_samples_are_shown_as_what_they_are_and_text_is_only_text(run_folder: Path) -> None:
    parsed = check(report_page(gather(run_folder)))
    (image,) = parsed.all("img")
    assert image["src"].startswith("data:image/png;base64,")
    assert image["alt"] == "test sample 3: is cat: right: said cat, 90% sure"
    (sound,) = parsed.all("audio")
    assert sound["src"].startswith("data:audio/wav;base64,")
    assert "controls" in sound
    assert "wrong: said cat, 60% sure" in sound["aria-label"]
    assert "</pre><script>alert(1)</script>&amp;<img src=x onerror=alert(2)>" in " ".join(parsed.text)
    assert "ACGT" in parsed.said
    assert "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} made" in parsed.said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", report_page(gather(run_folder)))


def test_names_of_classes_runs_and_settings_are_only_text(run_folder: Path) -> None:
    story = json.loads((run_folder / "run.json").read_text())
    story |= {
        "recipe": HOSTILE,
        "class_names": [HOSTILE],
        "task": HOSTILE,
        "recipes": {HOSTILE: story["recipes"]["made/up"]},
    }
    story["parts"][0]["command"] = HOSTILE
    (run_folder / "run.json").write_text(json.dumps(story))
    summary = json.loads((run_folder / "summary.json").read_text()) | {
        "recipe": HOSTILE,
        f"test/{HOSTILE}": 1.0,
        "weights": HOSTILE,
    }
    (run_folder / "summary.json").write_text(json.dumps(summary))
    text = (run_folder / "metrics.csv").read_text().replace("val/accuracy", 'val/<script>alert(1)</script>" onload="x')
    (run_folder / "metrics.csv").write_text(text)
    run = gather(run_folder)
    check(report_page(run))
    check(comparison_page([run, run]))


def test_an_unfinished_run_says_so_and_how_it_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "stopped", finished=False)
    for name in ("predictions.csv", "samples-0.txt"):
        (folder / name).unlink()
    parsed = check(report_page(gather(folder)))
    assert "This run is not finished" in parsed.said
    assert "summary.json is not there: training did not come to its end, or is still going on" in parsed.said
    assert f"mmlong fit --ckpt_path {folder}" in parsed.said
    assert "the newest checkpoint is step=60.ckpt" in parsed.said
    assert "not finished, at step 60" in parsed.said
    assert "CC0" in parsed.said
    assert "peak memory not recorded" in parsed.said
    assert "Confusion" not in parsed.said


DAMAGE = {
    "summary.json": (b'{"recipe": "ma', "summary.json is damaged and left out"),
    "run.json": (b"[1, 2]", "run.json is damaged and left out: it holds list"),
    "metrics.csv": (b"step,train/loss\n0,many\n", "metrics.csv is damaged and left out"),
    "config.yaml": (b"a: [1", "config.yaml is no YAML"),
    "predictions.csv": (
        b"index,truth,prediction,probability\n0,a,b,7\n",
        "predictions.csv is damaged and left out: probability 7",
    ),
    "examples/00.png": (b"GIF89a", "00.png is damaged: it is no image/png"),
    "examples/examples.csv": (
        b"file,index,truth,prediction,probability\n../config.yaml,1,a,b,1\n",
        "examples/../config.yaml is not there",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_and_the_rest_is_shown(run_folder: Path, name: str) -> None:
    content, said = DAMAGE[name]
    (run_folder / name).write_bytes(content)
    parsed = check(report_page(gather(run_folder)))
    assert said in parsed.said
    assert "This page is not whole" in parsed.said or name == "summary.json"
    assert "made/up" in parsed.said


@pytest.mark.parametrize("name", ["summary.json", "run.json", "metrics.csv", "config.yaml", "predictions.csv"])
def test_bytes_that_are_no_text(run_folder: Path, name: str) -> None:
    (run_folder / name).write_bytes(b"\xff\xfe\x00\x01")
    assert f"{name} is damaged and left out" in check(report_page(gather(run_folder))).said


def test_a_link_out_of_the_run_is_not_followed(run_folder: Path) -> None:
    secret = run_folder.parent / "secret.txt"
    secret.write_text("do not show")
    (run_folder / "samples-1.txt").symlink_to(secret)
    assert "do not show" not in report_page(gather(run_folder))


def test_predictions_of_other_weights_are_noticed(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text()) | {"test/accuracy": 0.5}
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert (
        "predictions.csv is of other weights or samples than the test: 0.8000"
        in check(report_page(gather(run_folder))).said
    )


def test_files_that_are_too_large_are_left_out_and_named(run_folder: Path) -> None:
    parsed = check(report_page(gather(run_folder), budget=Budget(file=100)))
    assert "01-0.wav has 204 bytes; a file of a page has at most 100" in parsed.said
    assert not parsed.all("audio")
    parsed = check(report_page(gather(run_folder), budget=Budget(page=150)))
    assert "01-0.wav has 204 bytes, and the page is full" in parsed.said


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadRunError, match="no such folder"):
        gather(tmp_path / "none")
    with pytest.raises(
        BadRunError, match=r"is no run folder: it has no config.yaml, run.json, metrics.csv or summary.json"
    ):
        gather(tmp_path)


def test_several_runs_on_a_page(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", finished=False)
    (other / "config.yaml").write_text(
        (other / "config.yaml").read_text().replace("dim: 16", "dim: 32").replace("0.002", "2e-3")
    )
    parsed = check(comparison_page([gather(one), gather(other)]))
    assert "1 settings differ" in parsed.said
    assert "model.backbone.dim 16 32" in parsed.said
    assert "test Accuracy 80.00% —" in parsed.said
    assert "finished yes no" in parsed.said
    assert "B: summary.json is not there" in parsed.said
    assert "A, validation" in parsed.said
    assert "B, training, smoothed" in parsed.said
    with pytest.raises(ValueError, match="two to 8 runs can be compared on a page, not 1"):
        comparison_page([gather(one)])


def test_a_run_of_another_task_has_no_matrix(run_folder: Path) -> None:
    (run_folder / "predictions.csv").write_text("index,value0\n0,1.5\n")
    run = gather(run_folder)
    assert run.predictions == []
    assert run.missing == []
    assert "Confusion" not in check(report_page(run)).said


def test_predictions_of_several_ranks_are_put_together(run_folder: Path) -> None:
    head, *rows = (run_folder / "predictions.csv").read_text().splitlines(keepends=True)
    (run_folder / "predictions.csv").unlink()
    (run_folder / "predictions.rank0.csv").write_text(head + "".join(rows[::2]))
    (run_folder / "predictions.rank1.csv").write_text(head + "".join(rows[1::2]) + rows[0])
    assert [p.index for p in gather(run_folder).predictions] == list(range(30))


def test_a_run_without_examples_shows_the_sheet_that_it_drew(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "examples")
    Image.new("RGB", (40, 20), "red").save(run_folder / "predictions.png")
    parsed = check(report_page(gather(run_folder)))
    assert "Drawn by the run" in parsed.said
    assert any(tag == "img" and "sheet" in (attrs["alt"] or "") for tag, attrs in parsed.tags)
