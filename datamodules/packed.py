"""A packed dataset as it lies on disk, opened and checked: `PackedDataset`, its `Split`s, and `verify`.

Opening is cheap and still catches what goes wrong in practice: a shard that is missing or cut short (its size), an
index that is missing, or belongs to another shard (its SHA-256 is in ``dataset.json``), label ids without a class.
`verify` reads every byte.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BadShardError, DataError
from .shards import (
    BLOCK,
    FORMAT,
    MANIFEST,
    block_checksums,
    file_sha256,
    index_path,
    local_shard,
    split_member,
    why_refused,
)


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``dataset.json`` of a packed dataset.

    Raises:
        BadShardError: there is none, it is not JSON, or it is of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if Path(folder).is_dir() and any(Path(folder).iterdir()):
            do = f"files of your own become one by `mmlong pack KIND {shlex.quote(str(folder))} OUT`, and OUT is what is to be named"
        else:
            do = "`mmlong pack KIND IN OUT` makes one (KIND: image, audio, text, ...)"
        why = f"no {MANIFEST}" if Path(folder).exists() else "there is no such folder"
        raise BadShardError(folder, f"is not a packed dataset ({why}); {do}")
    try:
        manifest = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadShardError(path, f"is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BadShardError(path, f"has format {found!r}; this version of mmlong reads format {FORMAT}: pack it again")
    for field in ("splits", "labels", "modality"):
        if field not in manifest:
            raise BadShardError(path, f"has no {field!r}; pack it again")
    return manifest


def load_index(shard: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Read the index of one shard and hold it against the shard's entry in ``dataset.json``.

    Raises:
        BadShardError: shard or index missing, cut short, stale, or naming a refused member.
    """
    if not shard.is_file():
        raise BadShardError(shard, "is missing")
    path = index_path(shard)
    if not path.is_file():
        raise BadShardError(
            path, "the shard's index is missing; copy it from where the dataset came from, or pack again"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["index_sha256"]:
        raise BadShardError(
            path, f"is stale: it is not the index that {MANIFEST} was written with; copy both again or pack again"
        )
    index = json.loads(data)
    size = shard.stat().st_size
    if size != entry["bytes"]:
        what = "cut short" if size < entry["bytes"] else "longer than it was when packed"
        raise BadShardError(shard, f"is {what}: {size} bytes, should be {entry['bytes']}; copy it again or pack again")
    if index["shard"] != shard.name or index["bytes"] != size or len(index["keys"]) != entry["samples"]:
        raise BadShardError(path, f"is stale: it describes {index['shard']} of {index['bytes']} bytes")
    for extension in index["members"]:
        if reason := why_refused(f"{index['keys'][0]}.{extension}"):
            raise BadShardError(shard, reason, f"{index['keys'][0]}.{extension}")
    _check_columns(path, index)
    return index


def _check_columns(path: Path, index: dict[str, Any]) -> None:
    """Hold what an index may have, or may lack, against the samples it names."""
    samples = len(index["keys"])
    for name, values in index.get("numbers", {}).items():
        if len(values) != samples or not all(isinstance(value, int) for value in values):
            raise BadShardError(path, f"the numbers {name!r} are not {samples} integers", name)
    for extension, rows in index.get("blocks", {}).items():
        sizes = index["members"].get(extension, {}).get("size", [])
        for row, checksums in rows.items():
            size = sizes[int(row)] if int(row) < len(sizes) else -1
            if len(checksums) != -(-size // BLOCK):
                raise BadShardError(
                    path, f"has {len(checksums)} block checksums for a member of {size} bytes", f"{extension} {row}"
                )


@dataclass(frozen=True)
class Split:
    """One split, as columns over its samples. A sample's id is its place here: shard by shard, in the shard's order.

    Attributes:
        shards: the tar files.
        shard_sizes: samples in each.
        shard_of: ``(N,)`` which shard each sample is in.
        keys: ``N`` sample keys.
        offset, size, crc32: by extension, ``(N,)`` each.
        labels: by field, ``(N,)`` class ids.
        numbers: by name, ``(N,)`` further integers; empty for a dataset that has none.
        blocks: by extension, the CRC-32s of each `mmlong.datamodules.shards.BLOCK` bytes of the members that are larger
            than that, by sample.
    """

    name: str
    shards: tuple[Path, ...]
    shard_sizes: tuple[int, ...]
    shard_of: np.ndarray
    keys: tuple[str, ...]
    offset: dict[str, np.ndarray]
    size: dict[str, np.ndarray]
    crc32: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    blocks: dict[str, dict[int, list[int]]]

    def __len__(self) -> int:
        return len(self.keys)


class PackedDataset:
    """A packed dataset: what `dataset.json` says, and its splits.

    Args:
        folder: the dataset's folder.

    Raises:
        BadShardError: it is not a packed dataset. Splits are checked when first asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        self._splits: dict[str, Split] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are."""
        return tuple(self.manifest["splits"])

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the label fields there are, the default one first."""
        default = self.manifest.get("default_label")
        return tuple(sorted(self.manifest["labels"], key=lambda field: field != default))

    def classes(self, field: str) -> tuple[str, ...]:
        """Class names of a label field.

        Raises:
            DataError: there is no such field.
        """
        if field not in self.manifest["labels"]:
            raise DataError(
                self.folder / MANIFEST, f"has labels {', '.join(self.fields) or '(none)'}", f"label {field!r}"
            )
        return tuple(self.manifest["labels"][field])

    def shard_paths(self, split: str) -> list[tuple[Path, dict[str, Any]]]:
        """The tar files of a split with their entries in ``dataset.json``.

        Raises:
            DataError: no such split, or a shard name that is not a plain local file.
        """
        if split not in self.manifest["splits"]:
            raise DataError(self.folder / MANIFEST, f"has splits {', '.join(self.splits)}", f"split {split!r}")
        entries = self.manifest["splits"][split]["shards"]
        return [(local_shard(self.folder, entry["name"], self.folder / MANIFEST), entry) for entry in entries]

    def split(self, name: str) -> Split:
        """Open a split: read its indexes and check them (see the module's docstring).

        Raises:
            DataError: no such split, a shard or index that is missing, cut short or stale, a label without a class.
        """
        if name not in self._splits:
            self._splits[name] = self._open(name)
        return self._splits[name]

    def _open(self, name: str) -> Split:
        paths = self.shard_paths(name)
        indexes = [load_index(path, entry) for path, entry in paths]
        shapes = {
            tuple(tuple(sorted(index.get(section, ()))) for section in ("members", "labels", "numbers"))
            for index in indexes
        }
        if len(shapes) > 1:
            raise BadShardError(
                self.folder, f"shards of split {name!r} disagree about members, labels and numbers: {sorted(shapes)}"
            )
        for (path, _), index in zip(paths, indexes, strict=True):
            self._check_labels(path, index)

        def column(section: str, extension: str, part: str, dtype: type) -> np.ndarray:
            return np.concatenate([np.asarray(index[section][extension][part], dtype) for index in indexes])

        extensions = indexes[0]["members"]
        sizes = tuple(len(index["keys"]) for index in indexes)
        blocks: dict[str, dict[int, list[int]]] = {extension: {} for extension in extensions}
        for first, index in zip(np.cumsum((0, *sizes)), indexes, strict=False):
            for extension, rows in index.get("blocks", {}).items():
                blocks[extension].update({int(first) + int(row): checksums for row, checksums in rows.items()})
        return Split(
            name=name,
            shards=tuple(path for path, _ in paths),
            shard_sizes=sizes,
            shard_of=np.repeat(np.arange(len(sizes)), sizes),
            keys=tuple(key for index in indexes for key in index["keys"]),
            offset={extension: column("members", extension, "offset", np.int64) for extension in extensions},
            size={extension: column("members", extension, "size", np.int64) for extension in extensions},
            crc32={extension: column("members", extension, "crc32", np.uint32) for extension in extensions},
            labels={
                field: np.concatenate([np.asarray(index["labels"][field], np.int64) for index in indexes])
                for field in self.manifest["labels"]
            },
            numbers={
                name: np.concatenate([np.asarray(index["numbers"][name], np.int64) for index in indexes])
                for name in indexes[0].get("numbers", {})
            },
            blocks=blocks,
        )

    def _check_labels(self, shard: Path, index: dict[str, Any]) -> None:
        for field, classes in self.manifest["labels"].items():
            values = index["labels"].get(field)
            if values is None or len(values) != len(index["keys"]):
                raise BadShardError(index_path(shard), f"the label {field!r} is missing", field)
            for key, value in zip(index["keys"], values, strict=True):
                if not isinstance(value, int) or not 0 <= value < len(classes):
                    raise BadShardError(
                        shard, f"unknown label {field} = {value!r}; {MANIFEST} knows {len(classes)} classes", key
                    )  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """A short name for exactly these bytes (of ``dataset.json``, which holds the checksums of all others)."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()[:16]


def verify(folder: str | Path, progress: Callable[[str, int, int], None] | None = None) -> list[DataError]:
    """Read every byte of a packed dataset and name everything in it that is not whole.

    Each tar is walked as a tar, its members held against the index by name, place, size and checksum, its labels held
    against the sample's own JSON, and the whole file against ``dataset.json``. Nothing is decoded or executed.

    Args:
        folder: the dataset.
        progress: called with (shard, bytes done, bytes in all) after each shard.

    Returns:
        Every fault found, in order; empty if the dataset is whole.
    """
    try:
        dataset = PackedDataset(folder)
        shards = [pair for split in dataset.splits for pair in dataset.shard_paths(split)]
    except DataError as error:
        return [error]
    faults: list[DataError] = []
    total = sum(entry["bytes"] for _, entry in shards)
    done = 0
    for path, entry in shards:
        faults += _verify_shard(dataset, path, entry)
        done += entry["bytes"]
        if progress is not None:
            progress(path.name, done, total)
    listed = {path.name for path, _ in shards}
    for extra in sorted(dataset.folder.glob("*.tar")):
        if extra.name not in listed:
            faults.append(BadShardError(extra, f"is not listed in {MANIFEST}"))
    return faults


def _verify_shard(dataset: PackedDataset, path: Path, entry: dict[str, Any]) -> list[DataError]:
    faults: list[DataError] = []
    index: dict[str, Any] | None = None
    try:
        index = load_index(path, entry)
        dataset._check_labels(path, index)
    except DataError as error:
        faults.append(error)
    if not path.is_file():
        return faults
    if index is None and index_path(path).is_file():
        try:  # a damaged shard is still walked against the index it has, to name the members that are lost
            index = json.loads(index_path(path).read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            faults.append(BadShardError(index_path(path), f"is not JSON ({error})"))
    expected = {} if index is None else {
        f"{key}.{extension}": (columns["offset"][row], columns["size"][row], columns["crc32"][row], row)
        for extension, columns in index["members"].items()
        for row, key in enumerate(index["keys"])
    }  # fmt: skip
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                seen.add(member.name)
                faults += _verify_member(path, tar, member, expected.get(member.name), index)
    except (tarfile.TarError, OSError, EOFError) as error:
        faults.append(BadShardError(path, f"is not a whole tar file: {error}"))
    if index is not None:
        faults += [BadShardError(path, "is missing from the shard", name) for name in expected if name not in seen]
    if not faults and file_sha256(path) != entry["sha256"]:
        faults.append(
            BadShardError(path, f"SHA-256 differs from the one in {MANIFEST} (the tar's headers or padding changed)")
        )
    return faults


def _verify_member(
    path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, expected: tuple[int, int, int, int] | None, index: dict[str, Any] | None
) -> list[DataError]:  # fmt: skip
    if reason := why_refused(member.name):
        return [BadShardError(path, reason, member.name)]
    if not member.isreg():
        return [BadShardError(path, "is not a plain file (a link, folder or device); refused", member.name)]
    if index is None:
        return []
    if expected is None:
        return [BadShardError(path, "is not in the shard's index", member.name)]
    offset, size, checksum, row = expected
    if (member.offset_data, member.size) != (offset, size):
        return [
            BadShardError(
                path, f"lies at {member.offset_data}+{member.size}; the index says {offset}+{size}", member.name
            )
        ]
    stream = tar.extractfile(member)
    data = b"" if stream is None else stream.read()
    if len(data) != size:
        return [BadShardError(path, f"is cut short: {len(data)} of {size} bytes", member.name)]
    if zlib.crc32(data) != checksum:
        return [BadShardError(path, "is damaged: its checksum differs from the index", member.name)]
    extension = split_member(member.name)[1]
    blocks = index.get("blocks", {}).get(extension, {}).get(str(row))
    if blocks is not None and blocks != block_checksums(data):
        return [BadShardError(path, "its block checksums in the index are not those of its bytes", member.name)]
    if extension == "json":
        return _verify_json(path, member.name, data, index, row)
    return []


def _verify_json(path: Path, name: str, data: bytes, index: dict[str, Any], row: int) -> list[DataError]:
    try:
        record = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return [BadShardError(path, f"is not JSON ({error})", name)]
    for field, values in {**index["labels"], **index.get("numbers", {})}.items():
        if not isinstance(record, dict) or record.get(field) != values[row]:
            found = record.get(field) if isinstance(record, dict) else record
            return [BadShardError(path, f"says {field} = {found!r}, the index says {values[row]!r}", name)]
    return []
