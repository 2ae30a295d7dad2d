"""The other objectives from the command line, and a backbone that goes from one to the next."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import mmlong as package

Call = Callable[..., tuple[int, str]]


def one_run(name: str) -> Path:
    (found,) = Path("runs", name).iterdir()
    return found


def test_a_backbone_goes_from_pictures_to_their_bytes(mmlong: Call, recipe: str) -> None:
    """A classifier of real pixels, then masked bytes of the same pictures: another modality, head and objective, the same backbone."""
    both = "--model.backbone.direction=alternate"
    status, said = mmlong("fit", "-c", recipe, both, "--trainer.max_steps=3", "--test_after_fit=null")
    assert status == 0, said
    first = one_run("noise")
    trained = load_file(first / "backbone.safetensors")
    assert trained.keys() == {
        key.removeprefix("backbone.") for key in load_file(first / "model.safetensors") if key.startswith("backbone.")
    }
    text = Path(recipe).read_text().replace("ClassifyTask", "MaskedTask").replace("name: image", "name: image_bytes")
    Path("bytes.yaml").write_text("\n".join(line for line in text.splitlines() if "head:" not in line) + "\n")
    again = ["fit", "-c", "bytes.yaml", both, "--best_by=val/bits", "--trainer.max_steps=4"]
    masked = ["--model.masking.span=3", "--model.masking.lengths=fixed"]
    status, said = mmlong(*again, *masked, f"--model.backbone_from={first}", "--model.freeze_backbone=true")
    assert status == 0, said
    assert f"the backbone begins with the weights of {first / 'backbone.safetensors'}" in said
    assert "the backbone is frozen" in said
    assert "test accuracy 0." in said
    assert ", bits " in said
    second = one_run("bytes")
    kept = load_file(second / "backbone.safetensors")
    for key, value in trained.items():  # frozen, and so as it was; its average is so to rounding
        torch.testing.assert_close(kept[key], value, rtol=1e-5, atol=0.0)
    assert type(package.load_model(second)).__name__ == "MaskedModel"
    assert "backbone_from" in (second / "config.yaml").read_text()

    # Going on needs the first run no more.
    first.rename("elsewhere")
    status, said = mmlong("fit", "--ckpt_path", str(second), "--trainer.max_steps=5")
    assert status == 0, said
    assert "begins with" not in said
    status, said = mmlong(*again, f"--model.backbone_from={first}", "--run_dir=runs/none")
    assert status == 1
    assert f"there is no {first}" in said
    status, said = mmlong(*again, "--model.backbone_from=elsewhere", "--model.backbone.dim=12", "--run_dir=runs/wide")
    assert status == 1
    assert "dim: 8 in backbone.safetensors, 12 here" in said


def test_embeddings_are_trained_and_written(mmlong: Call, recipe: str) -> None:
    text = Path(recipe).read_text().replace("ClassifyTask", "ContrastTask").replace("name: classify", "num_classes: 4")
    Path("contrast.yaml").write_text(text)
    status, said = mmlong("fit", "-c", "contrast.yaml", '--model.views=["flip","noise:4"]', "--trainer.max_steps=4")
    assert status == 0, said
    run = one_run("contrast")
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["test/accuracy"] <= 1
    status, said = mmlong("predict", "--ckpt_path", str(run))
    assert status == 0, said
    with open(run / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == list(range(21))
    assert list(rows[0]) == ["index", *(f"value{n}" for n in range(8)), "source"]
    assert all(math.isfinite(float(rows[0][f"value{n}"])) for n in range(8))
    assert rows[0]["source"].startswith("made/")
