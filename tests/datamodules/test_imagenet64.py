"""ImageNet at 64 x 64 in miniature: both published forms are packed with their names, and what is neither is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.imagenet64 import load, pictures
from mmlong.datamodules.packed import verify
from PIL import Image

from mmlong.cli.pack import run_pack

DRAWN = np.random.default_rng(0).integers(256, size=(9, 64, 64, 3), dtype=np.uint8)


def oord(folder: Path, tars: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train_64x64", DRAWN[:6]), ("valid_64x64", DRAWN[6:])):
        files = {}
        for number, picture in enumerate(rows):
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            files[f"{name}/{number}.png"] = stream.getvalue()
        if tars:
            with tarfile.open(folder / f"{name}.tar", "w") as tar:
                for member, data in files.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        else:
            (folder / name).mkdir()
            for member, data in files.items():
                (folder / member).write_bytes(data)
    return folder


def box(folder: Path, save: Callable[..., None] = np.savez) -> Path:
    folder.mkdir(exist_ok=True)
    flat = DRAWN.transpose(0, 3, 1, 2).reshape(9, -1)
    for name, rows in (
        ("train_data_batch_1", slice(0, 4)),
        ("train_data_batch_2", slice(4, 6)),
        ("val_data", slice(6, 9)),
    ):
        save(folder / f"{name}.npz", data=flat[rows], labels=np.arange(1, 10)[rows], mean=flat.mean(0))
    return folder


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (oord, "oord"),
        (lambda at: oord(at, tars=False), "oord"),
        (box, "box"),
        (lambda at: box(at, np.savez_compressed), "box"),
    ],
    ids=["tars", "folders", "npz", "compressed"],
)
def test_packed_as_published(make: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    place = make(tmp_path / "in")
    source = load(place)
    assert source.name == f"imagenet64-{name}"
    assert [item.split for item in source.items] == [None] * 6 + ["test"] * 3
    for item, picture in zip(source.items, DRAWN, strict=True):
        np.testing.assert_array_equal(np.asarray(item.open()), picture)
    if name == "box":
        assert [item.labels["label"] for item in source.items] == list(range(9))
    assert run_pack(["imagenet64", str(place), str(tmp_path / "out"), "--split", "val=1"]) == 0
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert {split: found["samples"] for split, found in manifest["splits"].items()} == {"train": 5, "val": 1, "test": 3}
    assert manifest["image"] == {**manifest["image"], "height": 64, "width": 64, "channels": 3}
    assert verify(tmp_path / "out") == []


def test_a_hundredth_of_training_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Papers train on all of it; a tenth, as of any data, would be 128,000 pictures fewer."""
    asked: list[object] = []

    def packed(source: object, out: object, **options: object) -> None:
        asked.append(options["splits"])
        raise DataError("here", "is enough")

    monkeypatch.setattr("mmlong.datamodules.pack.pack_images", packed)
    place = str(oord(tmp_path / "in", tars=False))
    assert run_pack(["imagenet64", place, str(tmp_path / "out")]) == 1
    assert run_pack(["imagenet64", place, str(tmp_path / "out"), "--split", "val=2"]) == 1
    assert run_pack(["image", place, str(tmp_path / "out"), "--unlabelled"]) == 1
    assert asked == [{"val": 0.01}, {"val": 2}, None]


def test_arrays_are_mapped_where_they_are_stored_as_they_are(tmp_path: Path) -> None:
    plain, packed = box(tmp_path / "a"), box(tmp_path / "b", np.savez_compressed)
    assert isinstance(pictures(plain / "val_data.npz"), np.memmap)
    assert not isinstance(pictures(packed / "val_data.npz"), np.memmap)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither train_64x64"):
        load(tmp_path)
    (tmp_path / "train_data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="pickled form, which is never loaded"):
        load(tmp_path)
    both = box(oord(tmp_path / "both"))
    with pytest.raises(DataError, match="holds both downsamplings"):
        load(both)
    half = oord(tmp_path / "half")
    (half / "valid_64x64.tar").unlink()
    with pytest.raises(DataError, match=r"holds no valid_64x64\.tar"):
        load(half)
    odd = box(tmp_path / "odd")
    np.savez(odd / "val_data.npz", data=np.zeros((2, 12288), np.uint8), labels=np.array([0, 5]))
    with pytest.raises(DataError, match="numbers from 1 to 1000"):
        load(odd)
    np.savez(odd / "val_data.npz", data=np.array([object()]), labels=np.array([1]))
    pictures.cache_clear()
    with pytest.raises(DataError, match="pickled objects, which are never loaded"):
        load(odd)
    (odd / "val_data.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="is no whole npz file"):
        load(odd)
