"""The reader on webdataset itself: fixed epochs, a pure stream, nothing executed."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
from mmlong.datamodules.errors import BadSampleError, BadShardError
from mmlong.datamodules.images import ImageDataModule
from mmlong.datamodules.packed import PackedDataset


def stream(dataset: PackedDataset, epochs: int = 2, **options: Any) -> list[list[int]]:
    module = ImageDataModule(str(dataset.folder), **{"reader": "streaming", "batch_size": 2, "seed": 1, **options})
    loader = module.train_dataloader()
    return [[sample for batch in loader for sample in batch["index"].tolist()] for _ in range(epochs)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_fixed_epochs_of_a_pure_stream(make_packed: Callable[..., PackedDataset], workers: int) -> None:
    dataset = make_packed(33, shard_bytes=9000)  # 21 for training
    assert len(dataset.split("train").shards) > 1
    epochs = stream(dataset, 3, num_workers=workers)
    assert [len(epoch) for epoch in epochs] == [20, 20, 20]
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream(dataset, 3, num_workers=workers) == epochs
    assert stream(dataset, 3, num_workers=workers, seed=2) != epochs
    assert {sample for epoch in stream(dataset, 12) for sample in epoch} == set(range(21))  # nobody is starved


def test_ranks_see_different_streams_of_equal_length(
    make_packed: Callable[..., PackedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_packed(33)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(ImageDataModule, "_ranks", lambda self, rank=rank: (rank, 2))
        seen.append(stream(dataset, 1)[0])
    assert len(seen[0]) == len(seen[1]) == 10
    assert seen[0] != seen[1]


def test_images_and_labels_are_those_of_the_indexed_reader(make_packed: Callable[..., PackedDataset]) -> None:
    dataset = make_packed(33)
    module = ImageDataModule(str(dataset.folder), reader="streaming", batch_size=5)
    samples = module.samples("train", False)
    for batch in module.train_dataloader():
        for image, label, sample in zip(batch["raw"], batch["label"], batch["index"], strict=True):
            assert (image.numpy() == samples.image(int(sample))).all()
            assert label == samples.labels[sample]
        assert batch["weight"].tolist() == [1.0] * 5


def test_resume_makes_the_remaining_steps(make_packed: Callable[..., PackedDataset]) -> None:
    dataset = make_packed(33)
    first = ImageDataModule(str(dataset.folder), reader="streaming", batch_size=2)
    batches = iter(first.train_dataloader())
    for _ in range(4):
        next(batches)
    state = first.state_dict()
    assert (state["epoch"], state["samples_done"]) == (0, 8)
    second = ImageDataModule(str(dataset.folder), reader="streaming", batch_size=2)
    second.load_state_dict(state)
    loader = second.train_dataloader()
    assert len(loader) == 10
    assert len(list(loader)) == 6
    assert len(list(loader)) == 10


class Bomb:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def test_a_pickle_in_a_shard_is_refused(make_packed: Callable[..., PackedDataset], tmp_path: Any) -> None:
    dataset = make_packed(20, shard_bytes=1 << 20)
    shard = dataset.split("train").shards[0]
    with tarfile.open(shard, "a") as tar:
        data = pickle.dumps(Bomb(str(tmp_path / "canary")))
        header = tarfile.TarInfo("999999.pkl")
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))
    with pytest.raises(BadShardError, match=r"train-000000.tar \[999999.pkl\]: .* refused"):
        stream_open(dataset)
    assert not (tmp_path / "canary").exists()


def stream_open(dataset: PackedDataset) -> None:
    """Stream with the split opened before the shard was changed."""
    module = ImageDataModule(str(dataset.folder), reader="streaming", batch_size=2)
    module._dataset = dataset
    loader = module.train_dataloader()
    for _ in range(10):  # drawn with replacement: enough to meet every sample
        list(loader)


def test_truncation_and_damage_are_named(make_packed: Callable[..., PackedDataset]) -> None:
    dataset = make_packed(20, shard_bytes=1 << 20)
    split = dataset.split("train")
    shard = split.shards[0]
    whole = shard.read_bytes()
    os.truncate(shard, int(split.offset["png"][2]) + 100)
    with pytest.raises(BadShardError, match=r"train-000000.tar: is not a whole tar file"):
        stream_open(dataset)
    os.truncate(shard, int(split.offset["png"][2]) - 512)
    with pytest.raises(BadShardError, match=r"train-000000.tar: is cut short: 2 samples, should be 8"):
        stream_open(dataset)
    data = bytearray(whole)
    place = int(split.offset["png"][4])
    data[place : place + 8] = b"notapng!"
    shard.write_bytes(data)
    with pytest.raises(BadSampleError, match=rf"train-000000.tar \[{split.keys[4]}.png\]: cannot be decoded as PNG"):
        stream_open(dataset)
    shard.unlink()
    with pytest.raises(BadShardError, match=r"train-000000.tar: is missing"):
        stream_open(dataset)
