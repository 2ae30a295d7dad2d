"""Masked training: hide some tokens and predict them from both sides. BERT's single tokens and spans, for codes and for real values.

Codes are predicted as a distribution, and the loss is in bits per chosen token; real tokens (pixels, samples of sound) are predicted as numbers, and the loss is the
head's error per chosen token. Only chosen tokens count, and only valid tokens are chosen: nothing at padding, in a skipped sample or in a filler of evaluation.

In training the choice is drawn anew at every step, from torch's global generator, so a resumed run draws what the uninterrupted one would have drawn. In evaluation it is a pure
function of the sample's index, so runs and epochs are compared on the same tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.models import MaskedModel
from mmlong.tasks.base import Task
from mmlong.tasks.masking import HIDDEN, REPLACED, Masking, draw_fates, replacements
from mmlong.training.optim import OptimConfig
from mmlong.training.rng import sample_generators, step_generator

_PURPOSE = 1


class MaskedTask(Task):
    """Prediction of chosen tokens from the others.

    Metrics: ``bits`` (per chosen token) and ``accuracy`` for codes, ``error`` (mean squared, of the modality's own numbers) for real values, and ``loss``.

    Args:
        modality, optim, compile, data_info: see :class:`mmlong.tasks.base.Task`.
        backbone: likewise; it sees both sides (direction ``alternate`` or ``both``) and keeps every token (no ``pool``).
        head: ``{name: ..., option: ...}``; left out, ``categorical`` for codes and ``regress_tokens`` for real values.
        masking: which tokens are chosen and what becomes of them.
    """

    kind = "masked"

    def __init__(
        self,
        modality: dict[str, Any],
        backbone: BackboneConfig,
        head: dict[str, Any] | None = None,
        optim: OptimConfig | None = None,
        compile: bool = False,
        masking: Masking | None = None,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        info = {key: value for key, value in (data_info or {}).items() if key == "modality"}
        super().__init__(modality, backbone, head or {}, optim, compile, info, backbone_from, freeze_backbone)
        self.masking = masking or Masking()

    def predicted(
        self, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the model says of the chosen tokens of a batch.

        Args:
            batch: see :mod:`mmlong.tasks.base`.
            generators: one a row, on the CPU.

        Returns:
            ``(prediction (1, N, ...), target (1, N, ...), loss, count)`` of the N chosen tokens; loss and count as the head's.
        """
        tokens, layout = self.encode(batch)
        rows, width = tokens.shape[:2]
        lengths = [width] * rows if layout.lengths is None else layout.lengths.tolist()
        lengths = [n if counts else 0 for n, counts in zip(lengths, self.counted(batch).tolist(), strict=True)]
        fates = draw_fates(self.masking, lengths, width, generators).to(tokens.device)
        others = replacements(tokens, lengths, self.model.modality.codes, generators)
        swapped = fates == REPLACED
        seen = torch.where(swapped if tokens.ndim == 2 else swapped[..., None], others, tokens)
        model = self.model
        assert isinstance(model, MaskedModel)
        x, _ = model.forward_features(seen, None, layout, fates == HIDDEN)
        chosen = fates > 0
        # As one row: the head predicts token by token, and the rest need not be predicted at all.
        prediction, target = model.forward_head(x[chosen][None]), tokens[chosen][None]
        return prediction, target, *model.head.loss(prediction, target)

    def _measured(self, batch: dict[str, Tensor], generators: list[torch.Generator], stage: str) -> Tensor:
        prediction, target, loss, count = self.predicted(batch, generators)
        loss = loss / count.clamp_min(1)
        found: dict[str, Tensor] = {}
        if self.model.modality.codes is not None:
            loss = loss / math.log(2)
            right = (prediction.detach().argmax(-1) == target).sum()
            found = {"bits": loss, "accuracy": right / max(target.numel(), 1)}
        else:
            error = (prediction.detach().float() - target.float()).square()
            found = {"error": error.sum() / max(error.numel(), 1)}
        evaluating = stage != "train"
        for name, value in {"loss": loss, **found}.items():
            self.log(
                f"{stage}/{name}", value, prog_bar=name == "loss", batch_size=target.shape[1], on_step=not evaluating,
                on_epoch=evaluating, sync_dist=evaluating,
            )  # fmt: skip
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss, in bits for codes."""
        draw = step_generator(self.global_rank)
        with self.with_own_losses() as own:
            loss = self._measured(batch, [draw] * batch["raw"].shape[0], "train")
        # In the loss's unit.
        return sum(own, torch.zeros_like(loss)) / (1 if self.model.modality.codes is None else math.log(2)) + loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._measured(batch, sample_generators(batch["index"], _PURPOSE), "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._measured(batch, sample_generators(batch["index"], _PURPOSE), "test")
