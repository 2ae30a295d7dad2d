"""kNN-LM: next tokens that followed the nearest contexts, beside what the model says.

Follows Khandelwal et al. 2019, "Generalization through Memorization: Nearest Neighbor Language Models" (arXiv 1911.00172). A datastore holds, for every token ``v_i`` of a text, the features ``f_i`` by which a trained model predicts it. At evaluation, with ``N`` the ``k`` of it nearest to the features ``q`` at hand:

    p_kNN(y) = sum_{i in N, v_i = y} exp(-d(q, f_i) / T) / sum_{i in N} exp(-d(q, f_i) / T)         d: squared distance
    p(y)     = l p_kNN(y) + (1 - l) p_LM(y)

Nothing is trained. Features are those that enter the head, after the backbone's last norm: every model has them, whatever its blocks are. The paper found the input of the last feed-forward network a little better, which a block here need not have. Search is exact, where the paper has a quantised index (:mod:`mmlong.ops.nearest`).

A datastore is a folder: ``keys.bin (N, D)`` in float16 or float32, ``values.bin (N,)``, and ``datastore.json`` with the version, metric, number of codes, fingerprint of the model's weights, and what it was made of (:mod:`mmlong.retrieval.folder`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlong.heads.categorical import CategoricalHead
from mmlong.knn.fingerprint import fingerprint
from mmlong.models import AutoregressiveModel
from mmlong.ops.nearest import nearest, require_search
from mmlong.retrieval.folder import BadFolderError, FolderWriter, open_folder

FILE = "datastore.json"
VERSION = 1
METRIC = "l2"
KEYS = ("float16", "float32")
REMAKE = "mmlong knn build RUN --out FOLDER"
SEGMENT = 4096
"""Tokens run at a time."""


def codes_of(model: Any) -> int:
    """How many codes a model chooses the next token from.

    Raises:
        ValueError: it predicts no codes, one after another.
    """
    if not isinstance(model, AutoregressiveModel) or not isinstance(model.head, CategoricalHead):
        raise ValueError(
            "kNN-LM mixes distributions over codes: it takes an autoregressive model with head categorical, "
            f"and this is {type(model).__name__} with {type(getattr(model, 'head', None)).__name__}"
        )
    return model.head.num_classes


@torch.no_grad()
def features_of(
    model: AutoregressiveModel, document: Tensor, segment: int = SEGMENT
) -> Iterator[tuple[Tensor, Tensor]]:
    """The features that predict each token of a document, and the tokens, a segment at a time with the state carried.

    Args:
        model: in evaluation mode.
        document: tokens ``(1, L)``.
        segment: tokens run at a time.

    Yields:
        features ``(l, D)`` and codes ``(l,)``.
    """
    state = None
    device = model.start_vector().device
    for start in range(0, document.shape[1], segment):
        tokens = document[:, start : start + segment].to(device)
        x, state = model.forward_features(tokens, state)
        yield x[0], tokens[0]


def build_datastore(
    model: AutoregressiveModel,
    documents: Iterable[Tensor],
    folder: str | Path,
    source: dict[str, Any],
    *,
    limit: int | None = None,
    dtype: str = "float16",
    segment: int = SEGMENT,
) -> int:
    """Write a datastore.

    Args:
        model: in evaluation mode.
        documents: tokens ``(1, L)`` of each.
        folder: where; it must not be there yet.
        source: what the documents are, in plain values.
        limit: tokens to take, the first; ``None`` for all.
        dtype: of the keys, ``float16`` or ``float32``.
        segment: tokens run at a time.

    Returns:
        how many tokens it holds.

    Raises:
        ValueError: a model without a distribution over codes, an unknown dtype, features that it cannot hold, or nothing to keep.
        BadFolderError: the folder is there already.
        OSError: it cannot be written; nothing is left of it.
    """
    codes = codes_of(model)
    if dtype not in KEYS:
        raise ValueError(f"keys are {' or '.join(KEYS)}, not {dtype!r}")
    if segment < 1 or (limit is not None and limit < 1):
        raise ValueError(f"segment and limit are at least 1, got {segment} and {limit}")
    arrays = {"keys": (dtype, (model.num_features,)), "values": ("uint8" if codes <= 256 else "int32", ())}
    with FolderWriter(folder, FILE, VERSION, arrays) as out:
        count = 0
        for document in documents:
            left = None if limit is None else limit - count
            if left == 0:
                break
            for keys, values in features_of(model, document[:, :left], segment):
                kept = keys.to(getattr(torch, dtype))
                if not bool(kept.isfinite().all()):
                    raise ValueError(
                        f"features of up to {float(keys.abs().max()):g} do not fit into {dtype} keys"
                        + (": take float32" if dtype == "float16" and bool(keys.isfinite().all()) else "")
                    )
                out.add("keys", kept.cpu().numpy())
                out.add("values", values.cpu().numpy())
                count += len(values)
        if count == 0:
            raise ValueError("there is not one token to keep: the documents are empty")
        out.said = {"metric": METRIC, "codes": codes, "model": fingerprint(model), "source": {**source, "limit": limit}}
    return count


class Datastore:
    """A datastore, opened for the model that it was made with; keys and values stay on the disk.

    Args:
        folder: where.
        model: that will ask.

    Attributes:
        keys: ``(N, D)``, mapped read-only.
        values: ``(N,)``, likewise.
        source: what it was made of.

    Raises:
        BadFolderError: it is missing, not whole, of another version, or another model's.
    """

    def __init__(self, folder: str | Path, model: AutoregressiveModel) -> None:
        self.folder = Path(folder)
        said, arrays = open_folder(
            folder, FILE, VERSION, {"keys": (KEYS, 2), "values": (("uint8", "int32"), 1)}, REMAKE
        )
        self.keys, self.values = arrays["keys"], arrays["values"]
        self.source: dict[str, Any] = said["source"] if isinstance(said.get("source"), dict) else {}
        path = self.folder / FILE
        if len(self.keys) != len(self.values) or len(self.keys) == 0:
            raise BadFolderError(
                path, f"says {len(self.keys):,} keys and {len(self.values):,} values; make it again with `{REMAKE}`"
            )
        if said.get("metric") != METRIC:
            raise BadFolderError(
                path, f"has metric {said.get('metric')!r}; it must be {METRIC!r}: make it again with `{REMAKE}`"
            )
        for what, found, due in (
            ("dim", self.keys.shape[1], model.num_features),
            ("codes", said.get("codes"), codes_of(model)),
        ):
            if found != due:
                raise BadFolderError(
                    path, f"is of another model: its {what} is {found}, the model's {due}; name the run that it was built from, or build this one's: `{REMAKE}`"
                )  # fmt: skip
        if (found := said.get("model")) != (due := fingerprint(model)):
            raise BadFolderError(
                path, f"is of another model: it was built with weights {found}, and these are {due}; name the run that it was built from, or build this one's: `{REMAKE}`"
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.keys)


def knn_probabilities(distances: Tensor, values: Tensor, codes: int, temperature: float = 1.0) -> Tensor:
    """What the nearest say: ``(Q, codes)``, rows that sum to 1.

    Args:
        distances: squared, ``(Q, k)``; infinite where there is no neighbour, at least one of each row is finite.
        values: their tokens, int64 ``(Q, k)``, any where there is none.
        codes: how many tokens there are.
        temperature: T.
    """
    weights = (-distances / temperature).softmax(-1)
    return weights.new_zeros(len(weights), codes).scatter_add_(1, values, weights)


def interpolate(logits: Tensor, knn: Tensor, weight: float) -> Tensor:
    """``log(weight knn + (1 - weight) softmax(logits))``, all ``(Q, codes)``."""
    theirs, own = (math.log(share) if share > 0 else -math.inf for share in (weight, 1 - weight))
    return torch.logaddexp(theirs + knn.log(), own + logits.to(knn.dtype).log_softmax(-1))


class NearestNeighbours:
    """kNN-LM's distribution for the features at hand.

    Args:
        store: the datastore.
        codes: how many tokens there are.
        k: neighbours; of a datastore with fewer, all.
        temperature: T.
        search: ``exact`` or ``faiss``.

    Raises:
        ValueError: numbers that make no sense, or an unknown search.
        ImportError: ``search: faiss`` without it.
    """

    def __init__(
        self, store: Datastore, codes: int, k: int = 1024, temperature: float = 1.0, search: str = "exact"
    ) -> None:
        if k < 1 or not 0 < temperature < math.inf:
            raise ValueError(f"k is at least 1 and the temperature positive, got {k} and {temperature}")
        require_search(search)
        self.store, self.codes, self.k, self.temperature, self.search = store, codes, k, temperature, search

    def __call__(self, features: Tensor) -> Tensor:
        """Features ``(Q, D)`` to ``p_kNN (Q, codes)``, in at least float32."""
        distances, index = nearest(features, self.store.keys, min(self.k, len(self.store)), "l2", search=self.search)
        values = torch.from_numpy(self.store.values[index.cpu().numpy()].astype(np.int64)).to(features.device)
        return knn_probabilities(distances, values, self.codes, self.temperature)


@dataclass(frozen=True)
class Measured:
    """Bits of the same tokens, by the model alone and with the datastore.

    Attributes:
        tokens: how many.
        alone: bits in all.
        together: bits in all, one number a weight.
    """

    tokens: int
    alone: float
    together: tuple[float, ...]


def check_weight(weight: float) -> None:
    """Raise ``ValueError`` unless it is one of p_kNN."""
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the neighbours is 0 .. 1, got {weight}")


@torch.no_grad()
def measure(
    model: AutoregressiveModel,
    neighbours: NearestNeighbours,
    documents: Iterable[Tensor],
    weights: Iterable[float] = (0.25,),
    *,
    limit: int | None = None,
    segment: int = 1024,
) -> Measured:
    """Bits of documents without and with what the datastore says.

    Args:
        model: in evaluation mode.
        neighbours: of its datastore.
        documents: tokens ``(1, L)`` of each.
        weights: l, each measured; one search serves them all.
        limit: tokens to measure, the first; ``None`` for all.
        segment: tokens run, and searched for, at a time.

    Raises:
        ValueError: numbers that make no sense, or not one token.
    """
    weights = tuple(weights)
    for weight in weights:
        check_weight(weight)
    if segment < 1 or (limit is not None and limit < 1):
        raise ValueError(f"segment and limit are at least 1, got {segment} and {limit}")
    count, alone, together = 0, 0.0, [0.0] * len(weights)
    for document in documents:
        left = None if limit is None else limit - count
        if left == 0:
            break
        for features, tokens in features_of(model, document[:, :left], segment):
            logits = model.forward_head(features[None])[0]
            knn = neighbours(features)
            asked = tokens[:, None]
            alone -= float(logits.double().log_softmax(-1).gather(1, asked).sum())
            for n, weight in enumerate(weights):
                together[n] -= float(interpolate(logits, knn, weight).double().gather(1, asked).sum())
            count += len(tokens)
    if count == 0:
        raise ValueError("there is not one token to measure")
    return Measured(count, alone / math.log(2), tuple(nats / math.log(2) for nats in together))
