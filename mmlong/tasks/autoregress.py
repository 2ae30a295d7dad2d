"""Autoregressive training: the probability of every token given those before it, always reported in bits.

Bits per number of raw data: per dimension of an image, per sample of sound, per nucleotide, per byte (negative log-likelihood / ln 2 / numbers). With ``segment`` the step is taken in pieces
with the state carried: the exact gradient with the activations of one piece, and no full-length logits (see :mod:`mmlong.backbone.segmented`). With ``carry`` it is carried on from
batch to batch of one stream as well (see :mod:`mmlong.tasks.carried`). With ``strategy: sequence_parallel`` each rank takes a piece of every sequence (see :mod:`mmlong.parallel`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.backbone.segmented import check_keep, segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.masked_conv import MaskedConv2d
from mmlong.mixers.own_loss import own_losses, sum_own_loss
from mmlong.models import AutoregressiveModel
from mmlong.parallel import SequenceMesh, layered_loss, piece_bounds, sequence_parallel_loss, take_piece
from mmlong.tasks.autoregress_report import AutoregressReport
from mmlong.tasks.base import Task
from mmlong.tasks.carried import CarriedState, check_bounded
from mmlong.training.optim import OptimConfig

CARRIED = "mmlong_carried"
"""Where a checkpoint keeps the state that is carried."""


def check_rows(model: torch.nn.Module) -> None:
    """Refuse pictures whose rows are not as long as a masked convolution was told: its taps would lie beside the pixels that they mean.

    Raises:
        ValueError: with both lengths.
    """
    modality: Any = model.modality
    widths = {module.width for module in model.modules() if isinstance(module, MaskedConv2d)}
    if modality.kind != "image" or not widths:
        return
    row = modality.tokens_per_sample() // modality.size[0]
    each = row // modality.size[1]  # tokens a pixel: three where every channel is one
    for width in widths - {row}:
        how = (
            f"with a --size of {width // each} columns"
            if width % each == 0
            else f"with --grey and a --size of {width} columns"
        )
        raise ValueError(
            f"masked_conv2d has width {width}, and a row of these pictures is {row} tokens: pack them {how}, "
            f"or set width: {row} in model.backbone.mixers (and model.linear_prediction, where there is one, to offsets of such rows)"
        )


class AutoregressTask(Task):
    """Likelihood training of an autoregressive model.

    Args:
        modality, backbone, optim, compile, data_info, backbone_from, freeze_backbone: see :class:`mmlong.tasks.base.Task`. The backbone's direction is ``causal``.
        head: ``{name: ..., option: ...}``; left out, ``categorical`` for codes and ``logistic_mixture`` for numbers.
        linear_prediction: offsets of tokens that move the means of a mixture linearly; see :mod:`mmlong.models.linear_prediction`.
        linear_each: give each component of the mixture a linear prediction of its own.
        segment: tokens in a piece of a training or evaluation step; null: the whole row at once.
        keep: of the states between pieces, keep every so many-th, or ``sqrt``, and compute the others again: for states that are large or grow.
        truncate: cut the gradient between pieces (truncated back-propagation through time).
        carry: begin each training batch with the state that the one before left, without its gradient; needs ``data.windows: stream`` and ``data.carry: true``. Evaluation begins every
            row from nothing: give it long ones (``data.eval_length``).
        samples: how many samples a test draws from the model and leaves in the run folder; 0: none.
        sample_length: tokens in each (a modality of one fixed size knows its own).
    """

    kind = "autoregressive"
    ranks: SequenceMesh | None = None
    """Where this rank stands, when several share a sequence: the strategy sets it."""

    def __init__(
        self,
        modality: dict[str, Any],
        backbone: BackboneConfig,
        head: dict[str, Any] | None = None,
        optim: OptimConfig | None = None,
        compile: bool = False,
        linear_prediction: list[int] | None = None,
        linear_each: bool = False,
        segment: int | None = None,
        keep: int | Literal["sqrt"] = 1,
        truncate: bool = False,
        carry: bool = False,
        samples: int = 4,
        sample_length: int = 1024,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        if segment is not None and segment < 1:
            raise ValueError(f"model.segment is {segment}; it is a number of tokens, or null for whole rows")
        check_keep(keep, "model.keep")
        if segment is None and (keep != 1 or truncate):
            raise ValueError("model.keep and model.truncate are about what is between segments: set model.segment too")
        info = {key: value for key, value in (data_info or {}).items() if key == "modality"}
        own: dict[str, Any] = {"linear_prediction": list(linear_prediction)} if linear_prediction else {}
        if linear_each:
            own["linear_each"] = True
        super().__init__(
            modality, backbone, head or {}, optim, compile, info, backbone_from, freeze_backbone, model_parts=own
        )
        check_rows(self.model)
        if carry:
            check_bounded(self.model.backbone)
        self.segment, self.keep, self.truncate = segment, keep, truncate
        self.carry, self.carried = carry, CarriedState()
        self._own: Tensor = torch.zeros(())
        self.samples = samples
        self.sample_length = sample_length

    def configure_callbacks(self) -> list[pl.Callback]:
        """Samples at the end of a test, beside the base's."""
        return [*super().configure_callbacks(), *([AutoregressReport()] if self.samples else [])]

    def _step(self, pieces: list[Tensor], state: State, layout: Layout | None) -> tuple[Tensor, State]:
        """Summed nats of one piece. (A module's method and not the model's: DDP sees one forward.)"""
        (tokens,) = pieces
        if not (self.training and self.model.backbone.has_own_loss):
            prediction, state = self.model(tokens, state, layout)
            return self.model.head.loss(prediction, tokens, layout)[0], state
        with own_losses() as found:
            prediction, state = self.model(tokens, state, layout)
        loss = self.model.head.loss(prediction, tokens, layout)[0]
        if (own := sum_own_loss(found)) is not None:
            # A sum over tokens beside one over numbers.
            own = own.to(loss.dtype) * self.model.modality.channels
            self._own = self._own + own.detach()
            loss = loss + own
        return loss, state

    def nats(self, batch: dict[str, Tensor], carry: bool = False) -> tuple[Tensor, Tensor]:
        """``(summed nats, numbers)`` of a batch: what is predicted and how many numbers of raw data that is; rows of weight 0 count nothing.

        With ``carry`` it begins with the state that the batch before left, and leaves its own.
        """
        tokens, layout = self.encode(batch)
        weight = batch.get("weight")
        if weight is not None and (layout.lengths is not None or not bool((weight > 0).all())):
            lengths = torch.full_like(batch["index"], tokens.shape[1]) if layout.lengths is None else layout.lengths
            layout = replace(layout, lengths=torch.where(weight > 0, lengths, 0))
        count = tokens.shape[0] * tokens.shape[1] if layout.lengths is None else layout.lengths.sum()
        numbers = torch.as_tensor(count, device=tokens.device) * self.model.modality.channels
        if self.ranks is not None:
            return self._over_ranks(tokens, layout, self.ranks), numbers
        segment = tokens.shape[1] if self.segment is None else self.segment
        state: State = None
        if carry:
            state, layout = self.carried.before(self.model, tokens, layout, batch.get("continues"))
        total, state = segmented_loss(
            self.model, self._step, [tokens], segment, state, layout, keep=self.keep, truncate=self.truncate
        )
        if carry:
            self.carried.after(state, self.counted(batch))
        return total, numbers

    def _over_ranks(self, tokens: Tensor, layout: Layout, ranks: SequenceMesh) -> Tensor:
        """Summed nats of all pieces, the same on the ranks of a sequence; gradients are left to DDP, which averages over all ranks."""
        pieces, layout_here = take_piece([tokens], layout, ranks.sequence_size, ranks.sequence_rank)
        if ranks.layers:
            start, _ = piece_bounds(tokens.shape[1], ranks.sequence_size, ranks.sequence_rank)
            state = self.generator.state_before(tokens, start, layout) if start else None
            return layered_loss(
                self.model, self.model.backbone, self._step, pieces, ranks.sequence_group, layout_here, state, start
            )
        return sequence_parallel_loss(
            self.model, self._step, pieces, ranks.sequence_group, layout_here, segment=self.segment, keep=self.keep,
            truncate=self.truncate, rows=ranks.rows, reduce="mean",
        )  # fmt: skip

    def _bits(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        self._own = torch.zeros((), device=batch["raw"].device)
        total, numbers = self.nats(batch, self.carry and stage == "train")
        loss = total / numbers.clamp_min(1) / math.log(2)
        evaluating = stage != "train"
        bits = loss
        if not evaluating and self.model.backbone.has_own_loss:
            own = self._own.clone()
            if self.ranks is not None:
                torch.distributed.all_reduce(own, group=self.ranks.sequence_group)
            bits = loss.detach() - own / numbers.clamp_min(1) / math.log(2)
        self.log(
            f"{stage}/bits", bits, prog_bar=True, batch_size=int(numbers), on_step=not evaluating, on_epoch=evaluating,
            sync_dist=evaluating,
        )  # fmt: skip
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss, in bits; with the mixers' own where they have one, which the logged bits are without."""
        loss = self._bits(batch, "train")
        self.log("train/loss", loss, batch_size=1)  # for the curve; the bar shows the bits
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._bits(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self._bits(batch, "test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the state that is carried, of every rank."""
        super().on_save_checkpoint(checkpoint)
        if self.carry and (saved := self.carried.saved()) is not None:
            checkpoint[CARRIED] = saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the state that was carried."""
        super().on_load_checkpoint(checkpoint)
        self.carried.drop()
        if self.carry and CARRIED in checkpoint:
            self.carried.restore(checkpoint[CARRIED], self.trainer.global_rank, self.trainer.world_size)

    @property
    def generator(self) -> AutoregressiveModel:
        """The model, as what it is."""
        assert isinstance(self.model, AutoregressiveModel)
        return self.model
