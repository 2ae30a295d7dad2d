"""The floor of `audio/mulaw_ar`: linear prediction of order 16 with an ideal entropy coder, on the same mu-law codes.

    python -m mmlong.experiments.floors.linear_prediction --source FOLDER

Each sample, as its code says it, is predicted from the 16 before it (silence before the first); the prediction is rounded to a code, and what is coded is the
difference of the two codes, modulo 256. (Predicting the codes themselves costs 0.24 bits more.) An ideal coder needs the entropy of the differences. From honest to generous:

- ``trained``: weights by least squares over the training split, and the distribution of its differences (one is added to each count).
- ``ideal``: the same weights; the distribution of the test split's differences is given for nothing.
- ``own weights``: besides, each recording is predicted by weights fitted to itself, given for nothing, as codecs do frame by frame for a price. The number to beat.
- ``contexts``: besides, there are 32 distributions, chosen by how large the last 16 differences were, given for nothing.

``order 0`` is the entropy of the test split's codes themselves, without prediction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np
import torch
from mmlong.datamodules.audio_files import read_sound
from mmlong.datamodules.known import find_source, known_sequences
from mmlong.datamodules.records import Record
from mmlong.datamodules.splits import split_items

from mmlong.modalities.audio import mulaw_decode, mulaw_encode

CONTEXTS = 32


def recordings(records: Sequence[Record]) -> list[np.ndarray]:
    """The mu-law codes of each recording: int64 ``(T,)``."""
    return [encode(read_sound(record.load(), record.name).wave[0]) for record in records]


def encode(wave: np.ndarray) -> np.ndarray:
    """Samples to codes."""
    return mulaw_encode(torch.from_numpy(wave)).numpy()


def decode(codes: np.ndarray) -> np.ndarray:
    """Codes to samples, float64."""
    return mulaw_decode(torch.from_numpy(codes)).numpy().astype(np.float64)


def before(wave: np.ndarray, order: int) -> np.ndarray:
    """``(T, order)``: the samples before each, the nearest last."""
    return np.lib.stride_tricks.sliding_window_view(np.concatenate([np.zeros(order), wave[:-1]]), order)


def fit(parts: Sequence[np.ndarray], order: int) -> np.ndarray:
    """Weights ``(order,)`` by least squares over recordings."""
    square, cross = np.zeros((order, order)), np.zeros(order)
    for wave in map(decode, parts):
        x = before(wave, order)
        square += x.T @ x
        cross += x.T @ wave
    return np.linalg.solve(square + 1e-9 * np.trace(square) / order * np.eye(order), cross)


def differences(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What is left to code of a recording: int64 ``(T,)``, -128..127."""
    predicted = before(decode(codes), len(weights)) @ weights
    return (codes - encode(predicted.astype(np.float32)) + 128) % 256 - 128


def entropy(values: np.ndarray) -> float:
    """Bits a value that an ideal coder needs, who knows how often each occurs."""
    _, count = np.unique(values, return_counts=True)
    share = count / len(values)
    return float(-(share * np.log2(share)).sum())


def floor(given: str | None, order: int = 16, dataset: str = "fsdd", seed: int = 0) -> dict[str, float]:
    """Bits per sample of the test split; see the module's docstring."""
    known = known_sequences(dataset)
    splits = split_items(known.load(find_source(known, given)).records, known.splits, seed)
    train, test = recordings(splits["train"]), recordings(splits["test"])
    weights = fit(train, order)
    learned = np.concatenate([differences(codes, weights) for codes in train])
    counts = np.bincount(learned + 128, minlength=256) + 1
    left = np.concatenate([differences(codes, weights) for codes in test])
    own = [differences(codes, fit([codes], order)) for codes in test]
    sizes = np.concatenate([before(np.abs(rest).astype(np.float64), 16).mean(1) for rest in own])
    rest = np.concatenate(own)
    context = np.searchsorted(np.quantile(sizes, np.linspace(0, 1, CONTEXTS + 1)[1:-1]), sizes)
    chosen = [values for number in range(CONTEXTS) if len(values := rest[context == number])]
    return {
        "samples": float(len(left)),
        "order 0": entropy(np.concatenate(test)),
        "trained": float(-np.log2(counts / counts.sum())[left + 128].mean()),
        "ideal": entropy(left),
        "own weights": entropy(rest),
        "contexts": sum(len(values) * entropy(values) for values in chosen) / len(rest),
    }


def main() -> None:
    """Print the floor."""
    parser = argparse.ArgumentParser(description="Linear prediction and an ideal entropy coder on mu-law codes.")
    parser.add_argument("--source", help="folder or tar of Jakobovski/free-spoken-digit-dataset")
    parser.add_argument("--order", type=int, default=16, help="of the prediction (default 16)")
    parser.add_argument("--dataset", default="fsdd", help="which known source of sounds (default fsdd)")
    args = parser.parse_args()
    found = floor(args.source, args.order, args.dataset)
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
