"""Classification: one label a sequence."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassConfusionMatrix

from mmlong.backbone import BackboneConfig
from mmlong.tasks.base import Task
from mmlong.tasks.classify_report import ClassifyReport
from mmlong.training.optim import OptimConfig


class ClassifyTask(Task):
    """Cross-entropy training of a classifier, with accuracy, balanced accuracy and area under the ROC curve.

    Args:
        modality, backbone, head, optim, compile, data_info: see :class:`mmlong.tasks.base.Task`.
        class_weights: ``balanced`` weighs each class by its inverse frequency in training.
        label_smoothing: share of the target spread over all classes.
    """

    def __init__(
        self,
        modality: dict[str, Any],
        backbone: BackboneConfig,
        head: dict[str, Any] | None = None,
        optim: OptimConfig | None = None,
        compile: bool = False,
        class_weights: Literal["none", "balanced"] = "none",
        label_smoothing: float = 0.0,
        data_info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(modality, backbone, head or {"name": "classify"}, optim, compile, data_info)
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.weights: Tensor | None = None
        classes = int(self.model.config["head"]["num_classes"])
        self.num_classes = classes
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "balanced_accuracy": MulticlassAccuracy(classes, average="macro"),
                "auc": MulticlassAUROC(classes),
            }
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.confusion = MulticlassConfusionMatrix(classes)
        self.confusion_counts = torch.zeros(classes, classes, dtype=torch.long)
        self.test_rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def configure_callbacks(self) -> list[pl.Callback]:
        """The pictures of a test, beside the base's."""
        return [*super().configure_callbacks(), ClassifyReport()]

    def setup(self, stage: str) -> None:
        """Take the class weights from the packed training data."""
        super().setup(stage)
        if self.class_weights == "balanced" and stage == "fit":
            self.weights = self.trainer.datamodule.class_weights  # type: ignore[attr-defined]

    def forward(self, raw: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Raw tensors to logits ``(B, num_classes)``."""
        tokens, layout = self.model.encode(raw, lengths)
        return self.model(tokens, None, layout)[0].float()

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the samples that count; 0 if none does."""
        weights = None if self.weights is None else self.weights.to(logits)
        each = F.cross_entropy(logits, label, weight=weights, label_smoothing=self.label_smoothing, reduction="none")
        share = counts.to(logits) if weights is None else counts.to(logits) * weights[label]
        return torch.where(counts, each, 0).sum() / share.sum().clamp_min(torch.finfo(logits.dtype).tiny)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step; a sample of weight 0 (a skipped one) does not count."""
        keep, label = self.counted(batch), batch["label"]
        logits = self(batch["raw"], batch.get("lengths"))
        loss = self.loss(logits, label, keep)
        count = int(keep.sum())
        right = ((logits.argmax(-1) == label) & keep).sum() / max(count, 1)
        self.log("train/loss", loss, prog_bar=True, batch_size=count)
        self.log("train/accuracy", right, batch_size=count)
        return loss

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection, stage: str) -> Tensor:
        logits, keep = self(batch["raw"], batch.get("lengths")), self.counted(batch)
        metrics.update(logits[keep], batch["label"][keep])
        # The plain loss, so that runs with other weights or smoothing compare.
        count = int(keep.sum())
        loss = F.cross_entropy(logits[keep], batch["label"][keep], reduction="sum") / max(count, 1)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        return logits

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, self.val_metrics, "val")

    def on_validation_epoch_end(self) -> None:
        """Metrics over every sample once."""
        values = self.val_metrics.compute()
        self.log("val/accuracy", values.pop("val/accuracy"), prog_bar=True)
        self.log_dict(values)
        self.val_metrics.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch and keep what the pictures need."""
        logits, keep = self._evaluate(batch, self.test_metrics, "test"), self.counted(batch)
        self.confusion.update(logits[keep], batch["label"][keep])
        self.test_rows.append((batch["index"][keep].cpu(), batch["label"][keep].cpu(), logits[keep].softmax(-1).cpu()))

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self.test_rows.clear()
        self.confusion.reset()

    def on_test_epoch_end(self) -> None:
        """Metrics over every sample once."""
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()
        self.confusion_counts = self.confusion.compute().cpu()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Sample ids, labels and class probabilities of the samples that count."""
        keep = self.counted(batch)
        probability = torch.softmax(self(batch["raw"], batch.get("lengths")), -1)
        return {"index": batch["index"][keep], "label": batch["label"][keep], "probability": probability[keep]}
