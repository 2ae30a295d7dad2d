"""Weights averaged over the steps of training, by which a run is evaluated: Lightning's callback, with a step that leaves alone what does not move.

    average <- average + (1 - d) (weight - average),   d = min(decay, (1 + n) / (10 + n)) at the n-th step after the first

so that a short run is not judged by the weights that it began with: after 150 steps a decay of 0.99 by itself would leave them 22 % (the growing decay is TensorFlow's, of its ``ExponentialMovingAverage`` with ``num_updates``).

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
    return partial(_step, decay)


def _step(decay: float, average: Tensor, weight: Tensor, steps: Tensor | int) -> Tensor:
    dtype = torch.promote_types(average.dtype, weight.dtype)  # of a run in float64 the average is still in float32
    # As a tensor: asking a device how many steps there were would wait for it at every weight.
    n = torch.as_tensor(steps, device=average.device).to(dtype)
    return torch.lerp(average.to(dtype), weight.to(dtype), (9 / (10 + n)).clamp_min(1 - decay))


class AveragedWeights(WeightAveraging):
    """Exponential moving average over every step.

    Args:
        decay: of the average, once there are steps enough for it.
    """

    def __init__(self, decay: float) -> None:
        # Buffers are copied: an average of indices is not an index (it rounds 3 down to 2), and fixed features need none.
        super().__init__(use_buffers=False, avg_fn=averaging(decay))
