"""What every objective shares: a model from plain settings, its optimiser, and checkpoints that know their architecture."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.layout import Layout
from mmlong.models import Model, build_model
from mmlong.training.optim import OptimConfig, build_optimizer

_MODEL_KEY = "mmlong_model"


class ArchitectureMismatchError(ValueError):
    """A checkpoint of another architecture than the model that should take it."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys."""
    if isinstance(config, dict):
        return {k: v for key, value in config.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: config}


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
    ) -> None:
        super().__init__()
        info = data_info or {}
        self.optim = optim or OptimConfig()
        self.compile_blocks = compile
        self.model: Model = build_model(
            {
                **({} if self.kind == "plain" else {"kind": self.kind}),
                "modality": {**info.get("modality", {}), **modality},
                "backbone": dict(vars(backbone)),
                "head": {**({"num_classes": info["num_classes"]} if "num_classes" in info else {}), **head},
            }
        )
        self.class_names = list(info.get("class_names", []))

    def tokens_in(self, batch: dict[str, Tensor]) -> int:
        """Tokens that a batch holds, for throughput."""
        length = self.model.modality.tokens_per_sample()
        if length is not None:
            return length * batch["raw"].shape[0]
        return int(batch["lengths"].sum()) if "lengths" in batch else batch["raw"].shape[0] * batch["raw"].shape[-1]

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Layout]:
        """The tokens and layout of a batch: keys ``raw``, and ``lengths`` and ``resets`` where the data has them."""
        return self.model.encode(batch["raw"], batch.get("lengths"), batch.get("resets"))

    def setup(self, stage: str) -> None:
        """Compile the blocks, when asked to."""
        if self.compile_blocks and stage == "fit":
            for block in self.model.backbone.blocks():
                block.compile()

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule over ``trainer.max_steps``."""
        steps = self.trainer.max_steps
        if steps < 1:
            raise ValueError("set trainer.max_steps: the learning-rate schedule needs to know how long training is")
        optimizer, schedule = build_optimizer(self.model, self.optim, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[pl.Callback]:
        """Averaged weights, when asked for."""
        # Buffers are copied: an average of indices is not an index (it rounds 3 down to 2), and fixed features need none.
        return [EMAWeightAveraging(decay=self.optim.ema, use_buffers=False)] if self.optim.ema else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The architecture travels with the weights, as plain JSON."""
        checkpoint[_MODEL_KEY] = json.dumps(self.model.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another architecture, and say which settings differ.

        Raises:
            ArchitectureMismatchError: naming up to five settings, the checkpoint's value and this run's.
        """
        there = flatten(json.loads(checkpoint.get(_MODEL_KEY, "{}")))
        here = flatten(json.loads(json.dumps(self.model.config)))
        # These change how training runs, not which weights there are.
        free = ("backbone.dropout", "backbone.drop_path", "backbone.checkpoint", "head.dropout")
        differ = [
            f"{key}: {there.get(key, 'absent')} in the checkpoint, {here.get(key, 'absent')} here"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key) and key not in free
        ]
        if differ:
            raise ArchitectureMismatchError(
                "the checkpoint is of another architecture:\n  " + "\n  ".join(differ[:5])
                + ("\n  ..." if len(differ) > 5 else "")
                + "\nuse the configuration it was trained with (config.yaml in its run folder), or train anew"
            )  # fmt: skip

    def counted(self, batch: dict[str, Tensor]) -> Tensor:
        """Bool ``(B,)``: samples that count; evaluation is filled up with samples of weight 0."""
        if "weight" in batch:
            return batch["weight"] > 0
        return torch.ones(batch["raw"].shape[0], dtype=torch.bool, device=batch["raw"].device)
