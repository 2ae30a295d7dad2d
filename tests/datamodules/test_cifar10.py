"""CIFAR-10's binary version: pixels, splits and grey levels; the pickled version is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from mmlong.datamodules import cifar10
from mmlong.datamodules.by_name import open_data
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.images import ImageDataModule
from mmlong.datamodules.known_images import KNOWN

from mmlong.cli.pack import run_pack

PER_FILE = 20


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six files of 20 photographs; the first 90 of 100 train."""
    monkeypatch.setattr(cifar10, "TRAINED", 90)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number, name in enumerate((*cifar10.TRAIN, cifar10.TEST)):
        rows = draw.integers(0, 256, (PER_FILE, cifar10.BYTES), dtype=np.uint8)
        rows[:, 0] = (np.arange(PER_FILE) + number) % 10
        rows.tofile(folder / name)
    return tmp_path


def test_grey_by_the_published_formula() -> None:
    colour = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [10, 200, 77]]], np.uint8)
    expected = [254, 0, int((0.2989 * 255) / 255 * 255.5), int((0.2989 * 10 + 0.587 * 200 + 0.114 * 77) / 255 * 255.5)]
    assert cifar10.grey_of(colour).tolist() == [[255 if v == 254 and 0.9999 * 255.5 >= 255 else v for v in expected]]


def test_photographs_and_splits(binary: Path) -> None:
    source = cifar10.load(str(binary), grey=False)
    assert [sum(item.split == split for item in source.items) for split in ("train", "val", "test")] == [90, 10, 20]
    rows = np.fromfile(binary / "cifar-10-batches-bin" / "data_batch_2.bin", np.uint8).reshape(-1, cifar10.BYTES)
    item = source.items[PER_FILE + 3]
    pixels = np.asarray(item.open())
    assert item.labels["class"] == rows[3, 0]
    assert pixels[5, 7].tolist() == [rows[3, 1 + 1024 * c + 5 * 32 + 7] for c in range(3)]
    grey = np.asarray(cifar10.load(str(binary / "cifar-10-batches-bin"), grey=True).items[PER_FILE + 3].open())
    assert np.array_equal(grey, cifar10.grey_of(pixels))


@pytest.mark.parametrize(("name", "channels"), [("cifar10", 3), ("cifar10-grey", 1)])
def test_as_data(binary: Path, tmp_path: Path, name: str, channels: int) -> None:
    module = ImageDataModule(name, root=str(tmp_path / "packed"), source_path=str(binary), batch_size=30)
    assert module.info()["num_classes"] == 10
    module.prepare_data()
    batches = list(module.train_dataloader())
    assert sum(len(b["label"]) for b in batches) == 90
    assert batches[0]["raw"].shape == (30, channels, 32, 32)
    assert len(list(module.test_dataloader())) == 1


def test_packed_by_the_command(binary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_pack(["cifar10-grey", str(out)]) == 1
    assert "--source-path FOLDER" in capsys.readouterr().err
    assert run_pack(["photos-grey", str(out), "--source-path", str(binary)]) == 1
    assert "takes no source_path" in capsys.readouterr().err
    assert run_pack(["cifar10-grey", str(out), "--source-path", str(binary)]) == 0
    module = ImageDataModule(str(out))
    assert (module.size, module.channels, len(module.samples("train", False))) == ((32, 32), 1, 90)


def test_as_a_part_of_other_data(binary: Path, tmp_path: Path) -> None:
    """Pairs and mixtures open it by its name, with the folder that they were given."""
    module = open_data("cifar10", root=str(tmp_path / "packed"), source_path=str(binary))
    module.prepare_data()
    assert len(module.samples("test", False)) == PER_FILE


def test_the_pickled_version_is_refused_unread(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    for given in (tmp_path, folder):
        with pytest.raises(DataError, match="pickled and not read.*binary version"):
            cifar10.load(str(given), grey=True)
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_wrong(binary: Path) -> None:
    folder = binary / "cifar-10-batches-bin"
    with pytest.raises(DataError, match="holds no test_batch"):
        cifar10.load(str(binary / "elsewhere"), grey=False)
    whole = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*no whole number of records"):
        cifar10.load(str(binary), grey=False)
    (folder / "data_batch_3.bin").write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(DataError, match="has a label 11"):
        cifar10.load(str(binary), grey=False)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match="six files"):
        cifar10.load(str(binary), grey=False)


def test_a_folder_is_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give its folder \(--source-path FOLDER, --data.source_path=FOLDER\)"):
        ImageDataModule("cifar10-grey", root=str(tmp_path)).prepare_data()
    with pytest.raises(DataError, match="takes no source_path"):
        KNOWN["photos-grey"].read("photos-grey", 32, "somewhere")
