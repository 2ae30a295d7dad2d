"""A stretch of a large member is read alone and still checked; numbers beside the samples; datasets without either."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules import indexed, packed, shards
from mmlong.datamodules.errors import BadSampleError, BadShardError, PackError
from mmlong.datamodules.indexed import IndexedReader
from mmlong.datamodules.packed import PackedDataset, verify
from mmlong.datamodules.shards import BLOCK, DatasetWriter

ABOUT: dict[str, Any] = {"modality": "text", "labels": {}, "default_label": None}


def write(out: Path, payloads: list[bytes], shard_bytes: int = 32 << 20) -> PackedDataset:
    with DatasetWriter(out, ABOUT, shard_bytes) as writer:
        for number, data in enumerate(payloads):
            members = {"txt": data, "json": json.dumps({"length": len(data)}).encode()}
            writer.add("train", f"{number:06d}", members, {}, {"length": len(data)})
    return PackedDataset(out)


@settings(deadline=None, max_examples=40)
@given(
    payloads=st.lists(st.binary(max_size=200), min_size=1, max_size=5), block=st.sampled_from([1, 7, 64, 1 << 20]),
    shard_bytes=st.sampled_from([1, 1 << 20]), data=st.data(),
)  # fmt: skip
def test_a_stretch_is_that_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], block: int, shard_bytes: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (shards, packed, indexed):
            patch.setattr(module, "BLOCK", block)
        dataset = write(tmp_path_factory.mktemp("r") / "d", payloads, shard_bytes)
        assert verify(dataset.folder) == []
        split = dataset.split("train")
        assert split.numbers["length"].tolist() == [len(payload) for payload in payloads]
        assert set(split.blocks["txt"]) == {n for n, payload in enumerate(payloads) if len(payload) > block}
        reader = IndexedReader(split)
        for sample, payload in enumerate(payloads):
            start = data.draw(st.integers(0, len(payload)))
            stop = data.draw(st.integers(start, len(payload)))
            assert reader.read_range(sample, "txt", start, stop) == payload[start:stop]
            for wrong in ((-1, stop), (start, len(payload) + 1), (1, 0)):
                with pytest.raises(ValueError, match=rf"\[{sample:06d}.txt\]: bytes .* of a member of {len(payload)}"):
                    reader.read_range(sample, "txt", *wrong)


@pytest.fixture
def large(tmp_path: Path) -> PackedDataset:
    """One member of three and a half blocks, behind a small one."""
    return write(tmp_path / "d", [b"small", random.Random(0).randbytes(3 * BLOCK + BLOCK // 2)])


def test_only_the_covering_blocks_are_read(large: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = IndexedReader(large.split("train"))
    whole = reader.read(1, "txt")
    asked: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: asked.append(count) or pread(file, count, at))
    for start, stop, blocks in ((5, 9, 1), (BLOCK - 1, BLOCK + 1, 2), (3 * BLOCK, len(whole), 0.5), (7, 7, 0)):
        asked.clear()
        assert reader.read_range(1, "txt", start, stop) == whole[start:stop]
        assert sum(asked) == blocks * BLOCK


def test_damage_in_a_block_is_found_there_and_not_elsewhere(large: PackedDataset) -> None:
    split = large.split("train")
    shard, place = split.shards[0], int(split.offset["txt"][1])
    data = bytearray(shard.read_bytes())
    data[place + 2 * BLOCK + 5] ^= 1
    shard.write_bytes(data)
    reader = IndexedReader(split)
    assert reader.read_range(1, "txt", 0, 2 * BLOCK) == data[place : place + 2 * BLOCK]
    assert reader.read_range(1, "txt", 3 * BLOCK, 3 * BLOCK + 9) == data[place + 3 * BLOCK : place + 3 * BLOCK + 9]
    with pytest.raises(BadSampleError, match=r"train-000000.tar \[000001.txt\]: damaged: .* in block 2 differs"):
        reader.read_range(1, "txt", 3 * BLOCK - 1, 3 * BLOCK + 1)
    with pytest.raises(BadSampleError, match=r"\[000001.txt\]: damaged: its checksum differs"):
        reader.read(1, "txt")
    assert [fault.member for fault in verify(large.folder)] == ["000001.txt"]


def test_a_shard_that_ends_inside_a_block_is_named(large: PackedDataset) -> None:
    split = large.split("train")
    os.truncate(split.shards[0], int(split.offset["txt"][1]) + BLOCK + 10)
    reader = IndexedReader(split)
    reader.read_range(1, "txt", 0, 10)
    with pytest.raises(BadSampleError, match=rf"\[000001.txt\]: the shard ends inside it \({BLOCK + 10} of"):
        reader.read_range(1, "txt", BLOCK, BLOCK + 20)


def change_index(folder: Path, change: Any) -> None:
    """Alter an index, and the manifest so that it is believed."""
    import hashlib

    path = folder / "train-000000.index.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))
    manifest = json.loads((folder / "dataset.json").read_bytes())
    manifest["splits"]["train"]["shards"][0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(manifest))


def test_verify_holds_blocks_and_numbers_against_the_bytes(large: PackedDataset) -> None:
    change_index(large.folder, lambda index: index["blocks"]["txt"]["1"].reverse())
    assert ["block checksums" in fault.reason for fault in verify(large.folder)] == [True]
    change_index(large.folder, lambda index: index["blocks"]["txt"]["1"].reverse())
    change_index(large.folder, lambda index: index["numbers"].update(length=[5, 6]))
    assert [str(fault).partition("]: ")[2] for fault in verify(large.folder)] == [
        f"says length = {3 * BLOCK + BLOCK // 2}, the index says 6"
    ]
    change_index(large.folder, lambda index: index["numbers"].update(length=[5]))
    with pytest.raises(BadShardError, match="the numbers 'length' are not 2 integers"):
        large_again(large)
    change_index(large.folder, lambda index: index["numbers"].update(length=[5, 6]))
    change_index(large.folder, lambda index: index["blocks"]["txt"]["1"].pop())
    with pytest.raises(BadShardError, match="has 3 block checksums for a member of"):
        large_again(large)


def large_again(dataset: PackedDataset) -> None:
    PackedDataset(dataset.folder).split("train")


def test_an_index_with_neither_opens(large: PackedDataset) -> None:
    """As datasets were packed before there were either: a stretch is then cut out of the whole."""
    whole = IndexedReader(large.split("train")).read(1, "txt")
    change_index(large.folder, lambda index: (index.pop("blocks"), index.pop("numbers")))
    split = PackedDataset(large.folder).split("train")
    assert split.numbers == {}
    assert IndexedReader(split).read_range(1, "txt", BLOCK - 3, BLOCK + 3) == whole[BLOCK - 3 : BLOCK + 3]
    assert verify(large.folder) == []


def test_samples_with_other_numbers_are_refused(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d", ABOUT) as writer:
        writer.add("train", "0", {"txt": b"x"}, {}, {"length": 1})
        with pytest.raises(PackError, match=r"\[1\]: has numbers \[\]; the ones before it have \['length'\]"):
            writer.add("train", "1", {"txt": b"x"}, {})
