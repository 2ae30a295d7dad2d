"""The floor of a genome classification recipe: logistic regression on counts of short words, on the recipe's own splits.

    python -m mmlong.experiments.floors.kmers binding
    python -m mmlong.experiments.floors.kmers families

Every word of the given lengths is counted, at every place (words with N are left out), as it stands or on both strands together; counts become square roots of frequencies,
standardised over training. Regularisation and strands are chosen on validation, and the test set is looked at once. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from mmlong.datamodules.known import known_sequences
from mmlong.datamodules.records import Record
from mmlong.datamodules.splits import split_items

from mmlong.modalities.genome import letter_codes

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def read_splits(name: str, seed: int = 0) -> dict[str, list[Record]]:
    """The records of a known source by split, as packing with this seed divides them."""
    known = known_sequences(name)
    return split_items(known.load(None).records, known.splits, seed)


def word_counts(codes: np.ndarray, sizes: Sequence[int], both: bool) -> np.ndarray:
    """How often each word of each size occurs: float32 ``(sum of 4^k,)``.

    Args:
        codes: ``(T,)``, 0 to 3, and 4 for N.
        sizes: lengths of words.
        both: count those of the reverse complement too.
    """
    parts = []
    for k in sizes:
        counts = np.zeros(4**k, np.float32)
        for strand in (codes, np.where(codes < 4, 3 - codes, 4)[::-1])[: 1 + both]:
            if len(strand) >= k:
                words = np.lib.stride_tricks.sliding_window_view(strand, k)
                words = words[(words < 4).all(1)].astype(np.int64)
                counts += np.bincount(words @ (4 ** np.arange(k)[::-1]), minlength=4**k)
        parts.append(np.sqrt(counts / max(counts.sum(), 1)))
    return np.concatenate(parts)


def features(records: Sequence[Record], sizes: Sequence[int], both: bool) -> np.ndarray:
    """``(N, words)``."""
    table = letter_codes().numpy()
    return np.stack([word_counts(table[np.frombuffer(r.load(), np.uint8)], sizes, both) for r in records])


def floor(name: str, sizes: Sequence[int], seed: int = 0) -> dict[str, float | str]:
    """Fit, choose, test; see the module's docstring."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise SystemExit(f"this floor needs scikit-learn ({error}): pip install scikit-learn") from error
    parts = read_splits(name, seed)
    labels = {split: np.array([next(iter(r.labels.values())) for r in part]) for split, part in parts.items()}
    best: tuple[float, float, str] = (-1.0, 0.0, "")
    for both in (False, True):
        found = {split: features(part, sizes, both) for split, part in parts.items()}
        mean, scale = found["train"].mean(0), found["train"].std(0) + 1e-6
        found = {split: (x - mean) / scale for split, x in found.items()}
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=200).fit(found["train"], labels["train"])
            val, test = (float(model.score(found[split], labels[split])) for split in ("val", "test"))
            setting = f"{'both strands' if both else 'as given'}, C {strength:g}"
            print(f"  {setting}: val {val:.4f}", flush=True)
            best = max(best, (val, test, setting))
    return {"val": best[0], "test": best[1], "setting": best[2]}


def main() -> None:
    """Print the floor of one source."""
    parser = argparse.ArgumentParser(description="Logistic regression on counts of short words: a recipe's floor.")
    parser.add_argument("source", choices=("binding", "families", "families-transcripts"))
    parser.add_argument("--words", type=int, nargs="+", help="their lengths (default: 3 to 6 for binding, else 4 to 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    args = parser.parse_args()
    words = args.words or ([3, 4, 5, 6] if args.source == "binding" else [4, 5, 6])
    result = floor(args.source, words, args.seed)
    print(
        f"{args.source}, words of {words}: test accuracy {result['test']:.4f} (val {result['val']:.4f}; {result['setting']})"
    )


if __name__ == "__main__":
    main()
