"""The random state of every rank, kept in the checkpoint. Lightning keeps none."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist


class RNGStateCallback(pl.Callback):
    """Saves torch's global generator of each rank and puts it back when training begins."""

    def __init__(self) -> None:
        self._pending: list[torch.Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks, rank 0 first. A collective: every rank must call it."""
        own = torch.get_rng_state()
        if not (dist.is_available() and dist.is_initialized()):
            return {"torch": [own]}
        states = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(states, own)
        return {"torch": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the states until training begins."""
        self._pending = state_dict["torch"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put this rank's state back."""
        if self._pending is not None:
            torch.set_rng_state(self._pending[trainer.global_rank].cpu())
            self._pending = None
