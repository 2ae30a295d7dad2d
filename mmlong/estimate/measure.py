"""A training step as it is on this machine, to hold an estimate against: memory, floating-point operations and seconds, in a process that does nothing else.

Memory is the most that was resident, less what was resident before the model was built. Before that a small backbone of the same mixers is trained for a step, so that libraries, threads and lazily loaded
code are on neither side. What was resident counts pieces that the C library has freed and not given back, whose amount depends on the order of thousands of small requests; with
:data:`GIVE_BACK` in its environment a process gives back what it frees at once, and holds what its tensors hold.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmlong.backbone import Backbone, BackboneConfig, Merge
from mmlong.estimate.step import Batch, TrainingStep
from mmlong.layout import Layout
from mmlong.measure.flops import count_flops
from mmlong.tasks import Task
from mmlong.training.optim import OptimConfig, build_optimizer

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For glibc's malloc: every block of this size or more is a mapping of its own. Must be set before a process begins."""


def warm_up(config: BackboneConfig, optim: OptimConfig) -> None:
    """Load what a step of such a backbone and optimiser uses, and let go of all memory."""
    backbone = Backbone(config)
    optimizer, _ = build_optimizer(backbone, optim, 1)
    patches = [merge.sides for merge in backbone.merges if isinstance(merge, Merge) and merge.sides is not None]
    # Patches are of a grid, of which eight fit along each axis at the end.
    grid = tuple(8 * math.prod(sides) for sides in zip(*patches, strict=True)) if patches else (64 * backbone.stride,)
    tokens = math.prod(grid)
    codes = torch.zeros(1, tokens, dtype=torch.long) if backbone.reads_codes else None
    layout = Layout(grid=grid if patches else None, codes=codes)
    y, _ = backbone(torch.randn(1, tokens, backbone.dim_in), None, layout)
    y.square().mean().backward()
    nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
    optimizer.step()
    torch.optim.swa_utils.AveragedModel(backbone).update_parameters(backbone)


def let_go() -> None:
    """Give back what is free."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def measure(build: Callable[[], tuple[Task, Batch]], trainer: dict[str, Any]) -> dict[str, float]:
    """Two steps: one counted, one timed.

    Args:
        build: makes the recipe's task and a batch; called twice, the first time to warm up with.
        trainer: the recipe's trainer options.

    Returns:
        ``peak`` in bytes above the baseline, ``flops`` and ``seconds`` of a step.
    """
    from mmlong.measure.memory import peak_bytes, reset_peak, resident_bytes

    task, batch = build()
    warm_up(task.model.backbone.config, task.optim)
    del task, batch
    let_go()
    reset_peak()
    before = resident_bytes()
    task, batch = build()
    step = TrainingStep(task, trainer)
    flops = count_flops(lambda: step(batch))
    begun = time.perf_counter()
    step(batch)
    seconds = time.perf_counter() - begun
    return {"peak": peak_bytes() - before, "flops": flops, "seconds": seconds}
