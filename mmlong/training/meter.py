"""How fast and how long a run trains, over all its parts when it was resumed."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch

from mmlong.training.metrics_csv import MetricsCSV

SMOOTHING = 0.9
WARM_UP = 2  # first steps of a process: allocation and compilation


class Meter(pl.Callback):
    """Measures tokens a second and seconds a step of training alone; evaluation and checkpoints are left out.

    Attributes:
        rate: tokens a second of late, all ranks together; 0 until measured.
        step_seconds: seconds an optimiser step takes of late.
        seconds, tokens: total of the run so far.
        cpu_seconds: what this process (the first rank's) computed in that time, all threads together; ``None`` for a run that began before this was counted.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        self.step_seconds = 0.0
        self.seconds = 0.0
        self.tokens = 0
        self.cpu_seconds: float | None = 0.0
        self._mark = 0.0
        self._cpu_mark = 0.0
        self._pending: list[float] = [0.0, 0.0]
        self._step = 0
        self._steps_here = 0

    def state_dict(self) -> dict[str, Any]:
        """The totals."""
        return {"seconds": self.seconds, "tokens": self.tokens, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds, self.tokens = float(state_dict["seconds"]), int(state_dict["tokens"])
        self.cpu_seconds = state_dict.get("cpu_seconds")

    @property
    def average_rate(self) -> float:
        """Tokens a second over the whole run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and let the metrics go on at this step."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.keep_until(trainer.global_step)
        self._step = trainer.global_step
        self._mark = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first batch of a process waits for the loader to start, which is not training."""
        if not self._mark:
            self.resume_clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch; measure at every optimiser step."""
        now = time.perf_counter()
        counter: Any = getattr(pl_module, "tokens_in", None)
        tokens = 0 if counter is None else int(counter(batch)) * replicas(trainer)
        elapsed, computed = now - self._mark, time.process_time() - self._cpu_mark
        self.resume_clock()
        self.seconds += elapsed
        if self.cpu_seconds is not None:
            self.cpu_seconds += computed
        self.tokens += tokens
        self._pending[0] += elapsed
        self._pending[1] += tokens
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._steps_here += 1
        (seconds, counted), self._pending = self._pending, [0.0, 0.0]
        if self._steps_here > WARM_UP:
            keep = SMOOTHING if self.step_seconds else 0.0
            self.step_seconds = keep * self.step_seconds + (1 - keep) * seconds
            self.rate = keep * self.rate + (1 - keep) * counted / seconds
            if counted:
                pl_module.log("train/tokens_per_second", self.rate)
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if rates:
            pl_module.log("train/learning_rate", max(rates))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock stood still."""
        self.resume_clock()

    def resume_clock(self) -> None:
        """Leave out the time since the last batch (a checkpoint was written)."""
        self._mark, self._cpu_mark = time.perf_counter(), time.process_time()


def replicas(trainer: pl.Trainer) -> int:
    """How many ranks, or groups of ranks that share their sequences, have batches of their own."""
    place = trainer.distributed_sampler_kwargs
    return 1 if place is None else int(place["num_replicas"])


def peak_memory() -> int:
    """Bytes: the most this process and its largest child held in memory; on CUDA, the most that was allocated there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return unit * (own + child)
