"""Chunks of documents and, of each, the chunks of other documents that are most like it: what RETRO retrieves from.

Follows Borgeaud et al. 2021 (RETRO, arXiv 2112.04426): documents are cut into chunks of ``m`` tokens, and the neighbours of a chunk are the ``k`` chunks nearest to it by frozen features, each with the ``m`` tokens that come after it in its document. A chunk's own document is left out. The paper's features are BERT's, averaged over the chunk; here they need no model, and so no second one has to run when chunks end:

    f(C) = sum_i s(g_i) e_{h(g_i)},   made a unit vector;       g_i: the n tokens from token i of the chunk,  h, s: a bucket and a sign, hashed

(n-grams hashed with signs: Weinberger et al. 2009, arXiv 0902.2206). What is near shares n-grams, and not meaning.

:func:`build_neighbours` writes them as a folder (:mod:`mmlong.retrieval.folder`), and :class:`Neighbours` is the retriever of :mod:`mmlong.backbone.retro`:

    in training     the neighbours that were precomputed; a chunk that is not of the documents, from their first tokens on, has none
    else            the nearest of all chunks: of documents that are not among those indexed

A chunk of the same tokens may be in several documents. Its neighbours are of none of them, so that a table by tokens never gives away a document's own text. So a training row must begin where a document does to have neighbours in all its chunks: windows ``whole``, ``train_crop: same``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlong.ops.nearest import nearest
from mmlong.retrieval.folder import BadFolderError, FolderWriter, open_folder

FILE = "neighbours.json"
VERSION = 1
REMAKE = "mmlong knn neighbours RECIPE --out FOLDER"
BLOCK = 4096
"""Chunks that are searched for at a time."""


def chunk_features(chunks: Tensor, dim: int, n: int) -> Tensor:
    """Hashed n-grams of chunks.

    Args:
        chunks: codes, int64 ``(N, m)``.
        dim: buckets D.
        n: tokens of a gram, at most m.

    Returns:
        float32 ``(N, D)``, unit vectors (zero only where all cancels).
    """
    grams = chunks.unfold(1, n, 1)
    number = torch.zeros_like(grams[..., 0])
    # Below 2^31 throughout, so that no product passes 2^63.
    for i in range(n):
        number = (number * 1_000_003 + grams[..., i] + 1) % 2_147_483_647
    mixed = (number * 2_654_435_761) % 4_294_967_296
    bucket, sign = (mixed >> 8) % dim, ((mixed >> 7) & 1) * 2 - 1
    found = torch.zeros(len(chunks), dim).scatter_add_(1, bucket, sign.float())
    return torch.nn.functional.normalize(found, dim=1)


def cut(document: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """A document ``(L,)`` as chunks ``(ceil(L / m), m)``, the last filled up with zeros, and their sizes."""
    count = -(-len(document) // m)
    filled = torch.nn.functional.pad(document, (0, count * m - len(document)))
    sizes = torch.full((count,), m)
    sizes[-1] = len(document) - (count - 1) * m
    return filled.view(count, m), sizes


def build_neighbours(
    documents: Iterable[Tensor],
    folder: str | Path,
    source: dict[str, Any],
    *,
    codes: int,
    m: int = 64,
    k: int = 2,
    dim: int = 256,
    n: int = 4,
    limit: int | None = None,
) -> int:
    """Index documents, and find each chunk's neighbours.

    Args:
        documents: codes ``(1, L)`` of each.
        folder: where; it must not be there yet.
        source: what the documents are, in plain values.
        codes: how many codes there are.
        m: tokens of a chunk.
        k: neighbours.
        dim, n: of the features.
        limit: tokens to take, the first; ``None`` for all.

    Returns:
        how many chunks are indexed.

    Raises:
        ValueError: sizes below 1, or not one complete chunk.
        BadFolderError: the folder is there already.
        OSError: it cannot be written; nothing is left of it.
    """
    for name, least in (("m", m), ("k", k), ("dim", dim), ("n", n), ("limit", 1 if limit is None else limit)):
        if least < 1:
            raise ValueError(f"{name} must be at least 1, got {least}")
    if n > m:
        raise ValueError(f"a chunk of {m} tokens has no grams of {n}")
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": ("uint8" if codes <= 256 else "int32", (m,)),
        "sizes": ("int32", ()),
        "documents": ("int32", ()),
        "features": ("float16", (dim,)),
        "near": ("int32", (k,)),
    }
    taken, sizes, numbers, left = [], [], [], limit
    for place, document in enumerate(documents):
        if left == 0:
            break
        chunks, each = cut(document[0, :left], m)
        left = None if left is None else left - int(each.sum())
        taken.append(chunks.to(torch.uint8 if codes <= 256 else torch.int32))
        sizes.append(each)
        numbers.append(torch.full_like(each, place))
    if not taken or not bool((torch.cat(sizes) == m).any()):
        raise ValueError(f"there is not one chunk of {m} tokens in the documents")
    tokens, size, number = torch.cat(taken), torch.cat(sizes), torch.cat(numbers)
    with FolderWriter(folder, FILE, VERSION, arrays) as out:
        features = torch.cat([chunk_features(block.long(), dim, n) for block in tokens.split(BLOCK)]).half()
        for name, array in (("tokens", tokens), ("sizes", size), ("documents", number), ("features", features)):
            out.add(name, array.numpy())
        near = others(tokens, size, number, features, k)
        out.add("near", near.numpy())
        out.said = {"m": m, "n": n, "codes": codes, "source": {**source, "limit": limit}}
    return int((size == m).sum())


def others(tokens: Tensor, size: Tensor, number: Tensor, features: Tensor, k: int) -> Tensor:
    """The ``k`` chunks nearest to each, of no document that has a chunk of the same tokens: int64 ``(C, k)``, -1 where there are fewer, or the chunk is not complete."""
    C, m = tokens.shape
    near = torch.full((C, k), -1)
    holders: dict[bytes, set[int]] = {}
    keys = [tokens[c].numpy().tobytes() if size[c] == m else b"" for c in range(C)]
    for key, document in zip(keys, number.tolist(), strict=True):
        if key:
            holders.setdefault(key, set()).add(document)
    first: dict[bytes, int] = {}
    for c, key in enumerate(keys):
        if key:
            first.setdefault(key, c)
    short = size < m
    # Those of many documents together, since the mask of some queries takes as many rounds as one of them has documents.
    asked = sorted(first.values(), key=lambda c: len(holders[keys[c]]))
    for start in range(0, len(asked), BLOCK):
        block = asked[start : start + BLOCK]
        most = max(len(holders[keys[c]]) for c in block)
        of = torch.tensor([[*holders[keys[c]], *[-1] * (most - len(holders[keys[c]]))] for c in block])

        def hidden(rows: slice, columns: slice, of: Tensor = of) -> Tensor:
            there = short[columns].expand(len(of[rows]), -1).clone()
            for own in of[rows].unbind(1):
                there |= own[:, None] == number[columns]
            return there

        _, index = nearest(features[block], features, k, "l2", hidden=hidden)
        near[block] = index
    for c, key in enumerate(keys):
        if key:
            near[c] = near[first[key]]
    return near


class Neighbours:
    """A folder of chunks, as a retriever.

    Args:
        folder: where.

    Attributes:
        m: tokens of a chunk.
        k: neighbours.
        source: what it was made of.

    Raises:
        BadFolderError: it is missing, not whole, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        whole = ("int32",)
        said, arrays = open_folder(
            folder, FILE, VERSION,
            {"tokens": (("uint8", "int32"), 2), "sizes": (whole, 1), "documents": (whole, 1), "features": (("float16",), 2), "near": (whole, 2)},
            REMAKE,
        )  # fmt: skip
        self.tokens, self.sizes, self.documents = (
            arrays["tokens"],
            np.array(arrays["sizes"]),
            np.array(arrays["documents"]),
        )
        self.features, self.near = arrays["features"], arrays["near"]
        self.m, self.k = self.tokens.shape[1], self.near.shape[1]
        self.n = said["n"] if isinstance(said.get("n"), int) else 0
        self.source: dict[str, Any] = said["source"] if isinstance(said.get("source"), dict) else {}
        fits = len({len(array) for array in arrays.values()}) == 1 and said.get("m") == self.m
        if not fits or not 1 <= self.n <= self.m:
            raise BadFolderError(
                self.folder / FILE, f"does not fit its arrays: it was changed; make it again with `{REMAKE}`"
            )
        self._short = torch.from_numpy(self.sizes < self.m)
        self._known: dict[bytes, int] | None = None

    def __len__(self) -> int:
        return int((self.sizes == self.m).sum())

    def __deepcopy__(self, memo: Any) -> Neighbours:
        # Nothing in it changes, and a copy of what is mapped would be in memory.
        return self

    def __call__(self, chunks: Tensor, training: bool) -> Tensor:
        """Tokens ``(N, m)`` to tokens of neighbours ``(N, k, 2 m)``, -1 where there are none; see the module.

        Raises:
            ValueError: chunks of another size.
        """
        if chunks.shape[1] != self.m:
            raise ValueError(
                f"{self.folder} has chunks of {self.m} tokens, and was asked for chunks of {chunks.shape[1]}"
            )
        return self.text(self._precomputed(chunks) if training else self.search(chunks))

    def search(self, chunks: Tensor) -> Tensor:
        """The nearest of all chunks: int64 ``(N, k)``."""
        features = chunk_features(chunks, self.features.shape[1], self.n).half()
        hidden = lambda rows, columns: self._short[columns].expand(len(features[rows]), -1)  # noqa: E731
        return nearest(features, self.features, self.k, "l2", hidden=hidden)[1]

    def _precomputed(self, chunks: Tensor) -> Tensor:
        if self._known is None:
            whole = np.flatnonzero(self.sizes == self.m)
            self._known = {self.tokens[c].tobytes(): int(c) for c in whole}
        dtype = self.tokens.dtype
        place = torch.tensor([self._known.get(chunk.astype(dtype).tobytes(), -1) for chunk in chunks.numpy()])
        found = torch.from_numpy(self.near[place.clamp_min(0).numpy()].astype(np.int64))
        return torch.where(place[:, None] >= 0, found, -1)

    def text(self, index: Tensor) -> Tensor:
        """Chunks ``(N, k)``, -1 for none, each with what comes after it: ``(N, k, 2 m)``."""
        return torch.cat([self._chunk(index), self._chunk(self._after(index))], -1)

    def _after(self, index: Tensor) -> Tensor:
        """The next chunk of the same document."""
        following = (index + 1).clamp_max(len(self.sizes) - 1)
        same = torch.from_numpy(self.documents[index.clamp_min(0).numpy()] == self.documents[following.numpy()])
        return torch.where((index >= 0) & (following > index) & same, following, -1)

    def _chunk(self, index: Tensor) -> Tensor:
        at = index.clamp_min(0).numpy()
        tokens = torch.from_numpy(self.tokens[at].astype(np.int64))
        size = torch.from_numpy(self.sizes[at].astype(np.int64))
        there = (torch.arange(self.m) < size[..., None]) & (index >= 0)[..., None]
        return torch.where(there, tokens, -1)
