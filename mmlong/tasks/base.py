"""What every objective shares: a model from plain settings, its optimiser, and checkpoints that know their architecture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from mmlong.backbone import BackboneConfig, Resampled
from mmlong.layout import Layout
from mmlong.mixers.own_loss import mean_own_loss, own_losses
from mmlong.models import Model, build_model
from mmlong.models.lora import add_lora
from mmlong.models.saving import first_lines
from mmlong.training.average import AveragedWeights
from mmlong.training.freeze import freeze, hold_statistics
from mmlong.training.optim import OptimConfig, build_optimizer
from mmlong.training.transfer import (
    CHECKPOINT_CONFIG,
    FREE,
    ArchitectureMismatchError,
    differences,
    load_backbone,
    with_defaults,
)

__all__ = ["ArchitectureMismatchError", "Task"]

TRAINED = "mmlong_trained"
"""Where a checkpoint keeps what of the model was trained, as JSON: ``freeze`` and ``lora`` of the optimiser's settings."""
SHOWN = 64
"""Samples that a modality is shown before training, where it needs any."""


class Task(pl.LightningModule):
    """Base of the objectives.

    Args:
        modality: ``{name: ..., option: ...}``; what the data fixes (size, channels) is filled in from ``data_info``.
        backbone: see :class:`mmlong.backbone.BackboneConfig`.
        head: ``{name: ..., option: ...}``.
        optim: see :class:`mmlong.training.optim.OptimConfig`.
        compile: compile each block with ``torch.compile`` before training.
        data_info: what the datamodule says of itself: ``modality`` (options), ``num_classes``, ``class_names``. The
            command line fills it in.
        backbone_from: begin training with the backbone of another run, of any modality: a run folder, a saved model's folder or a file of weights; see
            :mod:`mmlong.training.transfer`. A run that goes on from a checkpoint has its own weights and does not look.
        freeze_backbone: leave the backbone as it is: for so many steps of training, or (true) throughout.
        model_parts: what else the objective's kind of model has in its configuration.

    Attributes:
        rescale: to evaluate a checkpoint on data of another rate than it was trained at (``modality.rate``): ``whole``, by the quotient of the two, and refused if a part of the model counts in tokens; ``partly``,
            what can be; or a factor, by which the steps are multiplied whatever the rates: 1 leaves them as they are. See :meth:`mmlong.models.Model.resample`.
        resampled: what became of it; ``None`` where nothing was changed.
    """

    kind = "plain"
    """Which kind of model the objective trains; see :mod:`mmlong.models`."""

    def __init__(
        self,
        modality: dict[str, Any],
        backbone: BackboneConfig,
        head: dict[str, Any],
        optim: OptimConfig | None = None,
        compile: bool = False,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
        model_parts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if freeze_backbone < 0:
            raise ValueError(f"model.freeze_backbone is {freeze_backbone}; it is true, false or a number of steps")
        info = data_info or {}
        self.backbone_from = backbone_from
        self.freeze_backbone = freeze_backbone
        self._restored = self._fitting = False
        self._meeting: tuple[float, int | None] | None = None
        self.rescale: float | Literal["whole", "partly"] = "whole"
        self.resampled: Resampled | None = None
        self.optim = optim or OptimConfig()
        self.compile_blocks = compile
        kind = {} if self.kind == "plain" else {"kind": self.kind}
        parts = self.both_sides(modality, head, info)
        self.model: Model = build_model({**kind, **parts, "backbone": dict(vars(backbone)), **(model_parts or {})})
        if self.optim.lora is not None:
            if freeze_backbone is True:
                raise ValueError(
                    "model.freeze_backbone would freeze the adapters of model.optim.lora too, which hold the backbone as it is already: leave one of them out"
                )
            add_lora(self.model, self.optim.lora)
        self.class_names = list(info.get("class_names", []))
        if self.model.config.get("head", {}).get("num_classes") == len(self.class_names):
            self.model.class_names = self.class_names

    def both_sides(self, modality: dict[str, Any], head: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """What the model's configuration has beside its backbone, with what the data fixes."""
        return {
            "modality": {**info.get("modality", {}), **modality},
            "head": {**({"num_classes": info["num_classes"]} if "num_classes" in info else {}), **head},
        }

    def tokens_in(self, batch: dict[str, Tensor]) -> int:
        """Tokens that a batch holds, for throughput."""
        return self.model.modality.count_tokens(batch["raw"], batch.get("lengths"))

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Layout]:
        """The tokens and layout of a batch: keys ``raw``, and ``lengths`` and ``resets`` where the data has them."""
        return self.model.encode(batch["raw"], batch.get("lengths"), batch.get("resets"))

    @contextmanager
    def with_own_losses(self) -> Iterator[list[Tensor]]:
        """Around the model in a training step: what its mixers add to the loss, in nats, one scalar or none, is in the list afterwards."""
        added: list[Tensor] = []
        if not (self.training and self.model.backbone.has_own_loss):
            yield added
            return
        with own_losses() as found:
            yield added
        if (own := mean_own_loss(found)) is not None:
            self.log("train/own_loss", own.detach(), batch_size=1)
            added.append(own)

    def setup(self, stage: str) -> None:
        """Before training: freeze what is to stay as it is, and compile the backbone's blocks, each when asked to."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        self._restored = False
        self.hold()
        if self.freeze_backbone is True:
            rank_zero_only(print)("the backbone is frozen", flush=True)
        if self.optim.freeze or self.optim.lora is not None:
            total, trained = sum(p.numel() for p in self.model.parameters()), self.model.num_parameters()
            rank_zero_only(print)(f"{trained:,} of {total:,} parameters train, the others are frozen", flush=True)
        if self.compile_blocks:
            for block in self.model.backbone.blocks():
                block.compile()

    def hold(self) -> None:
        """Freeze what training is to leave as it is: the backbone, and what ``optim.freeze`` names."""
        if self.freeze_backbone is True:
            self.model.backbone.requires_grad_(False)
        freeze(self.model, self.optim.freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what keeps statistics among frozen weights (:mod:`mmlong.training.freeze`)."""
        super().train(mode)
        if mode:
            hold_statistics(self.model)
        return self

    def on_fit_start(self) -> None:
        """Show the modality training data where it needs some, and take another run's backbone, when asked to.

        A run that goes on has loaded its own weights by now, and needs neither.
        """
        self.show_data(getattr(self.trainer, "datamodule", None))
        if self.backbone_from is not None and not self._restored:
            file = load_backbone(self.model.backbone, self.backbone_from)
            rank_zero_only(print)(f"the backbone begins with the weights of {file}", flush=True)

    def show_data(self, data: Any) -> None:
        """Give the modality what it takes from training data."""
        if not self.model.modality.initialised and hasattr(data, "samples"):
            rows = self.sample_rows(data)
            self.model.modality.initialise(rows["raw"][rows["weight"] > 0])

    def sample_rows(self, data: Any) -> dict[str, Any]:
        """A batch of samples, the same on every rank, from all over the training data, and without augmentation."""
        samples = data.samples("train", False)
        places = range(0, len(samples), -(-len(samples) // SHOWN))
        return samples.fetch([(0, place, 1.0) for place in places])[0]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hold the backbone for its first steps: an optimiser passes over parameters without a gradient."""
        # Computed and dropped, not switched off: DDP waits for every gradient that it was told of.
        if self.global_step < self.freeze_backbone and self.freeze_backbone is not True:
            self.model.backbone.zero_grad(set_to_none=True)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule over ``trainer.max_steps``."""
        steps = self.trainer.max_steps
        if steps < 1:
            raise ValueError("set trainer.max_steps: the learning-rate schedule needs to know how long training is")
        optimizer, schedule = build_optimizer(self.model, self.optim, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[pl.Callback]:
        """Averaged weights, when asked for."""
        return [AveragedWeights(self.optim.ema)] if self.optim.ema else []

    def _trained(self) -> dict[str, Any]:
        """What of the model is trained, as plain values; a dropout may change from run to run."""
        lora = {} if self.optim.lora is None else dataclasses.asdict(self.optim.lora)
        lora.pop("dropout", None)
        return {"freeze": list(self.optim.freeze), "lora": lora}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The architecture travels with the weights, as plain JSON."""
        checkpoint[CHECKPOINT_CONFIG] = json.dumps(self.model.config)
        checkpoint[TRAINED] = json.dumps(self._trained())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another architecture, and say which settings differ.

        Raises:
            ArchitectureMismatchError: naming up to five settings, the checkpoint's value and this run's.
        """
        self._restored = True
        free = (*(f"backbone.{key}" for key in FREE), "head.dropout")
        there = json.loads(checkpoint.get(CHECKPOINT_CONFIG, "{}"))
        self._meeting = None
        if not self._fitting:
            # A rate that is not the trained one is met by :meth:`hear_rate`.
            free = (*free, "modality.rate")
            self._meeting = self._meet(there)
        there["backbone"] = with_defaults(there.get("backbone", {}))
        if differ := differences(there, self.model.config, free, "the checkpoint"):
            raise ArchitectureMismatchError(
                f"the checkpoint is of another architecture:\n  {first_lines(differ)}\n"
                "use the configuration it was trained with (config.yaml in its run folder), or train anew"
            )
        trained = json.loads(checkpoint.get(TRAINED, "{}"))
        trained = {"freeze": [], "lora": {}, **trained}
        # To evaluate, only adapters must agree.
        free = () if self._fitting else ("freeze",)
        if differ := differences(trained, self._trained(), free, "the checkpoint"):
            raise ArchitectureMismatchError(
                f"the checkpoint is of a run that trained other parts of the model (model.optim):\n  {first_lines(differ)}\n"
                "go on with the settings it has (config.yaml in its run folder), or begin anew with its backbone: --model.backbone_from RUN"
            )

    def _meet(self, there: dict[str, Any]) -> tuple[float, int | None] | None:
        """By what the steps of a checkpoint's mixers are to be multiplied, and the rate that it was trained at; ``None`` where its rate is the data's and nobody told otherwise."""
        before, now = (config.get("modality", {}).get("rate") for config in (there, self.model.config))
        factor = before / now if before and now else 1.0
        if not isinstance(self.rescale, str):
            factor = float(self.rescale)
        return None if factor == 1 and before == now else (factor, before)

    def hear_rate(self) -> None:
        """Make a model that was read from a checkpoint hear the data's rate, where that is another than it was trained at."""
        meet, self._meeting = self._meeting, None
        if meet is None:
            return
        (factor, before), now = meet, self.model.config.get("modality", {}).get("rate")
        done = self.resampled = self.model.resample(factor, strict=self.rescale != "partly", rate=now)
        told = "" if before is None or now is None else f"trained at {before:,} Hz, heard at {now:,} Hz: "
        told += f"the steps of {len(done.changed)} mixers times {factor:g}" if done.changed else "steps as they were"
        told += "".join(f"\n  left as it was: {name} ({why})" for name, why in done.left.items())
        rank_zero_only(print)(told, flush=True)

    def on_validation_start(self) -> None:
        """See :meth:`hear_rate`."""
        self.hear_rate()

    def on_test_start(self) -> None:
        """See :meth:`hear_rate`."""
        self.hear_rate()

    def on_predict_start(self) -> None:
        """See :meth:`hear_rate`."""
        self.hear_rate()

    def counted(self, batch: dict[str, Tensor]) -> Tensor:
        """Bool ``(B,)``: samples that count; evaluation is filled up with samples of weight 0."""
        if "weight" in batch:
            return batch["weight"] > 0
        return torch.ones(batch["raw"].shape[0], dtype=torch.bool, device=batch["raw"].device)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``index`` ``(B,)`` of the samples that count, and what the objective says of each: ``prediction`` ``(B, K)`` unless a task says more."""
        raise ValueError(f"{type(self).__name__} says nothing of a sample as a whole, so there is nothing to predict")

    def prediction_rows(self, predicted: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Rows of ``predictions.csv``, by column, from what :meth:`predict_step` gave."""
        for index, values in zip(predicted["index"].tolist(), predicted["prediction"].tolist(), strict=True):
            yield {
                "index": index,
                **{name: f"{value:.6g}" for name, value in zip(self.value_names(len(values)), values, strict=True)},
            }

    def value_names(self, count: int) -> list[str]:
        """Names of the columns of ``count`` predicted numbers."""
        return [f"value{number}" for number in range(count)]
