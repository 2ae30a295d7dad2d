"""The format on disk: written whole or not at all, readable by others, and every fault named."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules import shards
from mmlong.datamodules.errors import BadSampleError, BadShardError, DataError, PackError
from mmlong.datamodules.indexed import MAX_OPEN, IndexedReader
from mmlong.datamodules.packed import PackedDataset, verify
from mmlong.datamodules.shards import DatasetWriter, folder_lock, why_refused

ABOUT: dict[str, Any] = {"modality": "image", "labels": {"label": ["a", "b"]}, "default_label": "label"}


def write(out: Path, count: int = 5, shard_bytes: int = 32 << 20, **options: Any) -> PackedDataset:
    with DatasetWriter(out, ABOUT, shard_bytes, **options) as writer:
        for number in range(count):
            members = {"png": bytes([number]) * (100 + number), "json": json.dumps({"label": number % 2}).encode()}
            writer.add("train", f"{number:06d}", members, {"label": number % 2})
    return PackedDataset(out)


@settings(deadline=None, max_examples=30)
@given(
    payloads=st.lists(st.tuples(st.binary(max_size=1500), st.binary(max_size=40)), min_size=1, max_size=12),
    shard_bytes=st.sampled_from([1, 3000, 1 << 20]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[tuple[bytes, bytes]], shard_bytes: int
) -> None:
    out = tmp_path_factory.mktemp("w") / "packed"
    with DatasetWriter(out, {**ABOUT, "labels": {}}, shard_bytes) as writer:
        for number, (first, second) in enumerate(payloads):
            writer.add("train", f"{number:06d}", {"png": first, "txt": second}, {})
    assert verify(out) == []
    split = PackedDataset(out).split("train")
    reader = IndexedReader(split)
    assert [(reader.read(n, "png"), reader.read(n, "txt")) for n in range(len(split))] == payloads
    through_tar = []
    for path in split.shards:
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        through_tar += [
            (files[f"{key}.png"], files[f"{key}.txt"]) for key in sorted({name.partition(".")[0] for name in files})
        ]
    assert through_tar == payloads


def test_tar_and_webdataset_read_it(tmp_path: Path) -> None:
    import webdataset as wds

    write(tmp_path / "d")
    listed = subprocess.run(
        ["tar", "tf", str(tmp_path / "d" / "train-000000.tar")], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split()[:2] == ["000000.png", "000000.json"]
    with open(tmp_path / "d" / "train-000000.tar", "rb") as stream:
        members = wds.tariterators.tar_file_expander([{"url": "d", "stream": stream}])
        samples = list(wds.tariterators.group_by_keys(members))
    assert [sample["__key__"] for sample in samples] == [f"{n:06d}" for n in range(5)]
    assert samples[3]["png"] == bytes([3]) * 103


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class FullDisk:
    """A file that takes so many bytes and then says the disk is full."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.file.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()


@pytest.mark.parametrize(
    ("suffix", "room"), [(".tar", 2500), (".tar", 6000), (".index.json", 10), ("dataset.json", 10)]
)
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, room: int) -> None:
    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open(path, mode, *args, **kwargs)  # noqa: SIM115
        return FullDisk(file, room) if str(path).endswith(suffix) and "x" in mode else file

    monkeypatch.setattr(shards, "open", opened, raising=False)
    with pytest.raises(PackError, match=r"packed: the disk is full .* nothing was left behind"):
        write(tmp_path / "packed")
    assert leftovers(tmp_path) == []
    monkeypatch.undo()
    write(tmp_path / "packed")  # and once there is room, nothing is in the way
    assert verify(tmp_path / "packed") == []


def test_interrupt_leaves_nothing_and_an_old_dataset_alone(tmp_path: Path) -> None:
    before = write(tmp_path / "packed").fingerprint
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "packed", ABOUT, overwrite=True) as writer:
        writer.add("train", "0", {"png": b"x"}, {"label": 0})
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == ["packed"]
    assert PackedDataset(tmp_path / "packed").fingerprint == before
    write(tmp_path / "packed", count=3, overwrite=True)
    assert leftovers(tmp_path) == ["packed"]
    assert len(PackedDataset(tmp_path / "packed").split("train")) == 3


def test_leftovers_of_a_killed_packer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".packed.partial-1").mkdir()
    (tmp_path / ".packed.partial-1" / "train-000000.tar").write_bytes(b"half")
    write(tmp_path / "packed")
    assert leftovers(tmp_path) == ["packed"]


