"""Regression: a few numbers for each sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, PearsonCorrCoef

from mmlong.backbone import BackboneConfig
from mmlong.tasks.labelled import LabelledTask
from mmlong.training.optim import OptimConfig


class RegressTask(LabelledTask):
    """The head's error (mean squared unless told), with mean squared and absolute error and Pearson's correlation, the last averaged over the numbers.

    ``batch["target"]`` is float ``(B, K)``, in units that make K errors comparable (they are summed). K is the data's ``num_targets`` (in its ``info()``), else the head's
    ``num_classes``, else 1. For the arguments see :class:`mmlong.tasks.labelled.LabelledTask`.
    """

    head_name = "regress"
    target_key = "target"
    shown = "mse"

    def __init__(
        self,
        modality: dict[str, Any],
        backbone: BackboneConfig,
        head: dict[str, Any] | None = None,
        optim: OptimConfig | None = None,
        compile: bool = False,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        info = dict(data_info or {})
        # What a head predicts is timm's num_classes, and here they are numbers; classes that the data may have besides are not meant.
        info["num_classes"] = info.get("num_targets", 1)
        super().__init__(modality, backbone, head, optim, compile, info, backbone_from, freeze_backbone)

    def metrics(self) -> dict[str, Metric | MetricCollection]:
        """Errors over all numbers, and correlation number by number."""
        numbers = int(self.model.config["head"]["num_classes"])
        return {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "pearson": PearsonCorrCoef(num_outputs=numbers)}

    def measure(self, metrics: MetricCollection, prediction: Tensor, target: Tensor) -> None:
        """Count numbers."""
        metrics.update(prediction.contiguous(), target.to(prediction.dtype).contiguous())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Sample ids and predicted numbers ``(B, K)``."""
        keep = self.counted(batch)
        return {"index": batch["index"][keep], "prediction": self._predict(*self.encode(batch))[keep]}
