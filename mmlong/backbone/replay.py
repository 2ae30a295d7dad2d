"""What a recomputation inside a backward must know beside the code: the random numbers that were drawn, the precision that was set, and that the parameters are there.

Shared by everything that computes a thing twice instead of keeping it: segments (:mod:`mmlong.backbone.segmented`) and reversible blocks
(:mod:`mmlong.backbone.reversible`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class RNG:
    """The generators' states of the CPU and of the device in use, to be put back for a replay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Draw from here again."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


def autocast_as_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts with the present autocast settings of a device type."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    cache = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)


def refuse_sharded(module: nn.Module, power: str) -> None:
    """Raise ``ValueError`` naming ``power`` when FSDP has sharded a module whose gradient is taken inside a backward."""
    # Whoever sharded a module has imported this; nobody else should pay for it.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(m, fsdp.FSDPModule | fsdp.FullyShardedDataParallel) for m in module.modules()
    ):
        raise ValueError(
            f"{power} cannot train parameters that FSDP has sharded: it gathers them in hooks and not in the graph, so the gradients of what is "
            "recomputed and differentiated inside the backward would never reach the shards. Use strategy: ddp, or shard the task as a whole and no part of the model"
        )
