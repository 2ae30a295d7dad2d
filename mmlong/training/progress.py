"""What a person sees while a run trains: what it is, one bar over all its steps, tokens a second, time left.

On a terminal it is a live bar; elsewhere (a log file, CI) a plain line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mmlong.training.meter import Meter, replicas

LINE_EVERY = 30.0  # seconds between plain lines


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class RunProgress(ProgressBar):
    """The progress of a run. Only the first rank shows it.

    Args:
        meter: what measures the run's speed.
        title: the recipe's name.
        console: where to write; standard output unless given.
    """

    def __init__(self, meter: Meter, title: str, console: Console | None = None) -> None:
        super().__init__()
        self.meter = meter
        self.title = title
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._shown = True
        self._bar: Progress | None = None
        self._task: Any = None
        self._eval: Any = None
        self._said = 0.0
        self._expected_said = False

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._shown = False

    def enable(self) -> None:
        """Show it."""
        self._shown = True

    @property
    def _live(self) -> bool:
        return self._shown and self.console.is_terminal

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._shown:
            self.console.print(text, markup=False)

    def _open(self) -> None:
        if self._live and self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[note]}"), console=self.console, expand=True, transient=False,
            )  # fmt: skip
            self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = self._eval = None

    # training

    def _headline(self, trainer: pl.Trainer, pl_module: Any) -> str:
        model = getattr(pl_module, "model", pl_module)
        length = model.tokens_per_sample() if hasattr(model, "tokens_per_sample") else None
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        batch = getattr(trainer.datamodule, "batch_size", 0) * replicas(trainer)  # type: ignore[attr-defined]
        batch *= trainer.accumulate_grad_batches
        parts = [f"{length:,} tokens a sample"] if length else []
        parts.append(f"{parameters:,} parameters")
        steps = f"{trainer.max_steps:,} steps"
        if batch:
            steps += f" of {batch} samples"
            if isinstance(trainer.num_training_batches, int) and trainer.num_training_batches:
                an_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
                steps += f" ({trainer.max_steps / an_epoch:.1f} epochs)"
        parts.append(steps)
        device = pl_module.device
        where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        ranks = f", {trainer.world_size} ranks" if trainer.world_size > 1 else ""
        begun = f"; at step {trainer.global_step:,}" if trainer.global_step else ""
        return f"{self.title}: {', '.join(parts)}, on {device.type} ({where}{ranks}){begun}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is trained, and open the bar."""
        self.say(self._headline(trainer, pl_module))
        self._open()
        self._said = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step, note="measuring speed"
            )

    def _note(self, trainer: pl.Trainer) -> str:
        parts = []
        metrics = trainer.progress_bar_metrics
        for key, name in (
            ("train/loss", "loss"),
            ("train/bits", "bits"),
            ("val/accuracy", "val accuracy"),
            ("val/bits", "val bits"),
        ):
            if key in metrics:
                parts.append(f"{name} {float(metrics[key]):.3f}")
        if self.meter.rate:
            parts.append(f"{self.meter.rate:,.0f} tokens/s")
        if self.meter.step_seconds:
            left = (trainer.max_steps - trainer.global_step) * self.meter.step_seconds
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or say a line."""
        if not self._shown:
            return
        if self.meter.step_seconds and not self._expected_said:
            self._expected_said = True
            left = (trainer.max_steps - trainer.global_step) * self.meter.step_seconds
            rate = f" at {self.meter.rate:,.0f} tokens a second" if self.meter.rate else ""
            self.say(f"expected time: {duration(left)} of training{rate}, evaluation not counted")
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, note=self._note(trainer))
        elif time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            self.say(f"step {trainer.global_step}/{trainer.max_steps}  {self._note(trainer)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    # evaluation

    def _start_eval(self, what: str, batches: Any) -> None:
        self._open()
        if self._bar is not None:
            total = sum(batches) if isinstance(batches, list) else batches
            self._eval = self._bar.add_task(what, total=total, note="")

    def _step_eval(self) -> None:
        if self._bar is not None and self._eval is not None:
            self._bar.advance(self._eval)

    def _end_eval(self) -> None:
        if self._bar is not None and self._eval is not None:
            self._bar.remove_task(self._eval)
            self._eval = None
            if self._task is None:
                self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A second bar."""
        self._start_eval("validating", trainer.num_val_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move it."""
        self._step_eval()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was found."""
        self._end_eval()
        found = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if trainer.state.fn == "fit" and not trainer.sanity_checking and found:
            self.say(f"step {trainer.global_step}/{trainer.max_steps}: {describe(found, 'val/')}")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar."""
        self._start_eval("testing", trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move it."""
        self._step_eval()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close it."""
        self._end_eval()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar."""
        self._start_eval("predicting", trainer.num_predict_batches)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move it."""
        self._step_eval()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close it."""
        self._end_eval()


def describe(metrics: Mapping[str, Any], prefix: str) -> str:
    """``val/balanced_accuracy: 0.9`` and others as one line, accuracy first."""
    items = {key.removeprefix(prefix).replace("_", " "): float(value) for key, value in metrics.items()}
    order = sorted(items, key=lambda name: (name != "accuracy", name == "loss", name))
    what = prefix.strip("/")
    return ", ".join(f"{what} {name} {items[name]:.4f}" if i == 0 else f"{name} {items[name]:.4f}"
                     for i, name in enumerate(order))  # fmt: skip
