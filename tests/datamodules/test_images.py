"""`ImageDataModule`: batches, evaluation, bad samples, positions."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmlong.datamodules.errors import BadSampleError, BadShardError, DataError
from mmlong.datamodules.images import ImageDataModule
from mmlong.datamodules.indexed import IndexedReader
from mmlong.datamodules.order import tail
from mmlong.datamodules.pack import pack_images
from mmlong.datamodules.packed import PackedDataset, verify
from mmlong.datamodules.pixels import encode_png
from mmlong.datamodules.shards import DatasetWriter
from PIL import Image


def as_rank(module: ImageDataModule, rank: int, world: int) -> ImageDataModule:
    module._ranks = lambda: (rank, world)  # type: ignore[method-assign]
    return module


def write_uneven(out: Path, sizes: tuple[int, ...]) -> Path:
    """Shards of exactly these sizes: the last sample of each is too long for another to follow."""
    about = {
        "modality": "image", "labels": {"label": ["a"]}, "default_label": "label", "source": "", "licence": "",
        "image": {"channels": 1, "height": 4, "width": 4},
    }  # fmt: skip
    with DatasetWriter(out, about, shard_bytes=100_000) as writer:
        number = 0
        for size in sizes:
            for place in range(size):
                filler = b"x" * (100_000 if place == size - 1 else 0)
                png = encode_png(Image.new("L", (4, 4), number))
                writer.add("train", f"{number:06d}", {"png": png, "txt": filler}, {"label": 0})
                number += 1
    return out


@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache", [False, True])
def test_exactly_once_over_three_epochs_two_ranks_and_uneven_shards(tmp_path: Path, workers: int, cache: bool) -> None:
    sizes = (3, 11, 7, 19, 2, 13, 12)
    folder = write_uneven(tmp_path / "uneven", sizes)
    assert PackedDataset(folder).split("train").shard_sizes == sizes
    loaders = [
        as_rank(
            ImageDataModule(str(folder), batch_size=4, num_workers=workers, seed=3, cache=cache), rank, 2
        ).train_dataloader()
        for rank in range(2)
    ]
    epochs = []
    for epoch in range(3):
        ranks = [[batch["index"].tolist() for batch in loader] for loader in loaders]
        assert [len(steps) for steps in ranks] == [67 // 8, 67 // 8]
        seen = [sample for steps in ranks for batch in steps for sample in batch]
        assert sorted(seen + tail(67, 3, epoch, 8).tolist()) == list(range(67))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_each_sample_once(
    make_packed: Callable[..., PackedDataset], batch_size: int, world: int
) -> None:
    dataset = make_packed(30, val=7, test=11)
    counted: list[int] = []
    lengths = set()
    for rank in range(world):
        module = as_rank(ImageDataModule(str(dataset.folder), batch_size=batch_size), rank, world)
        loader = module.test_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)  # type: ignore[arg-type]
        lengths.add(len(batches))
        counted += [int(n) for batch in batches for n in batch["index"][batch["weight"] > 0]]
        if world == 1:
            assert all((batch["weight"] == 1).all() for batch in batches)
    assert sorted(counted) == list(range(11))
    assert len(lengths) == 1


def test_batches_hold_what_was_packed(make_packed: Callable[..., PackedDataset]) -> None:
    from mmlong.datamodules.pixels import to_pixels

    dataset = make_packed(20, height=5, width=7, channels=3)
    module = ImageDataModule(str(dataset.folder), batch_size=3)
    module.setup("fit")
    assert (module.num_classes, module.class_names, module.size, module.channels) == (
        3,
        ("class 0", "class 1", "class 2"),
        (5, 7),
        3,
    )
    assert module.class_counts.sum() == 8
    assert torch.isclose((module.class_weights * module.class_counts).sum() / 8, torch.tensor(1.0))
    batch = next(iter(module.train_dataloader()))
    assert batch["raw"].dtype == torch.uint8
    assert batch["raw"].shape == (3, 3, 5, 7)
    assert (batch["label"].dtype, batch["index"].dtype, batch["weight"].dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    reader = IndexedReader(dataset.split("train"))
    for image, sample in zip(batch["raw"], batch["index"], strict=True):
        import io

        expected = np.asarray(to_pixels(Image.open(io.BytesIO(reader.read(int(sample), "png"))), 3, "x"))
        assert np.array_equal(image.numpy().transpose(1, 2, 0), expected)


def test_augmentation_is_of_training_only_and_the_same_for_any_worker(
    make_packed: Callable[..., PackedDataset],
) -> None:
    dataset = make_packed(20)
    options: dict[str, Any] = {"batch_size": 4, "seed": 1, "augment": ["noise:50"]}
    module, plain = (
        ImageDataModule(str(dataset.folder), **options),
        ImageDataModule(str(dataset.folder), batch_size=4, seed=1),
    )
    again = ImageDataModule(str(dataset.folder), cache=True, **options)
    for a, b, c in zip(module.train_dataloader(), plain.train_dataloader(), again.train_dataloader(), strict=True):
        assert torch.equal(a["index"], b["index"])
        assert not torch.equal(a["raw"], b["raw"])
        assert torch.equal(a["raw"], c["raw"])
    for a, b in zip(module.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(a["raw"], b["raw"])


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))


def damage(dataset: PackedDataset, sample: int) -> str:
    """Spoil one PNG; returns its member name."""
    split = dataset.split("train")
    shard = split.shards[split.shard_of[sample]]
    data = bytearray(shard.read_bytes())
    data[int(split.offset["png"][sample]) + 30] ^= 0xFF
    shard.write_bytes(data)
    return f"{split.keys[sample]}.png"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_sample_stops_or_is_skipped_named_and_counted(
    make_packed: Callable[..., PackedDataset], caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    dataset = make_packed(20)  # 8 for training
    member = damage(dataset, 5)
    stopping = ImageDataModule(str(dataset.folder), batch_size=2, num_workers=workers)
    with pytest.raises(BadSampleError, match=rf"\[{member}\]: damaged"):
        list(stopping.train_dataloader())
    stopping.teardown()
    skipping = ImageDataModule(str(dataset.folder), batch_size=2, num_workers=workers, on_bad="skip")
    loader = skipping.train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 4
        index, weight = torch.cat([b["index"] for b in batches]), torch.cat([b["weight"] for b in batches])
        assert index[weight == 0].tolist() == [5]
        assert torch.cat([b["raw"] for b in batches])[weight == 0].sum() == 0
    assert [(member in said, times) for said, times in skipping.skipped.items()] == [(True, 2)]
    assert caplog.text.count("skipped a bad sample") == 1
    skipping.teardown()


@pytest.mark.parametrize(
    ("png", "message"),
    [
        (encode_png(Image.new("L", (9, 8))), "is 9x8 of mode L; the dataset holds 8x8 of mode L"),
        (encode_png(Image.new("RGB", (8, 8))), "is 8x8 of mode RGB"),
        (encode_png(Image.new("LA", (8, 8))), "of mode LA"),
        (encode_png(Image.new("I;16", (8, 8))), "of mode I;16"),
        (encode_png(Image.new("P", (8, 8))), "of mode P"),
        (b"GIF89a", "cannot be decoded as PNG"),
        (encode_png(NOISE)[:90], "cannot be decoded as PNG"),
    ],
)
def test_images_that_do_not_fit_the_dataset(tmp_path: Path, png: bytes, message: str) -> None:
    about = {
        "modality": "image", "labels": {"label": ["a"]}, "default_label": "label", "source": "", "licence": "",
        "image": {"channels": 1, "height": 8, "width": 8},
    }  # fmt: skip
    with DatasetWriter(tmp_path / "d", about) as writer:
        writer.add("train", "000000", {"png": png}, {"label": 0})
    with pytest.raises(BadSampleError, match=rf"train-000000.tar \[000000.png\]: .*{message}"):
        list(ImageDataModule(str(tmp_path / "d"), batch_size=1).train_dataloader())


def test_position_refuses_what_would_repeat_or_lose_samples(make_packed: Callable[..., PackedDataset]) -> None:
    dataset = make_packed(33)
    module = ImageDataModule(str(dataset.folder), batch_size=4, seed=2)
    batches = iter(module.train_dataloader())
    for _ in range(2):
        next(batches)
    state = module.state_dict()
    assert all(isinstance(value, int | str) for value in state.values())
    for options, message in (
        ({"batch_size": 5, "seed": 2}, "batch size x ranks was 4 .* and is 5 now"),
        ({"batch_size": 4, "seed": 3}, "data.seed was 2"),
        ({"batch_size": 4, "seed": 2, "reader": "streaming"}, "data.reader was indexed"),
    ):
        other = ImageDataModule(str(dataset.folder), **options)
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            other.train_dataloader()
    for _ in range(3):
        next(batches)  # to the epoch's end, where any setting may be new
    ended = module.state_dict()
    assert (ended["epoch"], ended["samples_done"]) == (1, 0)
    other = ImageDataModule(str(dataset.folder), batch_size=5, seed=3)
    other.load_state_dict(ended)
    assert len(list(other.train_dataloader())) == 4


def test_going_on_with_another_number_of_ranks(make_packed: Callable[..., PackedDataset]) -> None:
    dataset = make_packed(33)
    one = ImageDataModule(str(dataset.folder), batch_size=4, seed=2)
    batches = iter(one.train_dataloader())
    next(batches)
    state = copy.deepcopy(one.state_dict())
    rest = [batch["index"].tolist() for batch in batches]
    halves = []
    for rank in range(2):
        module = as_rank(ImageDataModule(str(dataset.folder), batch_size=2, seed=2), rank, 2)
        module.load_state_dict(state)
        halves.append([batch["index"].tolist() for batch in module.train_dataloader()])
    assert [first + second for first, second in zip(*halves, strict=True)] == rest


def test_known_dataset_packs_itself_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from mmlong.datamodules import images, sources
    from mmlong.datamodules.pack import split_items  # noqa: F401

    made = sources.ImageSource(
        "elpv", "s", "l", images.KNOWN["elpv"].labels, "type",
        [sources.Item(str(n), {"type": n % 2, "defect": n // 2 % 2}, lambda: Image.new("L", (30, 30), 7)) for n in range(40)],
    )  # fmt: skip
    known = replace(images.KNOWN["elpv"], load=lambda size: made, splits={"val": 4, "test": 8})
    monkeypatch.setitem(images.KNOWN, "elpv", known)
    monkeypatch.setenv("MMLONG_DATA", str(tmp_path / "root"))
    module = ImageDataModule("elpv", size=16, label="defect", batch_size=4)
    assert (module.num_classes, module.size, module.channels) == (2, (16, 16), 1)  # before anything is packed
    module.prepare_data()
    said = capsys.readouterr().out
    assert "CC BY-NC-SA" in said
    assert module.folder == tmp_path / "root" / "elpv-16"
    stamp = (module.folder / "dataset.json").stat().st_mtime_ns
    again = ImageDataModule("elpv", size=16, label="defect", batch_size=4)
    again.prepare_data()
    again.setup("fit")
    assert capsys.readouterr().out == ""
    assert (module.folder / "dataset.json").stat().st_mtime_ns == stamp
    assert next(iter(again.train_dataloader()))["raw"].shape == (4, 1, 16, 16)
    assert again.class_counts.tolist() == [14, 14]


def test_wrong_arguments(tmp_path: Path, make_packed: Callable[..., PackedDataset]) -> None:
    with pytest.raises(ValueError, match="elpv has labels type, defect, not 'defects'"):
        ImageDataModule("elpv", label="defects")
    with pytest.raises(ValueError, match="size can only be given for elpv, mnist5k"):
        ImageDataModule("some/folder", size=3)
    with pytest.raises(ValueError, match="reader is 'fast'"):
        ImageDataModule("elpv", reader="fast")
    with pytest.raises(ValueError, match="on_bad is 'ignore'"):
        ImageDataModule("elpv", on_bad="ignore")
    with pytest.raises(DataError, match="make one with `mmlong pack image IN"):
        ImageDataModule(str(tmp_path / "nothing")).prepare_data()
    dataset = make_packed(20)
    with pytest.raises(DataError, match=r"label 'kind'\]: has labels label"):
        list(ImageDataModule(str(dataset.folder), label="kind").train_dataloader())
    with pytest.raises(ValueError, match="8 training samples do not fill one global batch of 9"):
        ImageDataModule(str(dataset.folder), batch_size=9).train_dataloader()
    shutil.rmtree(dataset.folder)
    with pytest.raises(BadShardError, match="is not a packed dataset"):
        ImageDataModule(str(dataset.folder)).setup("fit")


@pytest.mark.parametrize("reader", ["indexed", "streaming"])
def test_images_without_labels(tmp_path: Path, reader: str) -> None:
    from .conftest import synthetic

    made = synthetic(20)
    bare = replace(made, labels={}, default_label=None, items=[replace(item, labels={}) for item in made.items])
    dataset = pack_images(bare, tmp_path / "d", splits={"val": 4})
    assert verify(dataset.folder) == []
    module = ImageDataModule(str(dataset.folder), reader=reader, batch_size=3)
    assert module.info() == {"modality": {"size": [8, 8], "channels": 1}}
    assert module.class_names == ()
    for batch in (*module.train_dataloader(), *module.val_dataloader()):
        assert set(batch) == {"raw", "index", "weight"}
    with pytest.raises(DataError, match="has no labels"):
        module.class_weights  # noqa: B018
