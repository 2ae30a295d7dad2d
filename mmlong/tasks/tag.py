"""Tagging: a label for every token. Exons of a gene, phonemes of a recording, the object that a pixel belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mmlong.backbone import BackboneConfig
from mmlong.heads import TagHead
from mmlong.layout import Layout, scan_order
from mmlong.tasks.labelled import LabelledTask
from mmlong.training.optim import OptimConfig


class TagTask(LabelledTask):
    """Cross-entropy of every token's label, with accuracy over tokens and F1 averaged over labels.

    ``batch["label"]`` is int64 ``(B, L)``, padded like the tokens, -100 where a token has no label; or of the grid's shape, ``(B, H, W)`` for an image, and is then put in the order
    of the scan. K labels: the data's ``num_classes`` or the head's. The backbone keeps every token (no ``pool``); with direction ``causal`` a label is told from the past alone.

    For the arguments see :class:`mmlong.tasks.labelled.LabelledTask`.

    Raises:
        ValueError: the backbone pools.
    """

    head_name = "tag"

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
        super().__init__(modality, backbone, head, optim, compile, data_info, backbone_from, freeze_backbone)
        if not self.model.backbone.per_token:
            raise ValueError(
                f"tagging labels every token, and this backbone {self.model.backbone.instead}: leave backbone.pool empty, and perceiver out of backbone.parts"
            )

    @property
    def ignored(self) -> int:
        """The label that counts for nothing."""
        head = self.model.head
        assert isinstance(head, TagHead)
        return head.ignored

    def metrics(self) -> dict[str, Metric | MetricCollection]:
        """Over labelled tokens."""
        classes = int(self.model.config["head"]["num_classes"])
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=self.ignored),
            "f1": MulticlassF1Score(classes, average="macro", ignore_index=self.ignored),
        }

    def target(self, batch: dict[str, Tensor], layout: Layout, length: int) -> Tensor:
        """Labels ``(B, L)`` in the order of the tokens, nothing at padding.

        Raises:
            ValueError: there are none, or not one a token.
        """
        label = super().target(batch, layout, length)
        if layout.grid is not None and tuple(label.shape[1:]) == layout.grid and label.ndim > 2:
            label = label.flatten(1)[:, scan_order(layout.grid, layout.order).to(label.device)]
        if label.ndim != 2 or label.shape[1] != length:
            raise ValueError(
                f"tagging takes one label a token, (B, {length}), got {tuple(label.shape)}: {self.model.modality.unit}s are the tokens here"
            )
        valid = layout.valid(length)
        return label if valid is None else torch.where(valid, label, self.ignored)

    def measure(self, metrics: MetricCollection, prediction: Tensor, target: Tensor) -> None:
        """Count tokens, not rows."""
        metrics.update(prediction.flatten(0, 1), target.flatten())

    def training_measures(self, prediction: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """The step's accuracy over labelled tokens."""
        labelled = (target != self.ignored) & counts[:, None]
        return {"accuracy": ((prediction.argmax(-1) == target) & labelled).sum() / labelled.sum().clamp_min(1)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Sample ids, lengths in tokens, and the likeliest label of every token."""
        keep = self.counted(batch)
        tokens, layout = self.encode(batch)
        said = self._predict(tokens, layout).argmax(-1)
        lengths = torch.full_like(batch["index"], said.shape[1]) if layout.lengths is None else layout.lengths
        return {"index": batch["index"][keep], "lengths": lengths[keep], "tags": said[keep]}

    def prediction_rows(self, predicted: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """``tags``: the names of a sample's tokens' labels, in order, with blanks between them."""
        classes = int(self.model.config["head"]["num_classes"])
        names = self.class_names or [str(number) for number in range(classes)]
        for index, length, tags in zip(
            predicted["index"].tolist(), predicted["lengths"].tolist(), predicted["tags"].tolist(), strict=True
        ):
            yield {"index": index, "tags": " ".join(names[tag] for tag in tags[:length])}
