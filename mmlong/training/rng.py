"""The random state of every rank, kept in the checkpoint. Lightning keeps none, and so a resumed run would draw other dropout."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist


def step_generator(rank: int = 0) -> torch.Generator:
    """A generator for the draws of one training step: one number from torch's global generator, which is saved and resumed, and the rank, so that ranks differ."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) + rank)


def sample_generators(index: torch.Tensor, purpose: int) -> list[torch.Generator]:
    """Generators for the draws of an evaluation, one a sample: a pure function of the sample's index and of a number that tells purposes apart."""
    return [torch.Generator().manual_seed((purpose << 40) + int(sample)) for sample in index.tolist()]


def _own() -> dict[str, Any]:
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [int(version), list(internal), gauss_next],
    }


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


class RNGStateCallback(pl.Callback):
    """Saves the global generators of torch (CPU and CUDA), numpy and Python of each rank, and puts them back when training begins.

    Tensors and primitives only, so that the checkpoint loads with ``weights_only=True``.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks, rank 0 first. A collective: every rank must call it."""
        own = _own()
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [own]}
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, own)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the states until training begins."""
        self._pending = state_dict["ranks"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put this rank's state back."""
        if self._pending is not None:
            _restore(self._pending[trainer.global_rank])
            self._pending = None
