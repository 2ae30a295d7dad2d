"""Samples by number: reads any sample of a split straight out of its tar, wherever it lies.

Map-style: `IndexedReader.read(id)` is one `pread` at the offset the index names, checked against the index's checksum,
so damage since packing, or an index that belongs to other bytes, cannot pass for data. `IndexedReader.read_range` reads
a stretch of a large member and no more than the blocks it lies in, each checked. Files are opened once per process (a
forked worker opens its own) and few are held open.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

from .errors import BadSampleError, BadShardError
from .packed import Split
from .shards import BLOCK

MAX_OPEN = 32  # files held open by one process


class IndexedReader:
    """Reads members of the samples of one split.

    Args:
        split: the opened split.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.split)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_process": -1}

    def place(self, sample: int, extension: str) -> tuple[Path, str]:
        """The shard a sample is in, and its member's name, to tell people about."""
        return self.split.shards[self.split.shard_of[sample]], f"{self.split.keys[sample]}.{extension}"

    def read(self, sample: int, extension: str) -> bytes:
        """The bytes of one member of one sample.

        Args:
            sample: its id, in ``[0, len(self))``.
            extension: which member, e.g. ``"png"``.

        Raises:
            BadSampleError: the bytes are not the ones that were packed.
            BadShardError: the shard is gone.
        """
        data = self._bytes(sample, extension, 0, self.size(sample, extension))
        self._check(sample, extension, data, int(self.split.crc32[extension][sample]), "")
        return data

    def size(self, sample: int, extension: str) -> int:
        """Bytes of one member of one sample."""
        return int(self.split.size[extension][sample])

    def read_range(self, sample: int, extension: str, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop`` of one member of one sample.

        Args:
            sample, extension: as in `read`.
            start, stop: ``0 <= start <= stop <= size(sample, extension)``.

        Raises:
            BadSampleError: the blocks it lies in (the whole member, if that is not larger than a block) are not the bytes
                that were packed.
            BadShardError: the shard is gone.
            ValueError: the stretch is not in the member.
        """
        size = self.size(sample, extension)
        if not 0 <= start <= stop <= size:
            shard, member = self.place(sample, extension)
            raise ValueError(f"{shard} [{member}]: bytes {start} to {stop} of a member of {size}")
        checksums = self.split.blocks[extension].get(sample)
        if checksums is None:
            return self.read(sample, extension)[start:stop]
        if start == stop:
            return b""
        first, last = start // BLOCK, -(-stop // BLOCK)
        data = self._bytes(sample, extension, first * BLOCK, min(last * BLOCK, size))
        view = memoryview(data)
        for block in range(first, last):
            at = (block - first) * BLOCK
            self._check(sample, extension, view[at : at + BLOCK], checksums[block], f"in block {block} ")
        return data[start - first * BLOCK : stop - first * BLOCK]

    def _bytes(self, sample: int, extension: str, start: int, stop: int) -> bytes:
        descriptor = self._descriptor(int(self.split.shard_of[sample]))
        at = int(self.split.offset[extension][sample])
        data = os.pread(descriptor, stop - start, at + start)
        while 0 < len(data) < stop - start:  # one call gives at most 2 GiB
            more = os.pread(descriptor, stop - start - len(data), at + start + len(data))
            if not more:
                break
            data += more
        if len(data) != stop - start:
            shard, member = self.place(sample, extension)
            raise BadSampleError(
                shard, f"the shard ends inside it ({start + len(data)} of {self.size(sample, extension)} bytes); copy it "
                "again or pack again", member,
            )  # fmt: skip
        return data

    def _check(self, sample: int, extension: str, data: bytes | memoryview, expected: int, where: str) -> None:
        if zlib.crc32(data) != expected:
            shard, member = self.place(sample, extension)
            raise BadSampleError(
                shard, f"damaged: its checksum {where}differs from the index; copy it again or pack again", member
            )

    def _descriptor(self, shard: int) -> int:
        if self._process != os.getpid():
            # After a fork the parent's descriptors are left alone: they are the parent's to close.
            self._files, self._process = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self.split.shards[shard]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise BadShardError(path, "is missing") from error
        self._files[shard] = descriptor
        if len(self._files) > MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Close this process's files; they open again when needed."""
        if self._process == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()
