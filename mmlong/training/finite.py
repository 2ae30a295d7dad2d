"""Stop at the first loss or gradient that is no number, before it reaches the weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite.

    Attributes:
        step: optimiser steps done before it.
        samples: sample ids of the batch at fault, where the batch names them.
    """

    def __init__(self, what: str, step: int, samples: list[int]) -> None:
        self.step, self.samples = step, samples
        shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
        of = f" (samples {shown})" if samples else ""
        super().__init__(f"{what} in step {step + 1}{of}; training stopped before any weight changed")


class StopOnNaN(pl.Callback):
    """Raises :class:`NonFiniteError` when the loss, or a gradient after it, is not finite.

    The loss is looked at before the backward, the gradients before the optimiser sees them: with several ranks only these,
    since they are the same on every rank and so all stop together. Under a gradient scaler (``16-mixed``) gradients
    overflow by design and are left to the scaler.
    """

    def __init__(self) -> None:
        self._samples: list[Tensor] = []

    def _ids(self) -> list[int]:
        return torch.cat(self._samples).tolist() if self._samples else []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which samples the coming step is made of."""
        if isinstance(batch, dict) and isinstance(batch.get("index"), Tensor):
            self._samples.append(batch["index"])

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at the loss."""
        if trainer.world_size == 1 and not torch.isfinite(loss.detach()).all():
            # The last batch's samples alone: earlier ones of an accumulated step passed.
            self._samples = self._samples[-1:]
            raise NonFiniteError(f"the loss is {float(loss.detach().mean())}", trainer.global_step, self._ids())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradients, once for all of them."""
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            named = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
            norms = torch._foreach_norm([grad for _, grad in named]) if named else []
            if named and not torch.isfinite(torch.stack([norm.float() for norm in norms]).sum()):
                bad = [name for (name, _), norm in zip(named, norms, strict=True) if not torch.isfinite(norm)]
                what = f"the gradient of {bad[0]} is not finite" if bad else "the gradients overflow"
                more = f" (and of {len(bad) - 1} other parameters)" if len(bad) > 1 else ""
                raise NonFiniteError(what + more, trainer.global_step, self._ids())
        self._samples.clear()
