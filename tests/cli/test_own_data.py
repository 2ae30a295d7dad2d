"""Data of one's own under recipes that were written for others, small budgets, and files that are not as a model reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import mmlong as library
from mmlong.backbone import BackboneConfig
from mmlong.cli import main
from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes
from mmlong.models import Model, build_model, save_model
from mmlong.tasks import AutoregressTask, ClassifyTask
from mmlong.training.metrics_csv import column, read_metrics
from mmlong.training.optim import OptimConfig, schedule_factor

Call = Callable[..., tuple[int, str]]


# recipes


def test_another_dataset_leaves_out_what_was_said_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = load_recipes(["image/cells256"], ["--data.dataset", "mine"])["data"]["init_args"]
    assert "label" not in arguments
    assert arguments["augment"] == ["hflip", "vflip"]
    assert "data.label type is left out: it is of elpv, and data.dataset is mine" in capsys.readouterr().err
    # A file on top says it too, and what that file says itself stays.
    (tmp_path / "mine.yaml").write_text("data: {init_args: {dataset: mine, label: kind}}\n")
    arguments = load_recipes(["image/cells256", str(tmp_path / "mine.yaml")])["data"]["init_args"]
    assert arguments["label"] == "kind"
    assert "size" not in load_recipes(["image/photo_ar"], ["--data.init_args.dataset=mine"])["data"]["init_args"]
    capsys.readouterr()
    for same in ([], ["--data.dataset", "elpv"], ["--data.batch_size", "3"]):
        assert load_recipes(["image/cells256"], same)["data"]["init_args"]["label"] == "type"
    assert capsys.readouterr().err == ""


def test_a_recipe_of_another_dataset_trains(mmlong: Call, recipe: str, packed: Path) -> None:
    """The pixels of the tests under the solar cells' recipe."""
    status, said = mmlong("fit", "-c", "image/cells256", "-c", "image/cells256.debug", "--data.dataset", str(packed), "--trainer.max_steps", "2", "--recipe", "own")  # fmt: skip
    assert status == 0, said
    assert "data.label type, data.size 32 is left out: it is of elpv" in said
    assert "own: test accuracy" in said


def test_a_run_shorter_than_its_validations_is_validated_at_the_end(mmlong: Call, recipe: str) -> None:
    epochs = "--trainer.check_val_every_n_epoch=null"
    status, said = mmlong("fit", "-c", recipe, epochs, "--trainer.max_steps=5", "--trainer.val_check_interval=100")
    assert status == 0, said
    assert "val_check_interval 100 is beyond the end: validating after step 5" in said
    (run,) = Path("runs", "noise").iterdir()
    assert len(column(read_metrics(run / "metrics.csv"), "train/loss")[1]) >= 4, "a curve"
    assert len(column(read_metrics(run / "metrics.csv"), "val/accuracy")[1]) == 1
    assert (run / "checkpoints" / "best.ckpt").is_file()
    status, said = mmlong("fit", "-c", recipe, epochs, "--trainer.max_steps=5", "--trainer.val_check_interval=5")
    assert "beyond the end" not in said


def test_warm_up_ends_in_time() -> None:
    config = OptimConfig(lr=1.0, warmup=100, min_lr=0.0)
    factors = [schedule_factor(step, config, 20) for step in range(20)]
    assert max(factors) == factors[10] == 1.0
    assert [schedule_factor(step, config, 1000) for step in (0, 99, 100)] == [1 / 101, 100 / 101, 1.0]


def test_a_folder_of_files_is_no_dataset_and_the_error_says_what_to_do(
    mmlong: Call, recipe: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "photos" / "a.png")
    status, said = mmlong("fit", "-c", recipe, "--data.dataset=photos")
    assert status == 1
    assert "photos is a known dataset, and there is a folder of this name here: ./photos means the folder" in said
    status, said = mmlong("fit", "-c", recipe, "--data.dataset=./photos")
    assert status == 1
    assert "`mmlong pack KIND photos OUT`, and OUT is what is to be named" in said
    status, said = mmlong("fit", "-c", recipe, "--data.batch_size=500")
    assert status == 1
    assert "70 training samples do not fill one global batch of 500 (batch size x ranks); lower data.batch_size, so that it is at most 70" in said  # fmt: skip