def test_two_packers_of_one_folder_take_turns(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def pack() -> None:
        try:
            write(tmp_path / "packed", count=200)
            outcomes.append("packed")
        except PackError as error:
            outcomes.append(error.reason)

    threads = [threading.Thread(target=pack) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["already holds a packed dataset; remove it, or pack with --overwrite", "packed"]
    assert verify(tmp_path / "packed") == []


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    for overwrite in (False, True):
        with pytest.raises(PackError, match="something else in it"):
            write(tmp_path / "photos", overwrite=overwrite)
    assert (tmp_path / "photos" / "dear.jpg").exists()


@pytest.mark.parametrize(
    "name", ["0.pkl", "0.pickle", "0.pyd", "0.pt", "0.PTH", "0.npy", "a.tar.pt", "/etc/x.png", "../x.png", "pipe:x.png"]
)
def test_member_names_that_are_refused(name: str) -> None:
    assert why_refused(name)
    assert why_refused("000123.png") is None


def reindex(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter the manifest of a dataset."""
    manifest = json.loads((folder / "dataset.json").read_text())
    change(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))


def test_pipes_and_urls_are_refused_and_not_run(tmp_path: Path) -> None:
    write(tmp_path / "d")
    canary = tmp_path / "canary"
    for name in (
        f"pipe:touch {canary}",
        f"pipe: touch {canary}; cat x.tar",
        "http://example.org/x.tar",
        "../d/train-000000.tar",
        "x|y.tar",
    ):

        def rename(manifest: dict[str, Any], name: str = name) -> None:
            manifest["splits"]["train"]["shards"][0]["name"] = name

        reindex(tmp_path / "d", rename)
        with pytest.raises(BadShardError, match="refused") as caught:
            PackedDataset(tmp_path / "d").split("train")
        assert caught.value.member == name
        assert "refused" in str(verify(tmp_path / "d")[0])
    assert not canary.exists()


class Bomb:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def test_a_pickle_in_a_shard_is_refused_and_not_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    write(tmp_path / "d")
    shard = tmp_path / "d" / "train-000000.tar"
    with tarfile.open(shard, "a") as tar:
        data = pickle.dumps(Bomb(str(canary)))
        header = tarfile.TarInfo("000004.pkl")
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))
    faults = verify(tmp_path / "d")
    assert any(fault.member == "000004.pkl" and "can run code" in fault.reason for fault in faults)
    # The indexed reader reads what the index names and nothing else; the streaming one meets it: test_streaming.py.
    reader = IndexedReader(PackedDataset(tmp_path / "d").split("train"))
    assert [reader.read(n, "png")[:1] for n in range(5)] == [bytes([n]) for n in range(5)]
    with DatasetWriter(tmp_path / "e", ABOUT) as writer:
        with pytest.raises(PackError, match="can run code"):
            writer.add("train", "0", {"pkl": data}, {"label": 0})
        writer.add("train", "1", {"png": b"x"}, {"label": 0})
    assert not canary.exists()


def test_an_index_that_names_a_pickle_is_refused(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path / "d")
    path = tmp_path / "d" / "train-000000.index.json"
    path.write_text(path.read_text().replace('"png"', '"pkl"'))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reindex(tmp_path / "d", lambda manifest: manifest["splits"]["train"]["shards"][0].update(index_sha256=digest))
    with pytest.raises(BadShardError, match=r"train-000000.tar \[000000.pkl\]: .* refused"):
        PackedDataset(tmp_path / "d").split("train")


def test_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path / "d")
    shard = tmp_path / "d" / "train-000000.tar"
    size = shard.stat().st_size
    os.truncate(shard, 3000)
    with pytest.raises(BadShardError, match=rf"train-000000.tar: is cut short: 3000 bytes, should be {size}"):
        PackedDataset(tmp_path / "d").split("train")
    faults = verify(tmp_path / "d")
    assert {fault.file for fault in faults} == {str(shard)}
    missing = {fault.member for fault in faults if "missing" in fault.reason or "cut short" in fault.reason}
    assert {"000003.png", "000004.png", "000004.json"} <= missing
    assert "000000.png" not in missing


def test_truncation_after_opening_is_named(tmp_path: Path) -> None:
    reader = IndexedReader(write(tmp_path / "d").split("train"))
    reader.read(0, "png")
    os.truncate(tmp_path / "d" / "train-000000.tar", 4700)
    with pytest.raises(BadSampleError, match=r"train-000000.tar \[000002.png\]: the shard ends inside it"):
        reader.read(2, "png")


def test_index_missing_or_stale(tmp_path: Path) -> None:
    write(tmp_path / "d")
    write(tmp_path / "other", count=6)
    index = tmp_path / "d" / "train-000000.index.json"
    index.write_bytes((tmp_path / "other" / index.name).read_bytes())
    with pytest.raises(BadShardError, match=r"train-000000.index.json: is stale"):
        PackedDataset(tmp_path / "d").split("train")
    assert any("stale" in fault.reason for fault in verify(tmp_path / "d"))
    index.unlink()
    with pytest.raises(BadShardError, match=r"train-000000.index.json: the shard's index is missing"):
        PackedDataset(tmp_path / "d").split("train")
    assert any("index is missing" in fault.reason for fault in verify(tmp_path / "d"))


def test_missing_and_unlisted_shard(tmp_path: Path) -> None:
    write(tmp_path / "d")
    shard = tmp_path / "d" / "train-000000.tar"
    shard.rename(tmp_path / "d" / "train-000009.tar")
    with pytest.raises(BadShardError, match=r"train-000000.tar: is missing"):
        PackedDataset(tmp_path / "d").split("train")
    reasons = [str(fault) for fault in verify(tmp_path / "d")]
    assert any("000000.tar: is missing" in reason for reason in reasons)
    assert any("000009.tar: is not listed" in reason for reason in reasons)


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_verify_finds_any_changed_bit(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("v") / "d"
    write(folder, count=3)
    shard = folder / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[place % len(data)] ^= 1 << bit
    shard.write_bytes(data)
    assert verify(folder) != []


def test_damage_is_named_by_member(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d")
    split = dataset.split("train")
    shard = tmp_path / "d" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(split.offset["png"][3]) + 5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BadSampleError, match=r"train-000000.tar \[000003.png\]: damaged: its checksum"):
        IndexedReader(split).read(3, "png")
    assert [(fault.member, "checksum" in fault.reason) for fault in verify(tmp_path / "d")] == [("000003.png", True)]


def test_labels_missing_or_unknown(tmp_path: Path) -> None:
    write(tmp_path / "d")
    reindex(tmp_path / "d", lambda manifest: manifest["labels"].update(label=["a"]))
    with pytest.raises(BadShardError, match=r"train-000000.tar \[000001\]: unknown label label = 1"):
        PackedDataset(tmp_path / "d").split("train")
    reindex(tmp_path / "d", lambda manifest: manifest["labels"].update(label=["a", "b"], other=["c"]))
    with pytest.raises(BadShardError, match=r"\[other\]: the label 'other' is missing"):
        PackedDataset(tmp_path / "d").split("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ('{"format": 99}', "has format 99"), ('{"format": 1}', "has no 'splits'")],
)
def test_bad_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(BadShardError, match=message):
        PackedDataset(tmp_path)
    assert len(verify(tmp_path)) == 1


def test_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(BadShardError, match="`mmlong pack KIND IN OUT` makes one"):
        PackedDataset(tmp_path)
    write(tmp_path / "d")
    with pytest.raises(DataError, match="has splits train"):
        PackedDataset(tmp_path / "d").split("validation")


def test_reader_survives_fork_and_many_shards(tmp_path: Path) -> None:
    split = write(tmp_path / "d", count=MAX_OPEN + 9, shard_bytes=1).split("train")
    assert len(split.shards) == MAX_OPEN + 9
    reader = IndexedReader(split)
    expected = [reader.read(n, "png") for n in range(len(split))]
    assert len(reader._files) == MAX_OPEN
    child = os.fork()
    if child == 0:
        same = all(reader.read(n, "png") == expected[n] for n in np.random.default_rng(0).permutation(len(split)))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [reader.read(n, "png") for n in range(len(split))] == expected
    clone = pickle.loads(pickle.dumps(reader))
    assert clone.read(1, "png") == expected[1]
    reader.close()
    clone.close()


def test_one_at_a_time_makes_a_folder_and_no_lock_is_left(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(40):
            with folder_lock(tmp_path / "made"):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)
    with pytest.raises(RuntimeError, match="broke off"), folder_lock(tmp_path / "made"):
        raise RuntimeError("broke off")
    assert leftovers(tmp_path) == []
