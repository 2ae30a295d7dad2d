"""Packed documents to batches: every byte as it was, rows padded, resets where documents begin, order and resume exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmlong.datamodules.errors import BadSampleError, BadShardError, DataError, PackError
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.packed import PackedDataset, verify
from mmlong.datamodules.records import Record, SequenceSource
from mmlong.datamodules.text import TextDataModule


def text(number: int, length: int) -> bytes:
    """Random bytes, any of the 256."""
    return np.random.default_rng(number).integers(0, 256, length, dtype=np.uint8).tobytes()


def source(documents: list[bytes], labelled: bool = True, **options: Any) -> SequenceSource:
    records = [
        Record(f"{n:02d}.txt", partial(bytes, data), {"kind": n % 2} if labelled else {}, {"note": n})
        for n, data in enumerate(documents)
    ]
    labels: Any = {"labels": {"kind": ("even", "odd")}, "default_label": "kind"} if labelled else {}
    return SequenceSource(
        "made", "text", "txt", {}, "made up", "none needed", **{"records": records, **labels, **options}
    )


Make = Callable[..., tuple[PackedDataset, dict[str, bytes]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Pack documents of these lengths; gives the dataset, and the documents by the name they were packed under."""

    def packed(lengths: list[int], labelled: bool = True, **options: Any) -> tuple[PackedDataset, dict[str, bytes]]:
        documents = [text(n, length) for n, length in enumerate(lengths)]
        options = {"splits": {"val": 2}, "shard_bytes": 4000, **options}
        dataset = pack_sequences(source(documents, labelled), tmp_path / "packed", **options)
        return dataset, {f"{n:02d}.txt": data for n, data in enumerate(documents)}

    return packed


def by_sample(dataset: PackedDataset, documents: dict[str, bytes], split: str) -> list[bytes]:
    """The documents of a split by sample id, through the JSON of each."""
    from mmlong.datamodules.indexed import IndexedReader

    reader = IndexedReader(dataset.split(split))
    return [documents[json.loads(reader.read(sample, "json"))["file"]] for sample in range(len(reader))]


def rows(batch: dict[str, torch.Tensor]) -> list[bytes]:
    lengths = batch.get("lengths", torch.full((len(batch["raw"]),), batch["raw"].shape[-1]))
    return [bytes(row[:length].tolist()) for row, length in zip(batch["raw"], lengths, strict=True)]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_whole_documents(make: Make, batch_size: int, cache: bool) -> None:
    dataset, documents = make([5, 9, 1, 300, 77, 5, 5, 31, 64])
    assert verify(dataset.folder) == []
    truth = by_sample(dataset, documents, "train")
    module = TextDataModule(str(dataset.folder), batch_size=batch_size, cache=cache)
    loader = module.train_dataloader()
    for _ in range(2):
        seen: list[int] = []
        for batch in loader:
            assert set(batch) - {"lengths"} == {"raw", "label", "index", "weight"}
            assert batch["raw"].dtype == torch.uint8
            assert [truth[sample] for sample in batch["index"]] == rows(batch)
            assert ("lengths" in batch) == (len(set(map(len, rows(batch)))) > 1)
            assert batch["raw"].shape[1] == max(map(len, rows(batch)))
            assert batch["label"].tolist() == [int(dataset.split("train").labels["kind"][n]) for n in batch["index"]]
            seen += batch["index"].tolist()
        assert len(set(seen)) == len(seen) == len(truth) // batch_size * batch_size


