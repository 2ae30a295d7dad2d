"""Arrays of any one type and shape: packed, read by the stretch, from folders, and the known ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmlong.datamodules import digit_points, digit_series, pans, waves
from mmlong.datamodules.array_folders import array_folder, read_npy
from mmlong.datamodules.arrays import ArrayCodec, ArrayDataModule, ArrayStorage
from mmlong.datamodules.codecs import LoadedMember
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.known import known_sequences
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.splits import split_items

from mmlong.cli import main


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "float64"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 4, 3)])
def test_any_stretch_of_a_packed_array_is_that_of_the_array(dtype: str, lead: tuple[int, ...]) -> None:
    storage = ArrayStorage(dtype, lead)
    array = np.random.default_rng(0).integers(0, 200, (*lead, 9)).astype(dtype)
    data = storage.pack(array, "it")
    assert storage.length(data) == 9
    for start, stop in ((0, 9), (2, 5), (8, 9)):
        found = ArrayCodec(storage).read(LoadedMember(data, ("s", "m")), start, stop)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array[..., start:stop])


def test_what_cannot_be_packed() -> None:
    storage = ArrayStorage("float32", (2,))
    for wrong, said in (
        (np.zeros((2, 3)), r"is float64 \(2, 3\); the arrays of this dataset are float32 \(2, T\)"),
        (np.zeros((3, 3), np.float32), r"is float32 \(3, 3\)"),
        (np.zeros(3, np.float32), r"is float32 \(3,\)"),
        (np.zeros((2, 0), np.float32), "is empty"),
        (np.full((2, 3), np.nan, np.float32), "NaN or infinite numbers: say what is missing"),
    ):
        with pytest.raises(BadSampleError, match=said):
            storage.pack(wrong, "it")
    with pytest.raises(ValueError, match="arrays are stored as uint8, .* not complex64"):
        ArrayStorage("complex64")
    with pytest.raises(BadSampleError, match="is cut short: 12 bytes, in places of 8"):
        ArrayCodec(storage).read(LoadedMember(bytes(12), ("s", "m")), 0, 2)


def make_folder(folder: Path, count: int = 10) -> dict[str, np.ndarray]:
    arrays = {}
    for number in range(count):
        name = f"{'ab'[number % 2]}/{number}.npy"
        arrays[name] = np.random.default_rng(number).normal(size=(3, 4 + number)).astype(np.float32)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, arrays[name])
    return arrays


def test_a_folder_of_arrays_becomes_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line: every array comes back, padded, with its label."""
    arrays = make_folder(tmp_path / "in")
    out = tmp_path / "out"
    assert main(["pack", "array", str(tmp_path / "in"), str(out), "--split", "val=2", "--split", "test=2"]) == 0
    assert "array, 85 tokens; train 6, val 2, test 2" in capsys.readouterr().out.replace("\n", "")
    data = ArrayDataModule(str(out), batch_size=3)
    assert data.info() == {"modality": {}, "num_classes": 2, "class_names": ["a", "b"]}
    found = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            raw, label = batch["raw"], batch["label"]
            lengths = batch.get("lengths", torch.full((len(raw),), raw.shape[-1]))
            assert raw.dtype == torch.float32
            for row, length, number in zip(raw, lengths.tolist(), label.tolist(), strict=True):
                assert not row[:, length:].any()
                found += [
                    ("ab"[number], name) for name, array in arrays.items() if np.array_equal(row[:, :length], array)
                ]
    assert sorted(found) == sorted((name[0], name) for name in arrays)
    assert main(["pack", "--verify", str(out)]) == 0


def test_folders_that_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path)
    np.save(tmp_path / "a" / "99.npy", np.zeros((2, 5), np.float32))
    with pytest.raises(
        BadSampleError, match=r"99.npy: is float32 \(2, 5\); the arrays of this dataset are float32 \(3, T\)"
    ):
        pack_sequences(array_folder(tmp_path), tmp_path / "out")
    (tmp_path / "a" / "99.npy").write_bytes(b"no array")
    with pytest.raises(BadSampleError, match="99.npy: cannot be read as an array of numbers"):
        pack_sequences(array_folder(tmp_path), tmp_path / "out")
    np.save(tmp_path / "a" / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadSampleError, match="cannot be read as an array of numbers .*pickle"):
        read_npy(tmp_path / "a" / "0.npy")
    with pytest.raises(DataError, match="no arrays in it"):
        array_folder(tmp_path / "b", labelled=False) if (tmp_path / "b" / "x").mkdir() else array_folder(
            tmp_path / "b" / "x", labelled=False
        )


