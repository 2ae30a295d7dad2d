"""Weights averaged over the steps of training, by which a run is evaluated: Lightning's callback, with a step that leaves alone what does not move.

    average <- average + (1 - decay) (weight - average)

Where a weight is frozen the average is that weight to the bit; ``decay * average + (1 - decay) * weight``, which torch has, would round it a little at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def averaging(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """The step above, as :class:`torch.optim.swa_utils.AveragedModel` takes it."""
    return partial(_step, 1 - decay)


def _step(share: float, average: Tensor, weight: Tensor, steps: Tensor | int) -> Tensor:
    dtype = torch.promote_types(average.dtype, weight.dtype)  # of a run in float64 the average is still in float32
    return torch.lerp(average.to(dtype), weight.to(dtype), share)


class AveragedWeights(WeightAveraging):
    """Exponential moving average over every step.

    Args:
        decay: of the average.
    """

    def __init__(self, decay: float) -> None:
        # Buffers are copied: an average of indices is not an index (it rounds 3 down to 2), and fixed features need none.
        super().__init__(use_buffers=False, avg_fn=averaging(decay))
