"""Packed sequences to batches: read the stretches that the windows name, change, pad, stack.

A batch is a dict, so that Lightning can move it to a device::

    raw      (B, *lead, T)         the codec's dtype, its axes before the last; right-padded to the longest of the batch
    lengths  int64   (B,)          tokens of each row, where rows are uneven
    resets   bool    (B, T)        where a document begins; only of a stream of more than one document, and where one begins within a row or a state may come in
    continues bool   (B,)          whether a row goes on where that place of the batch before ended; only of a stream whose state is carried
    label    int64   (B,)          class id of the chosen label field, of labelled whole documents
    index    int64   (B,)          sample id: of the document, or of the stream's row
    weight   float32 (B,)          1, or 0 for a filler of evaluation and for a skipped sample: not to be counted
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .cache import SharedCache
from .codecs import Codec, IndexedMember, LoadedMember, Member
from .errors import BadSampleError, BadShardError, DataError
from .indexed import IndexedReader
from .loader import Batch, Place
from .packed import PackedDataset, Split
from .windows import Piece, Stream, Windows

Change = Callable[[np.ndarray, int, int], np.ndarray]
"""(tokens, epoch, sample) to tokens, along the last axis."""


def document_lengths(split: Split) -> np.ndarray:
    """``(N,)`` tokens of each document of a split.

    Raises:
        BadShardError: the dataset does not say.
    """
    if "length" not in split.numbers:
        raise BadShardError(split.shards[0], "its index has no lengths of documents; pack it again")
    return split.numbers["length"]


class SequenceSamples:
    """The samples of one split.

    Args:
        dataset: the packed dataset.
        split: which split.
        codec: how a member becomes an array.
        windows: which stretches of which documents the samples are.
        label: which label field; ``None``: no labels. A stream has none.
        augment: a change of every stretch, a pure function of it, epoch and sample; ``None``: none. It may change the length of a
            whole document, which is then cut to the windows' length again, and not that of a stretch of a stream.
        on_bad: ``"stop"`` or ``"skip"``.
        cache: keep decoded documents in memory. A document is then read whole when it is first needed.
        lengths: tokens of each document, where the codec makes another number of them than the index says; ``None``: as it says.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        split: str,
        codec: Codec,
        windows: Windows,
        label: str | None = None,
        augment: Change | None = None,
        on_bad: str = "stop",
        cache: bool = False,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.split = dataset.split(split)
        self.reader = IndexedReader(self.split)
        self.codec = codec
        self.windows = windows
        self.streamed = isinstance(windows, Stream)
        self.resets = self.streamed and len(self.split) > 1
        self.carried = isinstance(windows, Stream) and windows.slots is not None
        self.labels = None if label is None or self.streamed else self.split.labels[label]
        self.augment = augment
        self.on_bad = on_bad
        each = codec.dtype.itemsize * math.prod(codec.lead)
        self.lengths = document_lengths(self.split) if lengths is None else lengths
        self.cache = SharedCache(self.lengths * each) if cache else None
        self._ids: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def document(self, document: int, start: int, stop: int, member: Member | None = None) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document as packed, not to be written to.

        Args:
            document: its id in the split.
            start, stop: within it.
            member: its bytes, if they were read already.

        Raises:
            BadSampleError: it is damaged.
        """
        member = member or IndexedMember(self.reader, document, self.codec.extension)
        if self.cache is None:
            return self._decode(member, start, stop)
        kept = self.cache.get(document)
        if kept is None:
            whole = self._decode(member, 0, int(self.lengths[document]))
            self.cache.put(document, whole)
            return whole[..., start:stop]
        return kept.view(self.codec.dtype).reshape(*self.codec.lead, -1)[..., start:stop]

    def _decode(self, member: Member, start: int, stop: int) -> np.ndarray:
        array = self.codec.read(member, start, stop)
        shape = (*self.codec.lead, stop - start)
        if array.shape != shape:
            shard, name = member.place
            raise BadSampleError(shard, f"decodes to {array.shape}, should be {shape}", name)
        return array

    def fetch(self, places: list[Place]) -> tuple[Batch, list[DataError]]:
        """The batch at ``places`` and what was skipped in it. See `mmlong.datamodules.loader`."""
        rows: list[_Row] = []
        problems: list[DataError] = []
        for epoch, sample, weight in places:
            rows.append(self._row(epoch, sample, weight, None, problems))
        return self._stack(rows), problems

    def fetch_members(self, epoch: int, raw: Sequence[dict[str, Any]]) -> tuple[Batch, list[DataError]]:
        """A batch of whole documents from samples as webdataset yields them (``__key__``, ``__url__``, members by extension)."""
        if self._ids is None:
            self._ids = {key: place for place, key in enumerate(self.split.keys)}
        rows: list[_Row] = []
        problems: list[DataError] = []
        for members in raw:
            key, shard, name = members["__key__"], members["__url__"], f"{members['__key__']}.{self.codec.extension}"
            if key not in self._ids:
                raise BadShardError(shard, "is not in the index; it is stale", key)
            if self.codec.extension not in members:
                raise BadShardError(shard, "is missing from the shard", name)
            member = LoadedMember(members[self.codec.extension], (shard, name))
            rows.append(self._row(epoch, self._ids[key], 1.0, member, problems))
        return self._stack(rows), problems

    def _row(self, epoch: int, sample: int, weight: float, member: Member | None, problems: list[DataError]) -> _Row:
        pieces = self.windows.pieces(epoch, sample)
        try:
            parts = [self._part(piece, epoch, sample, member) for piece in pieces]
        except BadSampleError as error:
            if self.on_bad == "stop":
                raise
            problems.append(error)
            parts, weight = [self._filled(len(piece)) for piece in pieces], 0.0
        starts: list[int] = []
        if self.resets:
            at = np.cumsum([0, *map(len, pieces)])
            starts = [int(place) for piece, place in zip(pieces, at, strict=False) if piece.start == 0]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
        goes_on = self.carried and self.windows.continues(epoch, sample)  # type: ignore[attr-defined]
        return _Row(tokens, starts, sample, weight, goes_on)

    def _part(self, piece: Piece, epoch: int, sample: int, member: Member | None) -> np.ndarray:
        array = self.document(piece.document, piece.start, piece.stop, member)
        if self.augment is None:
            return array
        array = self.augment(array, epoch, sample)
        if self.streamed and array.shape[-1] != len(piece):
            raise ValueError(
                f"a change made {array.shape[-1]} tokens of {len(piece)}; in a stream every row keeps its length: "
                "leave that change out, or read whole documents (windows: whole)"
            )
        return array[..., : self.windows.longest]

    def _filled(self, length: int) -> np.ndarray:
        return np.full((*self.codec.lead, length), self.codec.fill, self.codec.dtype)

    def _stack(self, rows: list[_Row]) -> Batch:
        lengths = [row.tokens.shape[-1] for row in rows]
        longest = max(lengths)
        raw = np.full((len(rows), *rows[0].tokens.shape[:-1], longest), self.codec.fill, self.codec.dtype)
        for place, row, length in zip(raw, rows, lengths, strict=True):
            place[..., :length] = row.tokens
        batch: Batch = {"raw": torch.from_numpy(raw)}
        if min(lengths) < longest:
            batch["lengths"] = torch.tensor(lengths, dtype=torch.int64)
        # Without a state from before, a document that begins with its row needs no mark, and rows without marks are faster.
        if self.resets and (self.carried or any(start > 0 for row in rows for start in row.starts)):
            batch["resets"] = torch.zeros(len(rows), longest, dtype=torch.bool)
            for place, row in zip(batch["resets"], rows, strict=True):
                place[row.starts] = True
        if self.carried:
            batch["continues"] = torch.tensor([row.goes_on for row in rows])
        if self.labels is not None:
            batch["label"] = torch.tensor([int(self.labels[row.sample]) for row in rows], dtype=torch.int64)
        batch["index"] = torch.tensor([row.sample for row in rows], dtype=torch.int64)
        batch["weight"] = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        return batch


class _Row:
    """One sample before it is stacked: its tokens, where documents begin in it, its id and weight, and whether it goes on from the one before."""

    def __init__(self, tokens: np.ndarray, starts: list[int], sample: int, weight: float, goes_on: bool) -> None:
        self.tokens, self.starts, self.sample, self.weight = tokens, starts, sample, weight
        self.goes_on = goes_on
