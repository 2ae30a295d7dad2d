"""What a recomputation must repeat beside the code: the random numbers that were drawn and the precision that was set.

Shared by everything that computes a thing twice instead of keeping it: segments (:mod:`mmlong.backbone.segmented`) and reversible blocks
(:mod:`mmlong.backbone.reversible`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


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
    """A maker of contexts with the present autocast settings of a device type.

    Without autocast's cache: a weight that was cast while no graph was recorded would be taken from it when one is, and its gradient lost.
    """
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
