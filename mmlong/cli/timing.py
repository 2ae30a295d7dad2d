"""How long a recipe's training step takes on this machine, in CPU time: what equal budgets are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmlong.cli.build import build, parse
from mmlong.cli.train import words_of
from mmlong.measure import budget

OWN = budget.LEAST + 1
"""Batches of the data on which a step is timed, where all are of one size."""


def uneven_batches(data: Any) -> list[Any] | None:
    """Batches to time steps on where those of the data are of several sizes: one that sets up, and some whose average is an epoch's (``typical_batches`` of the data module); else ``None``."""
    found = data.typical_batches() if hasattr(data, "typical_batches") else None
    return None if found is None else [found[0], *found]


def task_seconds(task: Any, trainer: Mapping[str, Any], batches: Sequence[Any]) -> float:
    """CPU seconds of one training step of this process's threads.

    Args:
        task: of a recipe; taken over.
        trainer: the recipe's trainer options; a step is as many batches as it accumulates.
        batches: that are trained on, the first to set up; fewer than :data:`OWN`, again in turn.
    """
    from mmlong.estimate.step import TrainingStep

    step = TrainingStep(task, dict(trainer))
    return budget.step_seconds(step, itertools.islice(itertools.cycle(batches), max(OWN, len(batches))), math.inf)


def trainer_options(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's trainer options under those of ``fit``."""
    return {**(config.get("trainer") or {}), **_below("trainer", options)}


def _below(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{part}."): value for key, value in options.items() if key.startswith(f"{part}.")}


def step_seconds(config: dict[str, Any], options: dict[str, Any]) -> tuple[float, int]:
    """CPU seconds of one training step of this process's threads on drawn values, rows as long as they may be, and the model's parameters.

    Args:
        config: of the recipe.
        options: of ``fit``, on top of it.
    """
    from mmlong.estimate.step import synthetic_batch
    from mmlong.models import Model

    _, task = build(*parse(config, words_of((), options)))
    init = {**config["data"]["init_args"], **_below("data", options)}
    model: Model = task.model
    length = model.modality.tokens_per_sample() or init["length"]
    batch = synthetic_batch(task, init["batch_size"], length, init.get("windows") == "stream")
    if not model.modality.initialised:
        model.modality.initialise(batch["raw"])
    return task_seconds(task, trainer_options(config, options), [batch]), model.num_parameters()


def own_step_seconds(config: dict[str, Any], options: Mapping[str, Any]) -> tuple[float, int]:
    """The same on the first batches of the recipe's data, or where their sizes differ on some of all sizes. What reading or drawing them takes is not counted.

    Args:
        config: of the recipe.
        options: of ``fit``, on top of it.
    """
    data, task = build(*parse(config, words_of((), options)))
    data.prepare_data()
    data.setup("fit")
    task.show_data(data)
    batches = uneven_batches(data) or list(itertools.islice(iter(data.train_dataloader()), OWN))
    data.teardown("fit")
    return task_seconds(task, trainer_options(config, options), batches), task.model.num_parameters()
