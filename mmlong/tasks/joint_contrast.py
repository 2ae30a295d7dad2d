"""Contrastive training of pairs: a thing in one modality must be nearer to its partner in another than to all others (CLIP, Radford et al. 2021).

Two towers through one backbone (:class:`mmlong.models.towers.TowersModel`) and the loss of :mod:`mmlong.ops.nt_xent`, whose two views are the two modalities. Batches are those of :class:`mmlong.tasks.JointTask`, with both
modalities in every row. A departure from CLIP: others of the same modality are to be told apart too, and the temperature is fixed.

Where the pairs are of classes (:mod:`mmlong.datamodules.pairs`), another of the same class is counted as an other, which it is not: the loss has a floor then. What is told is ``accuracy`` with labels: how often the nearest of the
other modality, among the whole split, is of the same class, the mean of both ways.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.models.towers import TowersModel
from mmlong.ops.nt_xent import gather_rows, nt_xent
from mmlong.registry import nearest
from mmlong.tasks.base import Task
from mmlong.training.optim import OptimConfig


class JointContrastTask(Task):
    """Contrastive training of two modalities.

    Args:
        modalities: two, ``{NAME: {name: ..., option: ...}}``; what the data fixes is filled in from ``data_info``.
        heads: ``{NAME: {name: ..., option: ...}}``; ``project`` where left out.
        temperature: of the loss.
        backbone, optim, compile, data_info, backbone_from, freeze_backbone: see :class:`mmlong.tasks.base.Task`.

    Raises:
        ValueError: not two modalities, a temperature that is not above 0, or data of other names.
    """

    kind = "towers"

    def __init__(
        self,
        modalities: dict[str, dict[str, Any]],
        backbone: BackboneConfig,
        heads: dict[str, dict[str, Any]] | None = None,
        temperature: float = 0.1,
        optim: OptimConfig | None = None,
        compile: bool = False,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        if len(modalities) != 2 or not temperature > 0:
            raise ValueError(f"two modalities are compared at a temperature above 0, got {', '.join(modalities)} at {temperature}")  # fmt: skip
        super().__init__(modalities, backbone, heads or {}, optim, compile, data_info, backbone_from, freeze_backbone)
        self.names, self.temperature = list(modalities), temperature
        self._seen: list[list[Tensor]] = []

    def both_sides(self, modality: dict[str, Any], head: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """Modalities and heads by name, with what the data fixes of each."""
        fixed = info.get("modalities", {})
        for name in fixed:
            if name not in modality:
                raise ValueError(f"the data has {name!r}{nearest(name, list(modality))}, and model.modalities only {', '.join(modality)}")  # fmt: skip
        return {"modalities": {name: {**fixed.get(name, {}), **own} for name, own in modality.items()}, "heads": head}

    def show_data(self, data: Any) -> None:
        """Give each modality what it takes from training data."""
        assert isinstance(self.model, TowersModel)
        missing = {name: t.modality for name, t in self.model.towers.items() if not t.modality.initialised}
        if missing and hasattr(data, "samples"):
            parts = self.sample_rows(data)["parts"]
            for name, modality in missing.items():
                modality.initialise(parts[name]["raw"])

    def tokens_in(self, batch: dict[str, Any]) -> int:
        """Tokens that a batch holds, for throughput."""
        assert isinstance(self.model, TowersModel)
        towers = self.model.towers
        return sum(
            towers[name].modality.count_tokens(part["raw"], part.get("lengths"))
            for name, part in batch["parts"].items()
        )

    def counted(self, batch: dict[str, Any]) -> Tensor:
        """Bool ``(B,)``: pairs that count."""
        return batch["weight"] > 0 if "weight" in batch else torch.ones_like(batch["index"], dtype=torch.bool)

    def vectors(self, batch: dict[str, Any], pre_logits: bool = False) -> list[Tensor]:
        """Projections ``(B, K)`` of each modality.

        Raises:
            ValueError: a row that has not both.
        """
        parts = batch["parts"]
        if any(name not in parts or "rows" in parts[name] for name in self.names):
            raise ValueError(f"pairs are contrasted: every row must have {' and '.join(self.names)}; batches that alternate are for JointTask")  # fmt: skip
        return [self.model(parts[name]["raw"], parts[name].get("lengths"), name, pre_logits) for name in self.names]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss; a pair of weight 0 is no other."""
        with self.with_own_losses() as own:
            first, second = self.vectors(batch)
        loss = nt_xent(first, second, self.temperature, self.counted(batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=int(self.counted(batch).sum()))
        return sum(own, loss)

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        keep = self.counted(batch)
        first, second = self.vectors(batch)
        loss = nt_xent(first, second, self.temperature, keep)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=int(keep.sum()), sync_dist=True)
        if "label" in batch:
            self._seen.append([first, second, batch["label"], keep.to(torch.uint8)])

    def _report(self, stage: str) -> None:
        if self._seen:
            first, second, label, keep = (gather_rows(torch.cat(part)) for part in zip(*self._seen, strict=True))
            self._seen.clear()
            there = keep.bool()
            found = crossed_accuracy(first[there], second[there], label[there])
            self.log(f"{stage}/accuracy", found, prog_bar=stage == "val")

    def on_validation_epoch_start(self) -> None:
        """Forget an earlier evaluation."""
        self._seen.clear()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Judge the vectors of the whole split."""
        self._report("val")

    def on_test_epoch_start(self) -> None:
        """Forget an earlier evaluation."""
        self._seen.clear()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Judge the vectors of the whole split."""
        self._report("test")


def crossed_accuracy(first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """How often the nearest of the other modality is of the same class, the mean of both ways.

    Args:
        first, second: ``(N, K)``.
        label: int64 ``(N,)``, of both.
    """
    similarity = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    right = [(label[similarity.argmax(axis)] == label).float().mean() for axis in (0, 1)]
    return torch.stack(right).mean()
