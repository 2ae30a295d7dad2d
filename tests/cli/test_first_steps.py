"""What someone with files of their own does first, and what they get wrong: each is answered with what, where and what to do."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mmlong.datamodules.text import TextDataModule
from PIL import Image

import mmlong as library
from mmlong.cli.runs import resolve_checkpoint, resolve_run

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of five pictures, and what lies about beside them."""
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        file = Path("mine", "ab"[number % 2], f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8 + number, 9), 20 * number).save(file)
    Path("mine/a/notes.txt").write_text("a cat")
    return Path("mine")


def wrong(mmlong: Call, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of a command that the parser refuses."""
    with pytest.raises(SystemExit) as left:
        mmlong(*words)
    assert left.value.code == 2
    return capfd.readouterr().err


# packing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "big"), "'big' is no size in pixels, such as 256 or 128x256"),
        (("--size", "0"), "'0' is no size in pixels"),
        (("--size", "8x"), "'8x' is no size in pixels"),
        (("--size", "8", "--split", "val=a"), "'val=a' is not like val=200 or test=0.1"),
        (("--size", "8", "--split", "val=-1"), "'val=-1' is not like val=200 or test=0.1"),
        (("--size", "8", "--shard-size", "huge"), "'huge' is no number of bytes, such as 32M or 1G"),
        (("--rate", "8000"), "--rate is an option of audio; what image packs is of modality image"),
    ],
)
def test_options_of_packing_that_make_no_sense(
    mmlong: Call, capfd: pytest.CaptureFixture[str], pictures: Path, words: tuple[str, ...], said: str
) -> None:
    assert said in wrong(mmlong, capfd, "pack", "image", "mine", "out", *words)


def test_folders_of_packing(mmlong: Call, capfd: pytest.CaptureFixture[str], pictures: Path) -> None:
    said = wrong(mmlong, capfd, "pack", "image", "mine")
    assert "image takes IN and OUT, what is to be packed and a folder to be made; given: mine" in said
    # The next time it would be read as data: of texts, everything is.
    for out in ("mine/packed", "mine/a/../packed", os.path.abspath("mine/packed")):
        assert "lies in IN, where it would be taken for data" in wrong(mmlong, capfd, "pack", "text", "mine", out)
    assert not Path("mine/packed").exists()
    status, said = mmlong("pack", "audio", "mine", "out")
    assert status == 1
    assert "mine: no sounds in it (.aif" in said
    assert "; what is there: 10 .png, 1 .txt" in said
    assert mmlong("pack", "image", "mine", "out", "--size", "8")[0] == 0
    status, said = mmlong("pack", "image", "out", "again", "--size", "8")
    assert (status, "it is packed already: `mmlong fit -c RECIPE --data.dataset` takes it" in said) == (1, True)
    status, said = mmlong("pack", "image", "mine", "more", "--size", "8", "--split", "test=100")
    assert (status, "the splits (test=100) ask for 100 of 10 samples; ask for fewer" in said) == (1, True)
    status, said = mmlong("pack", "--verify", "nowhere")
    assert status == 1
    assert "nowhere: is not a packed dataset (there is no such folder)" in said
    assert "not whole, 1 fault\n" in said


def test_packing_says_what_to_do_next_and_the_command_is_right(mmlong: Call, pictures: Path) -> None:
    status, said = mmlong("pack", "image", "mine", "my pictures", "--size", "8")
    assert status == 0
    (line,) = [line for line in said.splitlines() if "to train on it: " in line]
    assert line.strip() == "to train on it: mmlong fit -c image/cells256 --data.dataset 'my pictures'"


def test_every_recipe_that_packing_names_takes_its_modality() -> None:
    from mmlong.cli.pack import RECIPES
    from mmlong.cli.recipes import load_recipe

    for (modality, labelled), name in RECIPES.items():
        _, recipe = load_recipe(name)
        assert recipe["data"]["class_path"].rpartition(".")[2].lower().startswith(modality), name
        assert recipe["model"]["class_path"].endswith("ClassifyTask" if labelled else "AutoregressTask"), name


def test_bad_files_are_counted_with_the_others(mmlong: Call, pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("mine/a/none.png").touch()
    Path("mine/a/text.png").write_text("no picture")
    status, said = mmlong("pack", "image", "mine", "out", "--size", "8")
    assert status == 1
    assert "a/none.png: cannot be opened as an image: it is an empty file; --on-bad skip" in said
    status, said = mmlong("pack", "image", "mine", "out", "--size", "8", "--on-bad", "skip")
    assert status == 0
    assert "12 images" in said
    assert "a/text.png: cannot be opened as an image: it is in no format that is read (PNG, JPEG," in caplog.text
    rates = {"mine/a/slow.wav": 8000, "mine/a/x.wav": 8000, "mine/b/y.wav": 8000, "mine/b/fast.wav": 16000}
    for file, rate in rates.items():
        soundfile.write(file, np.zeros(99, np.float32), rate)
    status, said = mmlong("pack", "audio", "mine", "sounds", "--on-bad", "skip")
    assert status == 0
    assert "mine: 4 sounds" in said


# training


def test_nothing_is_left_of_a_run_that_did_not_begin(mmlong: Call, recipe: str) -> None:
    for option in ("--data.dataset=nowhere", "--data.batch_size=500", "--model.backbone.mixers=[none]"):
        status, _ = mmlong("fit", "-c", recipe, option)
        assert status == 1
        assert not Path("runs").exists(), option
    Path("own").mkdir()
    Path("own/notes.txt").write_text("mine")
    assert mmlong("fit", "-c", recipe, "--data.batch_size=500", "--run_dir=own")[0] == 1
    assert [path.name for path in Path("own").rglob("*")] == ["notes.txt"]


def test_data_is_named_by_its_dataset(mmlong: Call, recipe: str, packed: Path) -> None:
    status, said = mmlong("fit", "-c", recipe, "--data", "packed")
    assert status == 2
    assert "--data packed: data is a class, such as mmlong.datamodules.images.ImageDataModule; a packed dataset is named by --data.dataset packed" in said  # fmt: skip
    status, said = mmlong("fit", "-c", recipe, "--dataset", "packed")
    assert (status, "(did you mean 'data.dataset'?)" in said) == (2, True)
    status, said = mmlong("fit", "-c", "audio/digits8k", "--data.dataset", str(packed))
    assert (status, "holds image; AudioDataModule reads audio: take a recipe of image" in said) == (1, True)


def test_runs_are_named_as_they_are_called(mmlong: Call, recipe: str) -> None:
    status, said = mmlong("fit", "-c", recipe, "--recipe", "my/kinds", "--trainer.max_steps=2")
    assert status == 0, said
    (run,) = Path("runs/my/kinds").iterdir()
    status, said = mmlong("test", "-c", "my/kinds", "--ckpt_path", "runs/my/kinds")
    assert status == 0, said
    assert "my/kinds: test accuracy" in said
    assert f"see {run}" in said
    for what in ("last", "my/kinds", "runs/my/kinds", str(run)):
        assert resolve_checkpoint(what, "my/kinds", Path("runs")).run == run
        assert what == "last" or resolve_run(what, Path("runs")) == run
    status, said = mmlong("fit", "-c", "my/kinds", "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert status == 0, said
    assert f"going on from {run / 'checkpoints' / 'step=2.ckpt'}" in said
    # Without its name the recipe's own runs are meant, and there are none.
    status, said = mmlong("test", "-c", recipe, "--ckpt_path", "last")
    assert (status, "there are runs called my/kinds: -c takes such a name too" in said) == (2, True)
    status, said = mmlong("test", "--ckpt_path", "nowhere")
    assert (status, "--ckpt_path nowhere: neither a run folder, nor a file in one, nor what runs under runs/ are called" in said) == (2, True)  # fmt: skip
    # What the shell completes, the folder of the runs, is the newest.
    status, said = mmlong("report", "runs/my/kinds")
    assert (status, str(run / "report.html") in said) == (0, True)
    status, said = mmlong("report", "runs/my")
    assert (status, "is no run folder" in said) == (1, True)
    assert library.load("runs/my/kinds").class_names == ["a", "b", "c"]


def test_which_file_a_prediction_is_of(mmlong: Call, recipe: str) -> None:
    status, said = mmlong("fit", "-c", recipe, "--trainer.max_steps=1")
    assert status == 0, said
    (run,) = Path("runs/noise").iterdir()

    def sources(table: Path) -> dict[str, str]:
        with open(table, newline="") as stream:
            return {row["index"]: row["source"] for row in csv.DictReader(stream)}

    tested = sources(run / "predictions.csv")
    assert len(set(tested.values())) == 21
    with open(run / "predictions.csv", newline="") as stream:
        for row in csv.DictReader(stream):
            assert "abc"[int(row["source"].removeprefix("made/")) % 3] == row["truth"]
    shown = sources(run / "examples" / "examples.csv")
    assert shown
    assert shown.items() <= tested.items()
    assert mmlong("predict", "--ckpt_path", "noise")[0] == 0
    assert sources(run / "predictions.csv") == tested
    assert mmlong("report", "noise")[0] == 0
    page = (run / "report.html").read_text()
    assert all(f", {source}" in page for source in list(shown.values())[:3])


def test_rows_of_a_stream_are_of_no_one_file(mmlong: Call, pictures: Path) -> None:
    assert mmlong("pack", "text", "mine", "texts", "--unlabelled")[0] == 0
    whole, stream = TextDataModule("texts"), TextDataModule("texts", windows="stream", length=16)
    names = {whole.sample_name("train", number) for number in range(9)}
    assert len(names) == 9
    assert all(Path("mine", name).is_file() or Path(name).is_file() for name in names)
    assert stream.sample_name("train", 0) == ""


# what a trained model is used for


def classifier(folder: str) -> None:
    model = library.create_model("pixel_sequence", size=[4, 4], num_classes=2, dim=8, depth=1, mixers=["s4d"])
    model.class_names = ["cat", "dog"]
    model.save_pretrained(folder)


def test_bad_files_among_those_that_a_model_reads(mmlong: Call, pictures: Path) -> None:
    classifier("kept")
    files = ("mine/a/0.png", "mine/a/notes.txt", "mine/a/2.png", "gone.png")
    for command, out in (("classify", "said.csv"), ("embed", "features.npz")):
        status, said = mmlong(command, "kept", *files, "--fit", "crop", "--out", out)
        assert status == 1
        assert "mine/a/notes.txt: is no image: it is in no format that is read" in said
        assert "--on-bad skip leaves such out" in said
        assert not Path(out).exists()
        status, said = mmlong(command, "kept", *files, "--fit", "crop", "--out", out, "--on-bad", "skip")
        assert status == 0, said
        assert "left out: mine/a/notes.txt" in said
        assert "2 of 4 files left out" in said
        status, said = mmlong(command, "kept", "gone.png", "--on-bad", "skip", "--out", "none.npz")
        assert (status, "none of these files can be read" in said) == (1, True)
        status, said = mmlong(command, "kept", "mine/a", "--out", "none.npz")
        assert (status, "mine/a: is a folder; name the files in it, as mine/a/*" in said) == (1, True)
    with open("said.csv", newline="") as stream:
        assert [row["file"] for row in csv.DictReader(stream)] == ["mine/a/0.png", "mine/a/2.png"]
    assert np.load("features.npz")["files"].tolist() == ["mine/a/0.png", "mine/a/2.png"]


def test_a_model_is_not_saved_over_other_files(mmlong: Call, pictures: Path) -> None:
    classifier("kept")
    Path("project").mkdir()
    Path("project/README.md").write_text("my project")
    status, said = mmlong("save", "kept", "project")
    assert (status, "project has other files in it; name a folder that is empty, new, or of an earlier save" in said) == (2, True)  # fmt: skip
    assert Path("project/README.md").read_text() == "my project"
    Path("fresh/.git").mkdir(parents=True)
    for _ in range(2):
        assert mmlong("save", "kept", "fresh")[0] == 0
    assert json.loads(Path("fresh/config.json").read_text())["class_names"] == ["cat", "dog"]
    card = Path("fresh/README.md").read_text()
    assert "model.encode(raw)  # uint8 (B, 1, 4, 4)" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"FOLDER"', '"fresh"')
    import torch

    exec(code, {"raw": torch.zeros(3, 1, 4, 4, dtype=torch.uint8)})  # as it stands in the card
