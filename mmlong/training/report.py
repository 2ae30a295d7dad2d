"""What a run leaves to look at: curves, a confusion matrix, photographs with truth and prediction, and a summary."""

from __future__ import annotations

import csv
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmlong.models import save_model
from mmlong.training.progress import Throughput


def peak_memory_gb() -> float:
    """Most memory this process has had, in GB (its workers' left out)."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e9 if sys.platform == "darwin" else used * 1024 / 1e9


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name to ``(step, value)`` points, from every ``metrics*.csv`` of a run, older parts first."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("metrics*.csv"), key=lambda p: (p.name == "metrics.csv", p.name)):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key not in ("step", "epoch") and value:
                        found.setdefault(key, {})[int(row["step"])] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def _figure(width: float, height: float) -> Any:
    # The object interface needs no display and leaves no global state, unlike pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(folder: Path) -> None:
    """``loss.png``: training and validation loss, and the validation metrics, over steps."""
    metrics = read_metrics(folder)
    figure = _figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    for key, style in (("train/loss", {"lw": 0.8, "alpha": 0.6}), ("val/loss", {"marker": "o", "ms": 3})):
        if key in metrics:
            left.plot(*zip(*metrics[key], strict=True), label=key, **style)
    for key in ("val/accuracy", "val/balanced_accuracy", "val/auc"):
        if key in metrics:
            right.plot(*zip(*metrics[key], strict=True), label=key.removeprefix("val/"), marker="o", ms=3)
    for axes, title in ((left, "loss (nats)"), (right, "validation")):
        axes.set(xlabel="step", title=title)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=110)


def draw_confusion(counts: Tensor, names: list[str], path: Path) -> None:
    """Truth in rows, prediction in columns, counts in cells."""
    total = counts.sum(1, keepdim=True).clamp_min(1)
    size = 2.2 + 0.55 * len(names)
    figure = _figure(size + 0.6, size)
    axes = figure.subplots()
    axes.imshow((counts / total).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="truth", xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=45 if len(names) > 4 else 0)
    axes.set_yticklabels(names)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            axes.text(
                j, i, f"{count:.0f}", ha="center", va="center", color="white" if count / total[i] > 0.5 else "black"
            )
    figure.savefig(path, dpi=110)


def draw_predictions(images: list[Tensor], captions: list[tuple[str, bool]], path: Path) -> None:
    """A sheet of images ``(C, H, W)`` uint8 with ``(caption, right or wrong)`` below each."""
    columns = min(6, max(1, len(images)))
    rows = -(-len(images) // columns)
    figure = _figure(1.9 * columns, 2.25 * rows)
    for axes, image, (caption, right) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, images, captions, strict=False
    ):
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=8, color="black" if right else "crimson")
    for axes in figure.axes:
        axes.axis("off")
    figure.savefig(path, dpi=110)


class RunReport(pl.Callback):
    """Writes the pictures, the model and ``summary.json`` into the run folder when a test ends.

    Args:
        folder: the run folder.
        shown: how many test samples to show; the mistakes come first, half of the sheet at most.
    """

    def __init__(self, folder: str | Path, shown: int = 18) -> None:
        self.folder = Path(folder)
        self.shown = shown
        self._begun = time.time()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Curves, and the model by itself (with averaged weights where the run averages them)."""
        if trainer.is_global_zero:
            draw_curves(self.folder)
            model: Any = pl_module.model
            save_model(model, self.folder / "model")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Confusion matrix, predictions and summary."""
        task: Any = pl_module
        counts = task.confusion.compute().cpu()  # a collective: every rank takes part
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [str(n) for n in (task.class_names or range(task.num_classes))]
        draw_confusion(counts, names, self.folder / "confusion.png")
        self._predictions(trainer, task, names)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
        rates = [c.tokens_per_second for c in trainer.callbacks if isinstance(c, Throughput)]  # type: ignore[attr-defined]
        skipped = getattr(trainer.datamodule, "skipped", {})  # type: ignore[attr-defined]
        summary = {
            **metrics,
            "steps": trainer.global_step,
            "parameters": task.model.num_parameters(),
            "tokens_per_sample": task.model.modality.tokens_per_sample(),
            "tokens_per_second": round(rates[0]) if rates and rates[0] else None,
            "seconds": round(time.time() - self._begun, 1),
            "peak_memory_gb": round(peak_memory_gb(), 2),
            "threads": torch.get_num_threads(),
            "skipped_samples": sum(skipped.values()),
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def _predictions(self, trainer: pl.Trainer, task: Any, names: list[str]) -> None:
        index, label, probability = (torch.cat(column) for column in zip(*task.test_rows, strict=True))
        predicted = probability.argmax(1)
        wrong = (predicted != label).nonzero().flatten().tolist()[: self.shown // 2]
        right = (predicted == label).nonzero().flatten().tolist()[: self.shown - len(wrong)]
        wanted = {int(index[i]): i for i in wrong + right}
        images: dict[int, Tensor] = {}
        for batch in trainer.datamodule.test_dataloader():  # type: ignore[attr-defined]
            for number, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                if number in wanted:
                    images[number] = image
            if len(images) == len(wanted):
                break
        chosen = [(number, i) for number, i in wanted.items() if number in images]
        captions = [
            (
                f"{names[int(label[i])]}\nread as {names[int(predicted[i])]} ({float(probability[i].max()):.2f})",
                bool(predicted[i] == label[i]),
            )
            for _, i in chosen
        ]
        draw_predictions([images[n] for n, _ in chosen], captions, self.folder / "predictions.png")
