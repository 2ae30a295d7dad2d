"""The floor of a sound classification recipe: logistic regression on the means of MFCCs, on the recipe's own splits.

    python -m mmlong.experiments.floors.mfcc foxdot
    python -m mmlong.experiments.floors.mfcc fsdd --source FOLDER

20 coefficients (torchaudio's MFCC, windows of 32 ms every 8 ms), averaged over the recording; with ``--spread`` their standard deviations too. Standardised over
training; regularisation is chosen on validation, and the test set is looked at once. Needs scikit-learn.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from mmlong.datamodules.audio_files import read_sound
from mmlong.datamodules.known import find_source, known_names, known_sequences
from mmlong.datamodules.records import Record
from mmlong.datamodules.splits import split_items

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def features(records: list[Record], rate: int, spread: bool) -> np.ndarray:
    """``(N, 20)`` means, or ``(N, 40)`` with standard deviations."""
    from torchaudio.transforms import MFCC

    window = 1 << round(np.log2(0.032 * rate))
    options = {"n_fft": window, "win_length": window, "hop_length": window // 4, "n_mels": 40}
    mfcc = MFCC(rate, n_mfcc=20, melkwargs=options)
    rows = []
    for record in records:
        found = mfcc(torch.from_numpy(read_sound(record.load(), record.name).wave[0]))
        rows.append(torch.cat([found.mean(1), found.std(1)] if spread else [found.mean(1)]).numpy())
    return np.stack(rows)


def floor(name: str, given: str | None, spread: bool, seed: int = 0) -> dict[str, float]:
    """Fit, choose, test; see the module's docstring."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise SystemExit(f"this floor needs scikit-learn ({error}): pip install scikit-learn") from error
    known = known_sequences(name)
    parts = split_items(known.load(find_source(known, given)).records, known.splits, seed)
    field = next(iter(known.labels))
    labels = {split: np.array([record.labels[field] for record in part]) for split, part in parts.items()}
    found = {split: features(part, known.about["rate"], spread) for split, part in parts.items()}
    mean, scale = found["train"].mean(0), found["train"].std(0) + 1e-6
    found = {split: (x - mean) / scale for split, x in found.items()}
    best: tuple[float, float, float] = (-1.0, 0.0, 0.0)
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(found["train"], labels["train"])
        val, test = (float(model.score(found[split], labels[split])) for split in ("val", "test"))
        print(f"  C {strength:g}: val {val:.4f}", flush=True)
        best = max(best, (val, -strength, test))  # of equal ones the more regular
    return {"val": best[0], "C": -best[1], "test": best[2]}


def main() -> None:
    """Print the floor of one source."""
    parser = argparse.ArgumentParser(description="Logistic regression on means of MFCCs: a recipe's floor.")
    parser.add_argument("dataset", choices=known_names("audio"))
    parser.add_argument("--source", help="its folder or file, if it comes in no package")
    parser.add_argument("--spread", action="store_true", help="standard deviations beside means")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    args = parser.parse_args()
    result = floor(args.dataset, args.source, args.spread, args.seed)
    print(
        f"{args.dataset}, MFCC {'means and deviations' if args.spread else 'means'}: test accuracy {result['test']:.4f} "
        f"(val {result['val']:.4f}, C {result['C']:g})"
    )


if __name__ == "__main__":
    main()