def test_documents_of_like_length_share_a_batch(make: Make) -> None:
    """Each once an epoch all the same, in batches that change, and a run goes on in the middle of them."""
    dataset, documents = make([5, 90, 1, 300, 77, 5, 6, 31, 64, 2, 40, 41, 7, 250], splits={"val": 2})
    truth = by_sample(dataset, documents, "train")
    options: dict[str, Any] = {"batch_size": 3, "alike": 4, "length": 100}
    whole = list(TextDataModule(str(dataset.folder), **options).train_dataloader())
    spans = sorted((min(map(len, rows(batch))), max(map(len, rows(batch)))) for batch in whole)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    seen = [sample for batch in whole for sample in batch["index"].tolist()]
    assert sorted(seen) == list(range(len(truth)))
    first = TextDataModule(str(dataset.folder), **options)
    loader = first.train_dataloader()
    both = [[sorted(batch["index"].tolist()) for batch in loader] for _ in range(2)]
    assert both[0] != both[1]
    begun = TextDataModule(str(dataset.folder), **options)
    batches = iter(begun.train_dataloader())
    next(batches)
    state = begun.state_dict()
    resumed = TextDataModule(str(dataset.folder), **options)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert [batch["index"].tolist() for batch in resumed.train_dataloader()] == [
        batch["index"].tolist() for batch in whole[1:]
    ]
    for changed in ({"alike": 2}, {"alike": 0}):
        other = TextDataModule(str(dataset.folder), **{**options, **changed})
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"data\.alike was 4 when"):
            other.train_dataloader()
    short = list(TextDataModule(str(dataset.folder), **{**options, "short_first": 1}).train_dataloader())
    assert [sorted(map(len, rows(batch))) for batch in short] == np.sort(
        np.minimum([len(one) for one in truth], 100)
    ).reshape(-1, 3).tolist()
    for wrong, said in (({"windows": "stream", "length": 9}, "rows of a stream are of one length"), ({"reader": "streaming"}, "as they come"), ({"alike": -1}, "a number of batches")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            TextDataModule(str(dataset.folder), **{"alike": 2, **wrong})


def test_some_batches_stand_for_all(make: Make) -> None:
    """Their mean size is an epoch's, in whatever order it comes, and where training is does not change."""
    lengths = np.random.default_rng(0).integers(1, 400, 402).tolist()
    dataset, _ = make(lengths)
    for options in ({}, {"alike": 8}, {"short_first": 1}):
        module = TextDataModule(str(dataset.folder), batch_size=4, **options)  # type: ignore[arg-type]
        some = module.typical_batches()
        assert some is not None
        assert module.state_dict()["samples_done"] == 0
        whole = list(module.train_dataloader())
        sizes = [np.mean([batch["raw"].shape[1] for batch in batches]) for batches in (some, whole)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
        assert max(batch["raw"].shape[1] for batch in some) > 1.1 * sizes[1] or not options
    assert TextDataModule(str(dataset.folder), length=1, batch_size=4).typical_batches() is None
    assert TextDataModule(str(dataset.folder), windows="stream", length=9).typical_batches() is None


def test_long_documents_are_cropped(make: Make) -> None:
    dataset, documents = make([100] * 8)
    truth = by_sample(dataset, documents, "train")
    module = TextDataModule(str(dataset.folder), length=40, batch_size=3, crop="middle", eval_length=50)
    (loader, held) = module.train_dataloader(), by_sample(dataset, documents, "val")
    crops = [[rows(batch) for batch in loader] for _ in range(2)]
    for batch in loader:
        assert "lengths" not in batch
        for sample, row in zip(batch["index"], rows(batch), strict=True):
            assert len(row) == 40
            assert row in truth[sample]
    assert crops[0] != crops[1]
    assert [row for batch in module.val_dataloader() for row in rows(batch)] == [held[n][25:75] for n in range(2)]


def marks_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where documents begin; nowhere, of a batch without marks."""
    return batch.get("resets", torch.zeros(batch["raw"].shape, dtype=torch.bool))


def test_a_stream(make: Make) -> None:
    dataset, documents = make([5, 9, 1, 300, 77, 5, 5, 31, 64, 2], splits={"val": 4})
    module = TextDataModule(str(dataset.folder), windows="stream", length=32, batch_size=2)
    assert module.info() == {"modality": {}}
    held = by_sample(dataset, documents, "val")
    batches = list(module.val_dataloader())
    assert b"".join(row for batch in batches for row in rows(batch)) == b"".join(held)
    starts = [
        bool(mark)
        for batch in batches
        for row, row_marks in zip(rows(batch), marks_of(batch), strict=True)
        for mark in row_marks[: len(row)]
    ]
    begins = np.cumsum([0, *map(len, held)])[:-1].tolist()
    # Where no document begins within a row of a batch, one that begins with its row is not marked.
    assert set(begins) >= set(np.flatnonzero(starts).tolist()) >= {place for place in begins if place % 32}
    assert any("resets" in batch for batch in batches)
    truth = by_sample(dataset, documents, "train")
    for batch in module.train_dataloader():
        assert set(batch) - {"resets"} == {"raw", "index", "weight"}
        assert batch["raw"].shape == marks_of(batch).shape == (2, 32)
        for row, marks in zip(batch["raw"], marks_of(batch), strict=True):
            cuts = [0, *(place for place in np.flatnonzero(marks.numpy()) if place > 0), 32]
            for start, stop in pairwise(cuts):
                piece = bytes(row[start:stop].tolist())
                whole = [data for data in truth if piece in data]
                assert any(data.startswith(piece) for data in whole) if marks[start] else whole


def test_one_document_has_no_resets(make: Make) -> None:
    dataset, _ = make([500, 60], splits={"val": 1}, labelled=False)
    module = TextDataModule(str(dataset.folder), windows="stream", length=50, batch_size=2)
    assert all("resets" not in batch for batch in module.train_dataloader())
    batches = list(module.val_dataloader())
    assert all("resets" not in batch for batch in batches)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_resumes_in_mid_epoch_to_the_bit(make: Make, workers: int) -> None:
    dataset, _ = make([5, 9, 1, 300, 77, 5, 5, 31, 64, 2, 40, 41])
    options: dict[str, Any] = {"windows": "stream", "length": 32, "batch_size": 2, "seed": 4, "num_workers": workers}
    first = TextDataModule(str(dataset.folder), **options)
    loader = first.train_dataloader()
    whole = [batch for _ in range(3) for batch in loader]
    first.teardown()
    each = len(loader)
    assert len(whole) == 3 * each > 12
    for done in (0, 1, each - 1, each, each + 2) if workers == 0 else (each + 2,):
        begun = TextDataModule(str(dataset.folder), **options)
        batches = chain.from_iterable(repeat(begun.train_dataloader()))
        for _ in range(done):
            next(batches)
        state = begun.state_dict()
        begun.teardown()
        resumed = TextDataModule(str(dataset.folder), **options)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        rest = resumed.train_dataloader()
        found = list(rest)
        resumed.teardown()
        assert len(found) == each - done % each
        for ours, theirs in zip(found, whole[done:], strict=False):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_other_windows_in_mid_epoch_are_refused(make: Make) -> None:
    dataset, _ = make([100] * 6)
    options: dict[str, Any] = {"windows": "stream", "batch_size": 2}
    module = TextDataModule(str(dataset.folder), length=10, **options)
    next(iter(module.train_dataloader()))
    state = module.state_dict()
    for changed, message in (
        ({"length": 20}, "data.length was 10 when"),
        ({"windows": "whole", "length": 10}, "data.windows was stream"),
    ):
        other = TextDataModule(str(dataset.folder), **{**options, **changed})
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=message):
            other.train_dataloader()


def test_webdataset_reads_the_same_documents(make: Make) -> None:
    dataset, documents = make([5, 9, 1, 300, 77, 5, 5, 31, 64])
    truth = by_sample(dataset, documents, "train")
    module = TextDataModule(str(dataset.folder), reader="streaming", batch_size=3)
    for batch in module.train_dataloader():
        assert [truth[sample] for sample in batch["index"]] == rows(batch)
        assert batch["label"].tolist() == [int(dataset.split("train").labels["kind"][n]) for n in batch["index"]]
    with pytest.raises(ValueError, match="'streaming' gives whole documents"):
        TextDataModule(str(dataset.folder), reader="streaming", windows="stream", length=5)


@pytest.mark.parametrize("windows", ["whole", "stream"])
def test_damage_stops_or_is_skipped_and_counted(make: Make, windows: str) -> None:
    dataset, _ = make([30, 40, 50, 60, 70, 80], labelled=False)
    split = dataset.split("train")
    shard = split.shards[int(split.shard_of[1])]
    data = bytearray(shard.read_bytes())
    data[int(split.offset["txt"][1])] ^= 1
    shard.write_bytes(data)
    options: dict[str, Any] = {"windows": windows, "length": 100, "batch_size": 2}
    with pytest.raises(BadSampleError, match=rf"{shard.name} \[{split.keys[1]}.txt\]: damaged"):
        list(TextDataModule(str(dataset.folder), **options).train_dataloader())
    module = TextDataModule(str(dataset.folder), on_bad="skip", **options)
    batches = list(module.train_dataloader())
    bad = [(row, n) for batch in batches for row, n in zip(rows(batch), batch["weight"], strict=True) if n == 0]
    assert bad
    assert all(set(row) == {0} for row, _ in bad)
    (said,) = module.skipped
    assert f"[{split.keys[1]}.txt]: damaged" in said


def test_what_is_packed(make: Make, tmp_path: Path) -> None:
    dataset, documents = make([5, 9, 1, 30])
    manifest = dataset.manifest
    assert manifest["tokens"] == {"train": sum(map(len, by_sample(dataset, documents, "train"))),
                                  "val": sum(map(len, by_sample(dataset, documents, "val")))}  # fmt: skip
    assert manifest["skipped"] == 0
    module = TextDataModule(str(dataset.folder))
    assert module.info() == {"modality": {}, "num_classes": 2, "class_names": ["even", "odd"]}
    assert module.class_counts.sum() == 2
    first = {path.name: path.read_bytes() for path in dataset.folder.iterdir()}
    make([5, 9, 1, 30], overwrite=True)
    assert {path.name: path.read_bytes() for path in dataset.folder.iterdir()} == first


def test_bad_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> bytes:
        raise BadSampleError("b.wav", "is damaged")

    records = [Record(str(n), partial(text, n, 5)) for n in range(4)]
    bad = [Record("empty", bytes), Record("gone", gone)]
    faults = [DataError("t.csv", "is not JSON", "line 3")]
    for extra, fault, message in (
        (bad[:1], [], r"made up \[empty\]: is empty"), (bad[1:], [], "b.wav: is damaged"), ([], faults, r"t.csv \[line 3\]: is not JSON"),
    ):  # fmt: skip
        made = source([], labelled=False, records=[*records, *extra], faults=fault)
        with pytest.raises(DataError, match=message):
            pack_sequences(made, tmp_path / "d", splits={})
    assert not (tmp_path / "d").exists()
    made = source([], labelled=False, records=[*records, *bad], faults=faults)
    dataset = pack_sequences(made, tmp_path / "d", splits={}, on_bad="skip")
    assert dataset.manifest["skipped"] == 3
    assert sorted(dataset.manifest["skipped_samples"]) == [
        "b.wav: is damaged", "made up [empty]: is empty", "t.csv [line 3]: is not JSON",
    ]  # fmt: skip
    assert len(dataset.split("train")) == 4
    assert "skipped a bad sample (1 so far): t.csv [line 3]: is not JSON" in caplog.text
    with pytest.raises(PackError, match="nothing is left for training; 2 samples were skipped"):
        pack_sequences(source([], labelled=False, records=bad), tmp_path / "e", on_bad="skip")
    with pytest.raises(ValueError, match="on_bad is 'ignore'"):
        pack_sequences(made, tmp_path / "e", on_bad="ignore")


def test_groups_never_part(tmp_path: Path) -> None:
    records = [Record(f"{n:03d}", partial(text, n, 3), {"kind": n % 3 == 0}, group=f"g{n % 13}") for n in range(60)]
    made = source([], records=records)
    dataset = pack_sequences(made, tmp_path / "d", splits={"val": 10, "test": 10})
    homes: dict[int, set[str]] = {}
    for split in dataset.splits:
        for name in by_sample(dataset, {f"{n:03d}": str(n).encode() for n in range(60)}, split):
            homes.setdefault(int(name) % 13, set()).add(split)
    assert all(len(splits) == 1 for splits in homes.values())
    sizes = {split: len(dataset.split(split)) for split in dataset.splits}
    assert 6 <= sizes["val"] <= 14
    assert 6 <= sizes["test"] <= 14
    own = [Record("a", partial(text, 1, 3), split="test", group="x"), Record("b", partial(text, 2, 3), group="x"),
           Record("c", partial(text, 3, 3))]  # fmt: skip
    dataset = pack_sequences(source([], labelled=False, records=own), tmp_path / "e", splits={})
    assert {split: len(dataset.split(split)) for split in dataset.splits} == {"train": 1, "test": 2}
    with pytest.raises(DataError, match=r"\[b\]: is in split 'val', and a of the same group 'x' in 'test'"):
        own[1] = Record("b", partial(text, 2, 3), split="val", group="x")
        pack_sequences(source([], labelled=False, records=own), tmp_path / "f")


def test_settings_that_make_no_sense(make: Make, tmp_path: Path) -> None:
    for options, message in (
        ({"windows": "rows"}, "windows is 'rows'; it can be whole or stream"),
        ({"windows": "stream"}, "a stream is cut into rows: give their length"),
        ({"length": 0}, "a length of 0"),
        ({"crop": "tail"}, "crop is 'tail'"),
        ({"augment": ["nose"]}, "there is no 'nose'; did you mean 'noise'"),
    ):
        with pytest.raises(ValueError, match=message):
            TextDataModule(str(tmp_path), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="news has labels topic, not 'class'"):
        TextDataModule("news", label="class")
    with pytest.raises(DataError, match=r"no dataset.json.*mmlong pack text IN .*, or name one of stdlib, bible, news"):
        TextDataModule(str(tmp_path / "nowhere")).prepare_data()


def test_a_dataset_of_something_else_is_refused(
    make: Make, make_packed: Callable[..., PackedDataset], tmp_path: Path
) -> None:
    make_packed().folder.rename(tmp_path / "images")
    with pytest.raises(DataError, match="holds image; TextDataModule reads text"):
        TextDataModule(str(tmp_path / "images")).train_dataloader()
    dataset, _ = make([9, 9, 9, 9])
    from .test_ranges import change_index

    change_index(dataset.folder, lambda index: index.pop("numbers"))
    with pytest.raises(BadShardError, match="has no lengths of documents; pack it again"):
        TextDataModule(str(dataset.folder)).train_dataloader()


@pytest.mark.parametrize(("change", "share"), [("noise", 0.2), ("blank", 0.3)])
def test_changes_of_text(make: Make, change: str, share: float) -> None:
    dataset, _ = make([4000, 4000, 100, 100])
    options: dict[str, Any] = {"batch_size": 1, "augment": [f"{change}:{share}"], "seed": 3}
    module = TextDataModule(str(dataset.folder), **options)
    samples, plain = module.samples("train", True), module.samples("train", False)
    for sample in range(2):
        seen = []
        for epoch in range(3):
            changed = samples.fetch([(epoch, sample, 1.0)])[0]["raw"][0].numpy()
            again = TextDataModule(str(dataset.folder), **options).samples("train", True)
            assert (again.fetch([(epoch, sample, 1.0)])[0]["raw"][0].numpy() == changed).all()
            before = plain.fetch([(epoch, sample, 1.0)])[0]["raw"][0].numpy()
            assert len(changed) == len(before)
            differs = changed != before
            if len(before) > 1000:
                assert 0.5 * share < differs.mean() < 1.3 * share
            if change == "blank":
                assert set(changed[differs]) <= {ord("_")}
                words = np.split(before, np.flatnonzero(before <= 32))
                after = np.split(changed, np.flatnonzero(before <= 32))
                inside = zip((word[word > 32] for word in words), (word[word > 32] for word in after), strict=True)
                assert all((now == was).all() or (now == ord("_")).all() for was, now in inside)
            seen.append(changed.tobytes())
        assert len(set(seen)) == 3
    assert (
        TextDataModule(str(dataset.folder), augment=[f"{change}:0"])
        .samples("train", True)
        .fetch([(0, 0, 1.0)])[0]["raw"]
        == plain.fetch([(0, 0, 1.0)])[0]["raw"]
    ).all()
