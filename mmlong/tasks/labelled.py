"""What the objectives with something to learn of each sample share: a prediction, the head's loss over the samples that count, and metrics over a whole split.

A subclass says which key of the batch holds the target, which head it takes unless told, and its metrics; :class:`~mmlong.tasks.classify.ClassifyTask`,
:class:`~mmlong.tasks.multilabel.MultiLabelTask`, :class:`~mmlong.tasks.tag.TagTask` and :class:`~mmlong.tasks.regress.RegressTask` do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from mmlong.backbone import BackboneConfig
from mmlong.layout import Layout
from mmlong.tasks.base import Task
from mmlong.training.optim import OptimConfig


class LabelledTask(Task):
    """Base of the objectives with targets.

    Args:
        modality, backbone, optim, compile, data_info, backbone_from, freeze_backbone: see :class:`mmlong.tasks.base.Task`.
        head: likewise; left out, ``head_name``.

    Attributes:
        head_name: the head taken unless told.
        target_key: where a batch has the target.
        shown: the metric that the progress display shows.
    """

    head_name = ""
    target_key = "label"
    shown = "accuracy"

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
        super().__init__(
            modality, backbone, {"name": self.head_name, **(head or {})}, optim, compile, data_info, backbone_from,
            freeze_backbone,
        )  # fmt: skip
        metrics = MetricCollection(self.metrics())
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def metrics(self) -> dict[str, Metric | MetricCollection]:
        """The metrics of evaluation by name."""
        raise TypeError(f"{type(self).__name__} does not define metrics()")

    def forward(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> Tensor:
        """Raw tensors to the head's prediction."""
        return self._predict(*self.model.encode(raw, lengths, resets))

    def _predict(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.model(tokens, None, layout)[0].float()

    def target(self, batch: dict[str, Tensor], layout: Layout, length: int) -> Tensor:
        """The target of a batch of ``length`` tokens under ``layout``, rows first.

        Raises:
            ValueError: the batch has none.
        """
        if self.target_key not in batch:
            raise ValueError(
                f"{type(self).__name__} learns batch[{self.target_key!r}], and the data has only {', '.join(sorted(batch))}: "
                "pack it with labels, or train without (AutoregressTask, MaskedTask)"
            )
        return batch[self.target_key]

    def predicted(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The prediction and the target of a batch."""
        tokens, layout = self.encode(batch)
        return self._predict(tokens, layout), self.target(batch, layout, tokens.shape[1])

    def loss(self, prediction: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        """The head's loss, averaged over what the samples that count predict; 0 if none does."""
        total, count = self.model.head.loss(prediction[counts], target[counts])
        return total / count.clamp_min(1)

    def training_measures(self, prediction: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """What else to log of a step of training, by name."""
        return {}

    def measure(self, metrics: MetricCollection, prediction: Tensor, target: Tensor) -> None:
        """Count predictions and targets of samples that count."""
        metrics.update(prediction, target)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step; a sample of weight 0 (a skipped one) does not count."""
        keep = self.counted(batch)
        with self.with_own_losses() as own:
            prediction, target = self.predicted(batch)
        loss = self.loss(prediction, target, keep)
        count = int(keep.sum())
        self.log("train/loss", loss, prog_bar=True, batch_size=count)
        for name, value in self.training_measures(prediction.detach(), target, keep).items():
            self.log(f"train/{name}", value, batch_size=count)
        return sum(own, loss)

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection, stage: str) -> Tensor:
        keep = self.counted(batch)
        prediction, target = self.predicted(batch)
        self.measure(metrics, prediction[keep], target[keep])
        # The head's own loss, so that runs trained with other weights or smoothing compare.
        total, count = self.model.head.loss(prediction[keep], target[keep])
        self.log(
            f"{stage}/loss", total / count.clamp_min(1), on_step=False, on_epoch=True, batch_size=int(count), sync_dist=True
        )  # fmt: skip
        return prediction

    def _report(self, metrics: MetricCollection) -> None:
        for name, value in metrics.compute().items():
            self.log(name, value.float().mean(), prog_bar=name == f"val/{self.shown}")
        metrics.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, self.val_metrics, "val")

    def on_validation_epoch_end(self) -> None:
        """Metrics over every sample once."""
        self._report(self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, self.test_metrics, "test")

    def on_test_epoch_end(self) -> None:
        """Metrics over every sample once."""
        self._report(self.test_metrics)
