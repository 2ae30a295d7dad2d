"""Contrastive training without labels: two views of each thing must be told from all others (SimCLR, Chen et al. 2020).

The views come from the batch's own raw tensors (:mod:`mmlong.tasks.views`, by the kind of data), or from the data: where a batch has ``raw2`` (and ``lengths2``), ``raw`` and
``raw2`` are the two. What is learned is the embedding, the pooled features that the projection head sees; where validation data has labels, it is judged by its
nearest neighbours. In training views are drawn from torch's global generator, so a resumed run draws the same; in evaluation they are a pure function of the sample's index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.ops.nt_xent import gather_rows, neighbour_accuracy, nt_xent
from mmlong.tasks.base import Task
from mmlong.tasks.views import Generators, Viewed, Views
from mmlong.training.optim import OptimConfig
from mmlong.training.rng import sample_generators, step_generator

_PURPOSE = 2


class ContrastTask(Task):
    """NT-Xent training of an embedding.

    Metrics: ``loss`` (it depends on the batch size: more samples are more to be told apart) and, with labels, ``accuracy``: of the nearest neighbours among the split's other samples.

    Args:
        modality, backbone, optim, compile, data_info, backbone_from, freeze_backbone: see :class:`mmlong.tasks.base.Task`.
        head: ``{name: ..., option: ...}``; left out, ``project``.
        views: what may change between views, e.g. ``["crop:0.5", "flip"]``; null for the usual ones of the kind of data, which mirror images.
        temperature: of the loss.
        neighbours: how many vote.

    Raises:
        ValueError: a view that is none, or a temperature or number that is not above 0.
    """

    def __init__(
        self,
        modality: dict[str, Any],
        backbone: BackboneConfig,
        head: dict[str, Any] | None = None,
        optim: OptimConfig | None = None,
        compile: bool = False,
        views: list[str] | None = None,
        temperature: float = 0.1,
        neighbours: int = 20,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        if temperature <= 0 or neighbours < 1:
            raise ValueError(f"model.temperature is {temperature} and model.neighbours {neighbours}; both are above 0")
        info = {key: value for key, value in (data_info or {}).items() if key == "modality"}
        super().__init__(
            modality,
            backbone,
            {"name": "project", **(head or {})},
            optim,
            compile,
            info,
            backbone_from,
            freeze_backbone,
        )
        self.views = views
        self.temperature = temperature
        self.neighbours = neighbours
        if views is not None:
            self._drawn()  # a wrong name is told now
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def _drawn(self) -> Views:
        return Views(self.model.modality.kind, self.views)

    def embed(self, raw: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Raw tensors to embeddings ``(B, D)``: what the projection head pools."""
        tokens, layout = self.model.encode(raw, lengths)
        x, _ = self.model.forward_features(tokens, None, layout)
        return self.model.forward_head(x, self.model.backbone.layout_out(layout, tokens.shape[1]), pre_logits=True)

    def forward(self, raw: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Raw tensors to the projections ``(B, K)`` that the loss compares."""
        tokens, layout = self.model.encode(raw, lengths)
        return self.model(tokens, None, layout)[0]

    def two_views(self, batch: dict[str, Tensor], generators: Generators) -> tuple[Viewed, Viewed]:
        """Two views of each row: ``((raw, lengths), (raw, lengths))``.

        Raises:
            ValueError: several documents in a row, which are not one thing.
        """
        if "resets" in batch:
            raise ValueError(
                "contrastive training takes one document a row, and this data packs several (batch['resets'])"
            )
        raw, lengths = batch["raw"], batch.get("lengths")
        if "raw2" in batch:
            return (raw, lengths), (batch["raw2"], batch.get("lengths2"))
        views = self._drawn()
        return views(raw, lengths, generators), views(raw, lengths, generators)

    def contrast(self, batch: dict[str, Tensor], generators: Generators) -> Tensor:
        """The loss of a batch."""
        (a, a_lengths), (b, b_lengths) = self.two_views(batch, generators)
        if a.shape == b.shape and (a_lengths is None) == (b_lengths is None):
            lengths = None if a_lengths is None or b_lengths is None else torch.cat([a_lengths, b_lengths])
            first, second = self(torch.cat([a, b]), lengths).chunk(2)
        else:
            first, second = self(a, a_lengths), self(b, b_lengths)
        return nt_xent(first, second, self.temperature, self.counted(batch))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss; a sample of weight 0 (a skipped one) is no other."""
        with self.with_own_losses() as own:
            loss = self.contrast(batch, [step_generator(self.global_rank)] * batch["raw"].shape[0])
        self.log("train/loss", loss, prog_bar=True, batch_size=int(self.counted(batch).sum()))
        return sum(own, loss)

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        keep = self.counted(batch)
        loss = self.contrast(batch, sample_generators(batch["index"], _PURPOSE))
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=int(keep.sum()), sync_dist=True)
        if "label" in batch:
            self._seen.append((self.embed(batch["raw"], batch.get("lengths")), batch["label"], keep.to(torch.uint8)))

    def _report(self, stage: str) -> None:
        if self._seen:
            embedding, label, keep = (gather_rows(torch.cat(part)) for part in zip(*self._seen, strict=True))
            self._seen.clear()
            keep = keep.bool()
            accuracy = neighbour_accuracy(embedding[keep], label[keep], self.neighbours)
            self.log(f"{stage}/accuracy", accuracy, prog_bar=stage == "val")

    def on_validation_epoch_start(self) -> None:
        """Forget an earlier evaluation."""
        self._seen.clear()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Judge the embeddings of the whole split."""
        self._report("val")

    def on_test_epoch_start(self) -> None:
        """Forget an earlier evaluation."""
        self._seen.clear()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Judge the embeddings of the whole split."""
        self._report("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Sample ids and embeddings ``(B, D)`` of the samples that count."""
        keep = self.counted(batch)
        return {
            "index": batch["index"][keep],
            "prediction": self.embed(batch["raw"], batch.get("lengths"))[keep].float(),
        }
