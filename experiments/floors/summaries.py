"""The floor of a recipe over arrays: logistic regression on summaries of a sample, on the recipe's own splits.

    python -m mmlong.experiments.floors.summaries digit-series
    python -m mmlong.experiments.floors.summaries digit-points
    python -m mmlong.experiments.floors.summaries pans

============ ========================================================================================================================
data         summary
============ ========================================================================================================================
digit-series mean and deviation of each coefficient over what was observed of it, and how many moments there are (27 numbers)
digit-points grey levels summed over 14 x 14 cells of the plane (196)
pans         what the last frame has more than the first, pixel by pixel (256); beside it, of every direction and speed the one by which frames overlap best, which needs no training
============ ========================================================================================================================

Standardised over training; regularisation is chosen on validation, and the test set is looked at once. Fitted by L-BFGS here: nothing else is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from mmlong.datamodules import pans
from mmlong.datamodules.arrays import ArrayCodec, ArrayStorage
from mmlong.datamodules.codecs import LoadedMember
from mmlong.datamodules.known import known_sequences
from mmlong.datamodules.records import Record
from mmlong.datamodules.splits import split_items
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def series(raw: np.ndarray) -> np.ndarray:
    """``(27, T)`` to 27 numbers."""
    values, seen = raw[1:14], raw[14:]
    count = seen.sum(1).clip(1)
    mean = values.sum(1) / count
    spread = np.sqrt((np.square(values - mean[:, None]) * seen).sum(1) / count)
    return np.concatenate([mean, spread, [raw.shape[1]]])


def points(raw: np.ndarray, side: int = 14) -> np.ndarray:
    """``(3, N)`` to ``side ** 2`` numbers."""
    cells = ((raw[:2] + 1) / 2 * side).astype(int).clip(0, side - 1)
    return np.bincount(cells[0] * side + cells[1], raw[2], side**2)


def frames(raw: np.ndarray) -> np.ndarray:
    """``(1, F, H, W)`` to ``H * W`` numbers."""
    return (raw[0, -1].astype(float) - raw[0, 0]).ravel()


SUMMARIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "digit-series": series,
    "digit-points": points,
    "pans": frames,
}


def arrays(name: str, records: list[Record]) -> list[np.ndarray]:
    """The samples as their datamodule gives them."""
    storage = ArrayStorage.of(known_sequences(name).about)
    codec, found = ArrayCodec(storage), []
    for record in records:
        data = record.load()
        found.append(codec.read(LoadedMember(data, (name, record.name)), 0, storage.length(data)))
    return found


def fit(x: Tensor, y: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """Logistic regression with a squared penalty of ``strength`` on its weights; the fitted classifier, rows to classes."""
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + strength * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return lambda rows: (rows @ weight + bias).argmax(1)


def matched(clip: np.ndarray) -> int:
    """The direction of a pan by which its frames overlap best, in mean squared difference."""
    video, side = clip[0].astype(float), pans.SIDE
    best, found = float("inf"), 0
    for label, step in enumerate(pans.DIRECTIONS.values()):
        for speed in range(1, pans.FASTEST + 1):
            (a, b), (c, d) = ((max(n * speed, 0), side + min(n * speed, 0)) for n in step)
            before, after = video[:-1, c:d, a:b], video[1:, side - d : side - c, side - b : side - a]
            if (error := float(np.square(before - after).mean())) < best:
                best, found = error, label
    return found


def floor(name: str, seed: int = 0) -> dict[str, float]:
    """Fit, choose, test; see the module's docstring."""
    known = known_sequences(name)
    parts = split_items(known.load(None).records, known.splits, seed)
    samples = {split: arrays(name, parts[split]) for split in ("train", "val", "test")}
    labels = {split: torch.tensor([next(iter(r.labels.values())) for r in parts[split]]) for split in samples}
    x = {s: torch.from_numpy(np.stack([SUMMARIES[name](raw) for raw in rows])).float() for s, rows in samples.items()}
    mean, scale = x["train"].mean(0), x["train"].std(0) + 1e-6
    x = {split: (rows - mean) / scale for split, rows in x.items()}
    best: tuple[float, float, float] = (-1.0, 0.0, 0.0)
    for strength in STRENGTHS:
        says = fit(x["train"], labels["train"], strength)
        val, test = (float((says(x[s]) == labels[s]).float().mean()) for s in ("val", "test"))
        print(f"  penalty {strength:g}: val {val:.4f}", flush=True)
        best = max(best, (val, strength, test))  # of equal ones the more regular
    found = {"val": best[0], "penalty": best[1], "test": best[2]}
    if name == "pans":
        hits = [matched(raw) == label for raw, label in zip(samples["test"], labels["test"].tolist(), strict=True)]
        found["matched"] = float(np.mean(hits))
    return found


def main() -> None:
    """Print the floor of one source."""
    parser = argparse.ArgumentParser(description="Logistic regression on summaries of arrays: a recipe's floor.")
    parser.add_argument("dataset", choices=SUMMARIES)
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    args = parser.parse_args()
    result = floor(args.dataset, args.seed)
    print(
        f"{args.dataset}: test accuracy {result['test']:.4f} (val {result['val']:.4f}, penalty {result['penalty']:g})"
        + (f"; by matching frames {result['matched']:.4f}" if "matched" in result else "")
    )


if __name__ == "__main__":
    main()
