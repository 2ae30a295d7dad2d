"""``mmlong export`` on saved models, and what it says when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlong.cli import main
from mmlong.export import Predictor, load
from mmlong.models import Model, build_model, save_model


def save(folder: Path, names: Sequence[str] = (), head: str = "classify", **more: Any) -> Model:
    torch.manual_seed(0)
    model = build_model(
        {
            "modality": {"name": "image", "size": [3, 4]},
            "backbone": {"dim": 8, "depth": 1, "mixers": ["attention"], "direction": "both", "ffn": "none"},
            "head": {"name": head, "num_classes": 10},
        }
    ).eval()
    model.class_names = list(names)
    save_model(model, folder)
    return model


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_run_is_exported_with_the_names_of_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"digit {number}" for number in range(10)]
    model = save(tmp_path / "run", names)
    status, out, err = run(capsys, "export", tmp_path / "run", "--batch", "1:64")
    assert status == 0, err
    folder = tmp_path / "run" / "exported" / "torch"
    assert f"in {folder}: predict.pt2 and export.json" in out
    assert "predict: largest difference from the model" in out
    info = json.loads((folder / "export.json").read_text())
    assert info["programs"]["predict"]["bounds"] == {"batch": [1, 64]}
    assert info["class_names"] == names
    predictor = load(folder)
    assert isinstance(predictor, Predictor)
    raw = torch.randint(256, (3, 1, 3, 4), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(predictor(raw), model(model.encode(raw)[0])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_whose_classes_nobody_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "run")
    out_folder = tmp_path / "out"
    status, _, err = run(capsys, "export", tmp_path / "run", "--out", out_folder, "--embedding", "--batch", 2)
    assert status == 0, err
    assert json.loads((out_folder / "export.json").read_text())["class_names"] == []
    assert load(out_folder).info["programs"]["predict"]["outputs"][0]["shape"] == [2, 8]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--batch", "8:1"], 2, "--batch 8:1: bounds are two numbers"),
        (["--length", "many"], 2, "--length many: give two whole numbers"),
        (["--length", "1:5"], 1, "sequences of at least 2"),
        (["--temperature", "0.5"], 1, "nothing to draw"),
        (["--temperature", "-1"], 1, "temperature is -1.0"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run")
    found, _, err = run(capsys, "export", tmp_path / "run", *options)
    assert (found, message in err) == (status, True), err
    assert not (tmp_path / "run" / "exported").exists()


def test_there_must_be_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "export", "image/nothing", "--runs", tmp_path)
    assert status == 2
    assert "image/nothing: no such folder" in err
    status, _, err = run(capsys, "export", tmp_path)
    assert status == 1
    assert "holds no saved model" in err
