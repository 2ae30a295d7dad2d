"""Classification: one label a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassConfusionMatrix

from mmlong.backbone import BackboneConfig
from mmlong.tasks.classify_report import ClassifyReport
from mmlong.tasks.labelled import LabelledTask
from mmlong.training.optim import OptimConfig


class ClassifyTask(LabelledTask):
    """Cross-entropy training of a classifier, with accuracy, balanced accuracy and area under the ROC curve.

    Args:
        modality, backbone, head, optim, compile, data_info, backbone_from, freeze_backbone: see :class:`mmlong.tasks.base.Task`.
        class_weights: ``balanced`` weighs each class by its inverse frequency in training.
        label_smoothing: share of the target spread over all classes.
    """

    head_name = "classify"

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
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        if data_info is not None and "num_classes" not in {**data_info, **(head or {})}:
            raise ValueError(
                f"{type(self).__name__} learns classes, and the data has none: pack it with labels (one sub-folder a class, or --labels TABLE), or train without (`mmlong recipes '*_ar'`)"
            )
        super().__init__(modality, backbone, head, optim, compile, data_info, backbone_from, freeze_backbone)
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.weights: Tensor | None = None
        self.confusion = MulticlassConfusionMatrix(self.num_classes)
        self.confusion_counts = torch.zeros(self.num_classes, self.num_classes, dtype=torch.long)
        self.test_rows: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def num_classes(self) -> int:
        """How many classes."""
        return int(self.model.config["head"]["num_classes"])

    def metrics(self) -> dict[str, Metric | MetricCollection]:
        """Accuracy over samples and over classes, and area under the ROC curve."""
        classes = self.num_classes
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "balanced_accuracy": MulticlassAccuracy(classes, average="macro"),
            "auc": MulticlassAUROC(classes),
        }

    def configure_callbacks(self) -> list[pl.Callback]:
        """The pictures of a test, beside the base's."""
        return [*super().configure_callbacks(), ClassifyReport()]

    def setup(self, stage: str) -> None:
        """Take the class weights from the packed training data."""
        super().setup(stage)
        if self.class_weights == "balanced" and stage == "fit":
            self.weights = self.trainer.datamodule.class_weights  # type: ignore[attr-defined]

    def loss(self, prediction: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the samples that count; 0 if none does."""
        weights = None if self.weights is None else self.weights.to(prediction)
        each = F.cross_entropy(
            prediction, target, weight=weights, label_smoothing=self.label_smoothing, reduction="none"
        )
        share = counts.to(prediction) if weights is None else counts.to(prediction) * weights[target]
        return torch.where(counts, each, 0).sum() / share.sum().clamp_min(torch.finfo(prediction.dtype).tiny)

    def measure(self, metrics: MetricCollection, prediction: Tensor, target: Tensor) -> None:
        """Count chances, not logits: torchmetrics takes logits that happen to lie between 0 and 1 for chances."""
        metrics.update(prediction.softmax(-1), target)

    def training_measures(self, prediction: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """The step's accuracy."""
        return {"accuracy": ((prediction.argmax(-1) == target) & counts).sum() / counts.sum().clamp_min(1)}

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
        super().on_test_epoch_end()
        self.confusion_counts = self.confusion.compute().cpu()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Sample ids, labels and class probabilities of the samples that count."""
        keep = self.counted(batch)
        probability = torch.softmax(self._predict(*self.encode(batch)), -1)
        return {"index": batch["index"][keep], "label": batch["label"][keep], "probability": probability[keep]}

    def prediction_rows(self, predicted: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """``truth`` and ``prediction`` by name, and the ``probability`` of the prediction."""
        names = self.class_names or [str(number) for number in range(self.num_classes)]
        chance, guess = predicted["probability"].max(-1)
        for index, true, said, sure in zip(
            predicted["index"].tolist(), predicted["label"].tolist(), guess.tolist(), chance.tolist(), strict=True
        ):
            yield {"index": index, "truth": names[true], "prediction": names[said], "probability": f"{sure:.6f}"}
