"""Pictures of a run, drawn without a display: curves, a confusion matrix, images with truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmlong.training.metrics_csv import column

INK, FAINT, ACCENT, WRONG = "#1f2933", "#9fb3c8", "#0b7285", "#c92a2a"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # The object interface: pyplot would keep global state and may ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average over about ``span`` values, unbiased at the start."""
    keep, average, weight, out = 1 - 1 / max(span, 1), 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(average / weight)
    return out


def draw_curves(rows: list[dict[str, str]], path: Path, title: str) -> bool:
    """Loss of training and evaluation over steps, and accuracy below it where there is one; false if nothing was logged."""
    steps, loss = column(rows, "train/loss")
    if not steps:
        return False
    bits = column(rows, "train/bits")[0] or column(rows, "val/bits")[0]
    val_steps, val_loss = column(rows, "val/bits" if bits else "val/loss")
    acc_steps, accuracy = column(rows, "val/accuracy")
    figure, subplots = _figure(7, 6 if acc_steps else 3.6)
    axes = np.atleast_1d(subplots(2 if acc_steps else 1, 1, sharex=True))
    axes[0].plot(steps, loss, color=FAINT, linewidth=0.8, label="train, each step logged")
    axes[0].plot(steps, smooth(loss, max(len(loss) // 20, 2)), color=INK, linewidth=1.6, label="train, smoothed")
    if val_steps:
        axes[0].plot(val_steps, val_loss, "o-", color=ACCENT, markersize=4, label="validation")
    axes[0].set_ylabel("bits" if bits else "loss (nats)")
    axes[0].legend(frameon=False)
    axes[0].set_title(title)
    if acc_steps:
        axes[1].plot(acc_steps, accuracy, "o-", color=ACCENT, markersize=4, label="validation accuracy")
        balanced = column(rows, "val/balanced_accuracy")
        if balanced[0]:
            axes[1].plot(*balanced, "o--", color=INK, markersize=3, linewidth=1, label="balanced accuracy")
        axes[1].set_ylabel("accuracy")
        axes[1].legend(frameon=False)
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return True


def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: Path, title: str) -> None:
    """Counts of truth (rows) against prediction (columns), shaded by the share of each row."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = max(3.6, 0.55 * len(names) + 1.8)
    figure, subplots = _figure(size + 0.8, size)
    axis = subplots()
    image = axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for (row, col), count in np.ndenumerate(matrix):
        axis.text(col, row, f"{int(count)}", ha="center", va="center", color="white" if share[row, col] > 0.55 else INK,
                  fontsize=11 if len(names) <= 10 else 7)  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=0 if len(names) <= 4 else 90)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("prediction")
    axis.set_ylabel("truth")
    axis.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the row")
    figure.savefig(path, dpi=130)


def draw_predictions(
    images: Sequence[np.ndarray],
    truth: Sequence[int],
    prediction: Sequence[int],
    probability: Sequence[float],
    names: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """A sheet of images, each with its truth, its prediction and how sure the model was; mistakes in red.

    Args:
        images: uint8 ``(C, H, W)`` each.
        truth, prediction: class ids.
        probability: of the prediction.
        names: of the classes.
        path: file to write.
        title: over all.
    """
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure, subplots = _figure(2.1 * columns, 2.5 * rows + 0.5)
    axes = subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, true, guess, sure in zip(axes, images, truth, prediction, probability, strict=False):
        grey = image.shape[0] == 1
        axis.imshow(image[0] if grey else image.transpose(1, 2, 0), cmap="gray" if grey else None, vmin=0, vmax=255)
        right = true == guess
        said = names[guess] if right else f"{names[guess]}, is {names[true]}"
        axis.set_title(f"{said}\n{sure:.0%} sure", fontsize=8.5, color=INK if right else WRONG)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
