"""Checkpoints to go on from: now and then, before evaluation, at the end, and when the run is told to stop.

They are named by their step; the newest few are kept. Between the batches of one step nothing is saved: the gradient that they have gathered is in no checkpoint. Ctrl-C (or a scheduler's SIGTERM) lets the step in hand finish, since
half a step is no state to go on from, saves, and stops.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mmlong.training.checkpoints import step_of
from mmlong.training.meter import Meter

KEEP = 2
SHARE = 0.05  # of the time, at most, goes into writing checkpoints


class RunStoppedError(Exception):
    """The run was told to stop, and has saved its state.

    Attributes:
        checkpoint: where.
        signum: the signal it was told by.
    """

    def __init__(self, checkpoint: Path, signum: int, step: int) -> None:
        self.checkpoint, self.signum, self.step = checkpoint, signum, step
        super().__init__(f"stopped after step {step}; saved {checkpoint}")


class ResumeCheckpoint(Checkpoint):
    """Saves ``step=N.ckpt`` into ``folder``.

    Args:
        folder: of the checkpoints.
        seconds: at most so often, and never so often that writing takes more than a twentieth of the time; 0: every step.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: str | Path, seconds: float = 60.0, keep: int = KEEP) -> None:
        self.folder = Path(folder)
        self.seconds = seconds
        self.keep = keep
        self.asked: int | None = None
        self._old: dict[int, Any] = {}
        self._saved_at = time.monotonic()
        self._took = 0.0
        self._step = -1
        self._whole = True
        self._path: Path | None = None
        self._stopping: int | None = None

    # signals

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self._restore_signals()
            raise KeyboardInterrupt
        self.asked = signum
        rank_zero_only(print)(
            "\nstopping: finishing this step, then saving (once more to stop at once, without saving)", flush=True
        )

    def _restore_signals(self) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals; Lightning has set its own handlers by now."""
        self._step = trainer.global_step
        self._whole = True
        self._saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._restore_signals()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop listening."""
        self._restore_signals()

    # saving

    def _save(self, trainer: pl.Trainer) -> Path:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        if self._path != path:
            begun = time.monotonic()
            trainer.save_checkpoint(path)
            self._path, self._saved_at = path, time.monotonic()
            self._took = self._saved_at - begun
            self._prune(path)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Meter):
                    callback.resume_clock()
        return path

    @rank_zero_only
    def _prune(self, newest: Path) -> None:
        own = sorted((p for p in self.folder.glob("step=*.ckpt") if p != newest), key=step_of, reverse=True)
        for path in own[self.keep - 1 :]:
            path.unlink(missing_ok=True)

    def _agreed(self, trainer: pl.Trainer, value: int) -> int:
        """The largest value over all ranks, which must act together."""
        if trainer.world_size == 1:
            return value
        return int(trainer.strategy.reduce(torch.tensor(float(value), device=trainer.strategy.root_device),
                                           reduce_op="max"))  # fmt: skip

    def _stop(self, trainer: pl.Trainer) -> None:
        """Stop, if it was decided to; the state was saved then."""
        if self._stopping is not None:
            assert self._path is not None
            raise RunStoppedError(self._path, self._stopping, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At whole optimiser steps: save if it is time, stop if asked."""
        self._whole = trainer.global_step != self._step
        if not self._whole:
            return
        self._step = trainer.global_step
        # Of a large model even rare checkpoints would take much of the time; 0 asks for one at every step all the same.
        pause = max(self.seconds, self._took / SHARE) if self.seconds else 0.0
        due = time.monotonic() - self._saved_at >= pause
        signum = self._agreed(trainer, self.asked or int(due))
        if signum or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        if signum > 1:
            # Not yet: what this step logs is written after this hook.
            self._stopping = signum

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if told to during the step before."""
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Or here, if that was the epoch's last step."""
        if trainer.global_step != trainer.max_steps:
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before evaluation, which can be long."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._whole:
            self._stop(trainer)
            self._save(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Stop if asked; the state was saved before evaluation began."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._whole:
            signum = self._agreed(trainer, self.asked or 0)
            if signum:
                self._stopping = signum
                self._stop(trainer)