def test_places_are_dropped_in_training_alone_and_the_same_again(tmp_path: Path) -> None:
    make_folder(tmp_path / "in")
    pack_sequences(array_folder(tmp_path / "in"), tmp_path / "out", splits={"val": 2})
    data = ArrayDataModule(str(tmp_path / "out"), augment=["drop:0.5"])
    train, whole = data.samples("train", True), data.samples("train", False)
    lengths = [[len(s.fetch([(epoch, 0, 1.0)])[0]["raw"][0, 0]) for epoch in range(6)] for s in (train, whole)]
    assert len(set(lengths[0])) > 1
    assert max(lengths[0]) <= lengths[1][0] == max(lengths[1])
    assert torch.equal(train.fetch([(3, 1, 1.0)])[0]["raw"], train.fetch([(3, 1, 1.0)])[0]["raw"])
    dropped, kept = (
        train.fetch([(3, 1, 1.0)])[0]["raw"][0].T.tolist(),
        whole.fetch([(3, 1, 1.0)])[0]["raw"][0].T.tolist(),
    )
    assert dropped == [column for column in kept if column in dropped]
    assert (
        len(
            ArrayDataModule(str(tmp_path / "out"), augment=["drop:1"])
            .samples("train", True)
            .fetch([(0, 0, 1.0)])[0]["raw"][0, 0]
        )
        == 1
    )


def test_waves_are_what_they_say() -> None:
    assert np.array_equal(waves.wave(5), waves.wave(5))
    for number, (name, flat) in enumerate((("sine", 0.35), ("square", 0.9), ("saw", 0.3))):
        assert waves.LABELS["shape"][number] == name
        found = np.concatenate(
            [waves.wave(3 * k + number)[0] / np.abs(waves.wave(3 * k + number)).max() for k in range(20)]
        )
        assert (np.abs(found) > 0.75).mean() == pytest.approx(flat, abs=0.15)
    first = {waves.wave(number).tobytes() for number in range(60)}
    assert len(first) == 60


def test_a_digits_points_are_its_inked_pixels() -> None:
    source = digit_points.load()
    # What the records hold: the file is not read again.
    table = {place: np.append(source.records[place].load.args[0], 0) for place in (0, 777)}
    for place in (0, 777):
        x, y, grey = digit_points.points(table[place][:784], place)
        image = np.zeros((28, 28), np.uint8)
        image[(13.5 - y * 14).round().astype(int), (x * 14 + 13.5).round().astype(int)] = (grey * 255).round()
        assert np.array_equal(image.ravel(), table[place][:784])
        assert (np.diff(-y * 100 + x) < 0).any(), "in an order that says nothing"
    assert [record.name for record in source.records[:2]] == ["row 0", "row 1"], (
        "as mnist5k names them, so the splits are its own"
    )
    assert digit_points.KNOWN.splits == digit_points.mnist5k.KNOWN.splits


def test_a_series_is_what_is_left_of_its_frames() -> None:
    source = digit_series.load()
    assert len(source.records) == 3000
    frames = np.arange(1.0, 14)[None] + 100 * np.arange(40)[:, None]
    found = digit_series.thinned(frames, 3)
    time, values, seen = found[0], found[1:14], found[14:]
    assert (np.diff(time) >= 1).all()
    assert np.diff(time).max() > 1, "irregular"
    assert np.array_equal(values, np.where(seen > 0, frames[time.astype(int)].T, 0))
    sizes = [digit_series.thinned(frames, number).shape[1] for number in range(100)]
    assert 15 < np.mean(sizes) < 25
    assert 0.7 < np.mean([digit_series.thinned(frames, number)[14:].mean() for number in range(100)]) < 0.8
    assert digit_series.thinned(frames[:1], 3).shape == (27, 1)


def test_a_pan_moves_the_way_it_says() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    for right, down in pans.DIRECTIONS.values():
        for speed in range(1, pans.FASTEST + 1):
            clip = pans.clip(crop, (right, down), speed)
            assert clip.shape == (1, 8, 16, 16)
            # Where the camera goes right, what is seen goes left.
            for before, after in zip(clip[0, :-1], clip[0, 1:], strict=True):
                moved = np.roll(before, (-down * speed, -right * speed), (0, 1))
                assert np.array_equal(moved[2:-2, 2:-2], after[2:-2, 2:-2])
    source = pans.load()
    counts = {split: len(part) for split, part in split_items(source.records, {}, 0).items()}
    assert counts == {"train": 3072, "test": 288, "val": 288}


@pytest.mark.parametrize("name", ["digit-points", "digit-series"])
def test_another_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"other")
    with pytest.raises(DataError, match="is not the published file"):
        known_sequences(name).load(str(tmp_path / "x"))
    with pytest.raises(DataError, match="is missing"):
        known_sequences(name).load(str(tmp_path / "y"))
