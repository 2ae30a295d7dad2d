"""The floor of an image classification recipe: logistic regression on thumbnails, on the recipe's own splits.

    python -m mmlong.experiments.floors.thumbnails elpv --label defect

Images are averaged down to ``--side`` pixels; standardised over training, classes weighed alike; regularisation is chosen on validation by balanced accuracy, and the
test set is looked at once. Needs scikit-learn.
"""

from __future__ import annotations

import argparse

import numpy as np
from mmlong.datamodules.images import ImageDataModule
from PIL import Image

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def thumbnails(data: ImageDataModule, split: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """``(N, side * side)`` of all channels averaged, and the labels."""
    samples = data.samples(split, train=False)
    rows = []
    for sample in range(len(samples)):
        grey = Image.fromarray(samples.image(sample).mean(0).astype(np.uint8))
        rows.append(np.asarray(grey.resize((side, side), Image.Resampling.BOX), np.float32).ravel())
    return np.stack(rows), np.asarray(samples.labels)


def main() -> None:
    """Print the floor of one source."""
    parser = argparse.ArgumentParser(description="Logistic regression on thumbnails: a recipe's floor.")
    parser.add_argument("dataset")
    parser.add_argument("--label", help="which label field (default: the dataset's own)")
    parser.add_argument("--side", type=int, default=32, help="of a thumbnail, in pixels (default 32)")
    args = parser.parse_args()
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    except ImportError as error:
        raise SystemExit(f"this floor needs scikit-learn ({error}): pip install scikit-learn") from error
    data = ImageDataModule(args.dataset, label=args.label)
    data.prepare_data()
    found = {split: thumbnails(data, split, args.side) for split in ("train", "val", "test")}
    mean, scale = found["train"][0].mean(0), found["train"][0].std(0) + 1e-6
    found = {split: ((x - mean) / scale, y) for split, (x, y) in found.items()}
    best: tuple[float, float, str] = (-1.0, 0.0, "")
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced").fit(*found["train"])
        scores = {}
        for split in ("val", "test"):
            x, y = found[split]
            auc = roc_auc_score(y, model.predict_proba(x)[:, 1]) if data.num_classes == 2 else float("nan")
            scores[split] = (balanced_accuracy_score(y, model.predict(x)), auc)
        print(f"  C {strength:g}: val balanced accuracy {scores['val'][0]:.4f}, AUC {scores['val'][1]:.4f}", flush=True)
        said = f"test balanced accuracy {scores['test'][0]:.4f}, AUC {scores['test'][1]:.4f}, C {strength:g}"
        best = max(best, (float(scores["val"][0]), -strength, said))  # of equal ones the more regular
    print(f"{args.dataset}, {data.label}, thumbnails of {args.side} pixels: {best[2]}")


if __name__ == "__main__":
    main()