def test_a_classifier_of_data_without_classes_says_so(mmlong: Call, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    for number in range(12):
        Image.new("L", (16, 16), number).save(tmp_path / "loose" / f"{number}.png")
    assert mmlong("pack", "image", "loose", "bare", "--unlabelled")[0] == 0
    status, said = mmlong("fit", "-c", recipe, "--data.dataset=bare")
    assert status == 1
    assert "ClassifyTask learns classes, and the data has none: pack it with labels" in said


def test_rows_that_a_masked_convolution_was_not_told_of_are_refused() -> None:
    def task(width: int, **modality: Any) -> AutoregressTask:
        backbone = BackboneConfig(dim=8, depth=1, mixers=[{"name": "masked_conv2d", "width": width, "radius": 1}])
        return AutoregressTask({"order": "raster", **modality}, backbone)

    task(12, name="image", size=[5, 12], channels=3)
    task(36, name="image_bytes", size=[5, 12], channels=3)
    with pytest.raises(
        ValueError,
        match=r"has width 64, and a row of these pictures is 12 tokens: pack them with a --size of 64 columns",
    ):
        task(64, name="image", size=[5, 12], channels=3)


# names of classes


def test_a_model_carries_the_names_of_its_classes(tmp_path: Path) -> None:
    info = {"modality": {"size": [4, 4], "channels": 1}, "num_classes": 2, "class_names": ["cat", "dog"]}
    task = ClassifyTask({"name": "image"}, BackboneConfig(dim=8, depth=1, mixers=["s4d"]), data_info=info)
    task.model.save_pretrained(tmp_path / "kept")
    again = library.load(tmp_path / "kept")
    assert again.class_names == ["cat", "dog"]
    assert again.config == task.model.config
    again.save_pretrained(tmp_path / "twice")
    assert library.load(tmp_path / "twice").class_names == ["cat", "dog"]
    again.reset_classifier(3)
    assert again.class_names == []
    path = tmp_path / "kept" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": "cat"}))
    with pytest.raises(ValueError, match="class_names is no list of names"):
        library.load(tmp_path / "kept")


# files of one's own


def make(folder: Path, modality: dict[str, Any], head: dict[str, Any], names: tuple[str, ...] = ()) -> Model:
    torch.manual_seed(0)
    backbone = {"dim": 8, "depth": 1, "mixers": ["s4d"], "direction": "both"}
    model = build_model({"modality": modality, "backbone": backbone, "head": head}).eval()
    model.class_names = list(names)
    save_model(model, folder)
    return model


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_what_a_classifier_says_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(tmp_path / "run", {"name": "image", "size": [4, 6], "channels": 3}, {"name": "classify", "num_classes": 2}, ("cat", "dog"))  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).resize((50, 31)).convert("LA").save(tmp_path / "b.png")
    table = tmp_path / "new" / "said.csv"
    status, said = run(
        capsys, "classify", tmp_path / "run", tmp_path / "a.png", tmp_path / "b.png", "--fit", "stretch", "--out", table
    )
    assert status == 0, said
    with torch.inference_mode():
        due = model(model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0])[0][0].softmax(-1)
    with open(table, newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["file"] == str(tmp_path / "a.png")
    assert (first["prediction"], second["file"]) == (("cat", "dog")[int(due.argmax())], str(tmp_path / "b.png"))
    assert float(first["cat"]) == pytest.approx(float(due[0]), abs=1e-5)
    assert f"a.png: {first['prediction']} {float(due.max()):.3f}" in said
    status, said = run(capsys, "classify", tmp_path / "run", tmp_path / "b.png")
    assert status == 1
    assert "is 50x31; this model reads 6x4: --fit crop resizes it" in said


def test_labels_numbers_and_models_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes(b"some text")
    make(tmp_path / "many", {"name": "text"}, {"name": "multilabel", "num_classes": 2}, ("long", "short"))
    status, said = run(capsys, "classify", tmp_path / "many", tmp_path / "t.txt", "--out", tmp_path / "many.csv")
    assert status == 0, said
    with open(tmp_path / "many.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["prediction"] == "; ".join(name for name in ("long", "short") if float(row[name]) >= 0.5)
    make(tmp_path / "number", {"name": "text"}, {"name": "regress", "num_classes": 1})
    status, said = run(capsys, "classify", tmp_path / "number", tmp_path / "t.txt")
    assert (status, "t.txt: 0 " in said) == (0, True)
    save_model(
        build_model(
            {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 8, "depth": 1}, "head": {}}
        ),
        tmp_path / "ar",
    )
    status, said = run(capsys, "classify", tmp_path / "ar", tmp_path / "t.txt")
    assert status == 1
    assert "says nothing of a file as a whole: mmlong generate, score and embed are for it" in said


def test_sounds_are_converted_only_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run", {"name": "audio", "rate": 8000}, {"name": "classify", "num_classes": 2})
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 400).astype(np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, wave], 1), 8000)
    soundfile.write(tmp_path / "mono.wav", wave, 8000)
    soundfile.write(tmp_path / "fast.wav", wave, 16000)
    for name, option in (("stereo", "--mono"), ("fast", "--resample")):
        status, said = run(capsys, "embed", tmp_path / "run", tmp_path / f"{name}.wav", "--out", tmp_path / "f.npz")
        assert status == 1
        assert f"({option})" in said
        status, said = run(
            capsys, "embed", tmp_path / "run", tmp_path / f"{name}.wav", option, "--out", tmp_path / f"{name}.npz"
        )
        assert status == 0, said
    run(capsys, "embed", tmp_path / "run", tmp_path / "mono.wav", "--out", tmp_path / "mono.npz")
    left, right = (np.load(tmp_path / f"{name}.npz")["features"] for name in ("mono", "stereo"))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_embed_fits_pictures_as_packing_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmlong.datamodules.pixels import fit_image

    make(tmp_path / "run", {"name": "image", "size": [8, 8]}, {"name": "classify", "num_classes": 2})
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8))
    big.save(tmp_path / "big.png")
    for how in ("crop", "pad", "stretch"):
        fit_image(big, 8, 8, how).save(tmp_path / f"{how}.png")
        status, said = run(
            capsys, "embed", tmp_path / "run", tmp_path / "big.png", "--fit", how, "--out", tmp_path / "a.npz"
        )
        assert status == 0, said
        run(capsys, "embed", tmp_path / "run", tmp_path / f"{how}.png", "--out", tmp_path / "b.npz")
        np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["features"], np.load(tmp_path / "b.npz")["features"])


def test_a_command_error_is_one(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no recipe 'image/none'"):
        load_recipes(["image/none"], ["--data.dataset", str(tmp_path)])
