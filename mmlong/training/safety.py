"""What keeps a run from losing its work: stop at numbers that are not finite, and at Ctrl-C, with a good checkpoint behind.

Both stop by raising, from a place where the checkpoint on disk is of a finished step.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class NotFiniteError(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


class InterruptedRunError(RuntimeError):
    """The user asked the run to stop; a checkpoint was written."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped as asked; everything is saved in {checkpoint}")
        self.checkpoint = checkpoint


def last_checkpoint(trainer: pl.Trainer) -> str:
    """Path of the newest checkpoint of this run, or ``none yet``."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            saved = [Path(p) for p in callback.best_k_models if Path(p).is_file()]
            if saved:
                return str(max(saved, key=lambda p: p.stat().st_mtime))
    return "none yet"


class StopOnNotFinite(pl.Callback):
    """Raises before the optimiser steps on gradients that are not finite, so that the weights and checkpoints stay good."""

    def __init__(self) -> None:
        self._ids: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which samples are in the step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._ids = []
        if isinstance(batch, dict) and "index" in batch:
            self._ids += batch["index"].tolist()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the norm of all gradients: a loss that is not finite shows there too.

        Raises:
            NotFiniteError: naming the step, the samples and the last good checkpoint.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum())):
            return
        loss = trainer.callback_metrics.get("train/loss", torch.tensor(float("nan")))
        raise NotFiniteError(
            f"the gradient is not finite at step {trainer.global_step} (loss {float(loss):.4g}; samples {self._ids[:32]}"
            f"{' ...' if len(self._ids) > 32 else ''}). The weights were not changed. Last good checkpoint: {last_checkpoint(trainer)}. "
            "Try a lower model.optim.lr, a longer model.optim.warmup, or trainer.gradient_clip_val=1"
        )


class StopOnInterrupt(pl.Callback):
    """On Ctrl-C (or SIGTERM) finishes the step, saves, and raises; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self._asked = False
        self._seen = -1
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping after this step (again to stop at once) ...", flush=True)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimiser steps, where a checkpoint is exact.

        Raises:
            InterruptedRunError: after saving.
        """
        stepped = trainer.global_step != self._seen
        self._seen = trainer.global_step
        # One rank's Ctrl-C must stop all, at the same step.
        asked = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if asked and stepped:
            folder = next(c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
            path = Path(str(folder)) / f"step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            raise InterruptedRunError(path)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()
