"""What a run says while it works: what it is about to do, how fast it goes, and how long it will take."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def clock(seconds: float) -> str:
    """``1 h 05 min``, ``12 min``, ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Throughput(pl.Callback):
    """Measures tokens per second of training steps; says at the start what the run is, and after a few steps how long it takes.

    Args:
        settle: steps after which the time is foretold.

    Attributes:
        tokens_per_second: over the whole run, validation left out.
    """

    def __init__(self, settle: int = 10) -> None:
        self.settle = settle
        self.tokens = 0
        self.seconds = 0.0
        self.steps = 0
        self._since = 0.0
        self._recent: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the run is."""
        model: Any = pl_module.model
        length = model.modality.tokens_per_sample()
        if trainer.is_global_zero:
            if length is not None:
                print(f"{length:,} tokens a sample")
            print(f"{model.num_parameters():,} parameters; {trainer.max_steps:,} steps", flush=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count."""
        spent = time.perf_counter() - self._since
        tokens = pl_module.tokens_in(batch) * trainer.world_size  # type: ignore[operator]
        self.steps += 1
        if self.steps == 1:
            return  # the first step allocates and warms up
        self.tokens += tokens
        self.seconds += spent
        rate = tokens / spent if spent else 0.0
        self._recent = rate if self._recent is None else 0.9 * self._recent + 0.1 * rate
        pl_module.log("train/tokens_per_second", self._recent, prog_bar=False)
        if self.steps == self.settle and trainer.is_global_zero:
            left = (
                (trainer.max_steps - trainer.global_step)
                * self.seconds
                / (self.steps - 1)
                * trainer.accumulate_grad_batches
            )
            print(f"about {clock(left)} of training to go, at {self.tokens_per_second:,.0f} tokens/s", flush=True)

    @property
    def shown(self) -> str:
        """The recent rate for a progress bar."""
        return f"{self._recent or 0:,.0f}"


class TokenProgressBar(RichProgressBar):
    """Lightning's rich bar with tokens per second."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Lightning's metrics, the version number out and the rate in."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                items["tokens/s"] = callback.shown
        return items
