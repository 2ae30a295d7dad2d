"""Several labels of a sequence at once, each there or not: the factors bound to a stretch of DNA, the sounds in a recording."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MultilabelAccuracy, MultilabelAUROC, MultilabelF1Score

from mmlong.tasks.labelled import LabelledTask


class MultiLabelTask(LabelledTask):
    """Binary cross-entropy of every label, with accuracy, F1 and area under the ROC curve, each the mean over labels.

    ``batch["label"]`` is ``(B, K)`` of 0 and 1; K is the data's ``num_classes`` or the head's. For the arguments see :class:`mmlong.tasks.labelled.LabelledTask`.
    """

    head_name = "multilabel"

    def metrics(self) -> dict[str, Metric | MetricCollection]:
        """Means over labels."""
        labels = int(self.model.config["head"]["num_classes"])
        return {"accuracy": MultilabelAccuracy(labels), "f1": MultilabelF1Score(labels), "auc": MultilabelAUROC(labels)}

    def measure(self, metrics: MetricCollection, prediction: Tensor, target: Tensor) -> None:
        """Count chances, not logits: torchmetrics takes logits that happen to lie between 0 and 1 for chances."""
        metrics.update(prediction.sigmoid(), target.long())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Sample ids and the chance of every label ``(B, K)``, of the samples that count."""
        keep = self.counted(batch)
        return {"index": batch["index"][keep], "prediction": self._predict(*self.encode(batch))[keep].sigmoid()}

    def value_names(self, count: int) -> list[str]:
        """The labels' names, where the data tells them."""
        return self.class_names or super().value_names(count)
