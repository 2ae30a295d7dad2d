"""How long a recipe's training step takes on this machine, in CPU time: what equal budgets are made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmlong.cli.build import build, parse
from mmlong.measure import budget


def given(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def task_seconds(task: Any, trainer: Mapping[str, Any], batches: Sequence[Any]) -> float:
    """CPU seconds of one training step of this process's threads.

    Args:
        task: of a recipe; taken over.
        trainer: the recipe's trainer options.
        batches: that are trained on, in turn.
    """
    from mmlong.estimate.step import TrainingStep

    step = TrainingStep(task, {**trainer, "precision": None, "accumulate_grad_batches": 1})
    return budget.step_seconds(step, itertools.islice(itertools.cycle(batches), budget.LEAST + 1))


def step_seconds(config: dict[str, Any], options: dict[str, Any]) -> tuple[float, int]:
    """CPU seconds of one training step of this process's threads, and the model's parameters.

    Args:
        config: of the recipe.
        options: of ``fit``, on top of it.
    """
    from mmlong.estimate.step import synthetic_batch
    from mmlong.models import Model

    _, task = build(*parse(config, given(options)))
    init = {
        **config["data"]["init_args"],
        **{key.removeprefix("data."): v for key, v in options.items() if key.startswith("data.")},
    }
    model: Model = task.model
    length = model.modality.tokens_per_sample() or init["length"]
    batch = synthetic_batch(task, init["batch_size"], length, init.get("windows") == "stream")
    if not model.modality.initialised:
        model.modality.initialise(batch["raw"])
    return task_seconds(task, config["trainer"], [batch]), model.num_parameters()
