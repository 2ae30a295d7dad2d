"""Tar shards in webdataset's layout, and the index beside each: the format, how it is written, and who may read it.

A packed dataset is one folder::

    dataset.json             what it is: modality, labels and their classes, splits, source, licence, and for
                             every shard its size and the SHA-256 of the tar and of its index
    train-000000.tar         plain POSIX tar: 000123.png, 000123.json, 000124.png, ... (readable by `tar` and webdataset)
    train-000000.index.json  columns: key of each sample; offset, size and CRC-32 of each member; label ids; where there
                             are such, further numbers (a document's length), and CRC-32s block by block of the members
                             that are larger than a block, so that a stretch of one can be read alone and still be checked
    val-000000.tar ...

A split is a set of shards, so that a sequential reader can take one split without looking at the others.

Nothing in a shard is ever executed. Member types that are programs for an unpickler (``.pkl``, ``.pt``, ...) are
refused by name before a byte of them is read, and a shard is a local file: a name with a URL scheme or ``pipe:`` in it
is refused before anything is opened.

A dataset is written into a hidden sibling folder, synced, and renamed into place when whole. A folder with a
``dataset.json`` is therefore a whole dataset, whatever happened while packing. Packing the same input twice gives the
same bytes: tar headers carry no time and no owner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import AlreadyPackedError, BadShardError, PackError

FORMAT = 1
MANIFEST = "dataset.json"
BLOCK = 1 << 20  # bytes; a larger member has a checksum for each block of so many
LARGEST = (8 << 30) - 1  # bytes of a member, all that a plain tar header can say
# Extensions that webdataset or torch would hand to an unpickler (or, for .npy, may).
REFUSED = frozenset(
    {"pkl", "pickle", "pyd", "pt", "pth", "ckpt", "bin.pt", "joblib", "npy", "npz", "dill", "cloudpickle"}
)
_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def split_member(name: str) -> tuple[str, str]:
    """``"000123.png"`` -> ``("000123", "png")``, webdataset's rule: the key ends at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def why_refused(member: str) -> str | None:
    """Why a member of this name may not be in a shard, or ``None`` if it may."""
    _, extension = split_member(member)
    last = extension.rpartition(".")[2]
    if extension in REFUSED or last in REFUSED:
        return f"members of type .{last} can run code when loaded and are refused; store images, JSON or plain text"
    if member.startswith("/") or ".." in member.split("/"):
        return "its path leaves the shard's own folder; refused"
    if _SCHEME.match(member):
        return "its name is a URL or a command; refused"
    return None


def local_shard(folder: Path, name: str, manifest: Path) -> Path:
    """The path of a shard, after refusing everything that is not the name of a plain file in ``folder``."""
    if _SCHEME.match(name) or "|" in name:
        raise BadShardError(manifest, "a shard is a local file; URLs and pipes are refused and were not opened", name)
    if "/" in name or "\\" in name or name in {"", ".", ".."} or not name.endswith(".tar"):
        raise BadShardError(manifest, "not the name of a .tar file in the dataset's own folder; refused", name)
    return folder / name


def block_checksums(data: bytes) -> list[int]:
    """CRC-32 of each `BLOCK` bytes of a member; the last block may be shorter."""
    view = memoryview(data)
    return [zlib.crc32(view[first : first + BLOCK]) for first in range(0, len(data), BLOCK)]


def index_path(shard: Path) -> Path:
    """Where the index of a shard is."""
    return shard.with_suffix(".index.json")


class ShardWriter:
    """Writes one shard and its index. Use through :class:`DatasetWriter`.

    Args:
        path: the ``.tar`` to create; it must not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "xb")  # noqa: SIM115 (closed in `close`)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.keys: list[str] = []
        self.members: dict[str, dict[str, list[int]]] = {}
        self.blocks: dict[str, dict[str, list[int]]] = {}
        self.labels: dict[str, list[int]] = {}
        self.numbers: dict[str, list[int]] = {}

    @property
    def written(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def add(
        self,
        key: str,
        members: Mapping[str, bytes],
        labels: Mapping[str, int],
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        """Append one sample: its members by extension, its labels as class ids, and further numbers to have at hand."""
        numbers = numbers or {}
        if not _KEY.match(key):
            raise PackError(self.path, "a key is made of letters, digits, - and _", key)
        if self.keys and (set(members) != set(self.members) or set(labels) != set(self.labels)):
            raise PackError(self.path, f"has members {sorted(members)} and labels {sorted(labels)}; the ones before it "
                            f"have {sorted(self.members)} and {sorted(self.labels)}", key)  # fmt: skip
        if self.keys and set(numbers) != set(self.numbers):
            raise PackError(
                self.path, f"has numbers {sorted(numbers)}; the ones before it have {sorted(self.numbers)}", key
            )
        for extension, data in members.items():
            name = f"{key}.{extension}"
            if reason := why_refused(name):
                raise PackError(self.path, reason, name)
            if len(data) > LARGEST:
                raise PackError(self.path, f"has {len(data):,} bytes; a member can have {LARGEST:,}: divide it", name)
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(data), 0o644
            self._tar.addfile(header, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            columns = self.members.setdefault(extension, {"offset": [], "size": [], "crc32": []})
            columns["offset"].append(self._file.tell() - padded)
            columns["size"].append(len(data))
            columns["crc32"].append(zlib.crc32(data))
            if len(data) > BLOCK:
                self.blocks.setdefault(extension, {})[str(len(self.keys))] = block_checksums(data)
        for name, value in numbers.items():
            self.numbers.setdefault(name, []).append(int(value))
        for field, value in labels.items():
            self.labels.setdefault(field, []).append(int(value))
        self.keys.append(key)

    def close(self) -> dict[str, Any]:
        """Finish the tar, write the index, sync both, and return the shard's entry for ``dataset.json``."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        index = {
            "format": FORMAT, "shard": self.path.name, "bytes": size, "keys": self.keys,
            "members": self.members, "labels": self.labels,
        }  # fmt: skip
        for section, content in (("numbers", self.numbers), ("blocks", self.blocks)):
            if content:
                index[section] = content
        data = json.dumps(index, separators=(",", ":")).encode()
        write_synced(index_path(self.path), data)
        return {
            "name": self.path.name, "samples": len(self.keys), "bytes": size, "sha256": file_sha256(self.path),
            "index_sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip

    def abandon(self) -> None:
        """Let go of the file without finishing it (the folder is about to be removed)."""
        with contextlib.suppress(OSError):
            self._file.close()


class DatasetWriter:
    """Writes a whole dataset into ``out``, or leaves nothing there.

    A context manager::

        with DatasetWriter(out, about) as writer:
            writer.add("train", "000000", {"png": ..., "json": ...}, {"type": 1})

    Leaving the block normally renames the finished folder into place; leaving it by an exception (a full disk, Ctrl-C)
    removes everything written. A lock beside the folder keeps a second packer of the same ``out`` waiting; leftovers of
    a packer that was killed are removed by the next one.

    Args:
        out: the folder to make. If it exists it must be empty, or hold a dataset and ``overwrite`` be true.
        about: the rest of ``dataset.json`` (name, modality, labels, source, licence, ...), primitives only; what is put in
            ``writer.about`` before the block is left is written too.
        shard_bytes: begin a new shard when one has reached this size.
        overwrite: replace a dataset that is already there, in one step, once the new one is whole.

    Raises:
        PackError: ``out`` holds something else, the disk is full, or a sample is refused.
    """

    def __init__(
        self, out: str | Path, about: Mapping[str, Any], shard_bytes: int = 32 << 20, overwrite: bool = False
    ) -> None:
        self.out = Path(out).absolute()
        self.about = dict(about)
        self.shard_bytes = shard_bytes
        self.overwrite = overwrite
        self._prefix = f".{self.out.name}.partial-"
        self._open: dict[str, ShardWriter] = {}
        self._splits: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> DatasetWriter:
        self._stack = contextlib.ExitStack()
        with self._explained():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(folder_lock(self.out))
        try:
            self._check_free()
            for leftover in self.out.parent.glob(self._prefix + "*"):
                shutil.rmtree(leftover)
            self.folder = self.out.parent / f"{self._prefix}{os.getpid()}"
            with self._explained():
                self.folder.mkdir()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _check_free(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise PackError(self.out, "is a file; give the name of a folder")
        if any(self.out.iterdir()):
            if not (self.out / MANIFEST).exists():
                raise PackError(self.out, "is a folder with something else in it; give a new or empty one")
            if not self.overwrite:
                raise AlreadyPackedError(
                    self.out, "already holds a packed dataset; remove it, or pack with --overwrite"
                )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise PackError(
                    self.out, f"the disk is full ({error.strerror}) while packing; nothing was left behind. "
                    "Free some space, or pack elsewhere"
                ) from error  # fmt: skip
            raise

    def add(
        self,
        split: str,
        key: str,
        members: Mapping[str, bytes],
        labels: Mapping[str, int],
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        """Append one sample to a split. See :meth:`ShardWriter.add`."""
        with self._explained():
            writer = self._open.get(split)
            if writer is None:
                number = len(self._splits.setdefault(split, []))
                writer = self._open[split] = ShardWriter(self.folder / f"{split}-{number:06d}.tar")
            writer.add(key, members, labels, numbers)
            if writer.written >= self.shard_bytes:
                self._splits[split].append(self._open.pop(split).close())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                with self._explained():
                    self._finish()
        finally:
            for writer in self._open.values():
                writer.abandon()
            shutil.rmtree(self.folder, ignore_errors=True)
            self._stack.close()

    def _finish(self) -> None:
        for split in list(self._open):
            self._splits[split].append(self._open.pop(split).close())
        if not self._splits:
            raise PackError(self.out, "there was nothing to pack")
        splits = {
            split: {"samples": sum(shard["samples"] for shard in shards), "shards": shards}
            for split, shards in self._splits.items()
        }
        manifest = {"format": FORMAT, **self.about, "splits": splits}
        write_synced(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(self.folder)
        if self.out.exists() and self.overwrite:
            # Two renames: between them the old dataset is under a hidden name, and nothing half-made is under the real one.
            old = self.out.parent / f"{self._prefix}old-{os.getpid()}"
            os.rename(self.out, old)
            os.rename(self.folder, self.out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.folder, self.out)
        sync_folder(self.out.parent)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the right to create ``folder``; a second process waits here. Freed by the system if the process dies.

    The lock's file lies beside the folder, and only as long as somebody holds it.
    """
    path = folder.parent / f".{folder.name}.lock"
    while True:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _lies_at(lock.fileno(), path):
                continue  # who held it took the file away, and a third process may hold another of its name
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _lies_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and force it to the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a rename before it cannot be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
