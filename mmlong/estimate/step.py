"""A training step of a recipe without its data and without Lightning: what ``fit`` does between two batches, on a batch of the recipe's shapes.

``training_step`` under the trainer's precision, backward, gradient clipping, the optimiser's step and the averaged weights. Values are drawn, sizes are the recipe's; rows are as
long as they may be, so what is found holds for the largest batch. The step can be run, or followed without being computed, under :class:`mmlong.estimate.hollow.Hollow`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mmlong.registry import nearest
from mmlong.tasks import ClassifyTask, ContrastTask, MatchTask, MultiLabelTask, RegressTask, TagTask, Task
from mmlong.training.average import averaging
from mmlong.training.optim import build_optimizer

Batch = dict[str, Tensor]

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"32-true": torch.float32, "32": torch.float32, "bf16-true": torch.bfloat16, "bf16": torch.bfloat16}


def synthetic_batch(task: Task, batch: int, length: int | None, streamed: bool = False, seed: int = 0) -> Batch:
    """A batch as the recipe's datamodule makes them, of drawn values.

    Args:
        task: of the recipe.
        batch: rows, B.
        length: of a row, along raw's last axis, of pairs of each of both; only needed where the modality does not fix it.
        streamed: rows are cut out of a stream of documents (they are full, and have ``resets``), not whole documents (uneven, with ``lengths``).
        seed: of the values.

    Returns:
        ``raw``, ``index`` and what the task learns; ``lengths`` or ``resets`` where rows can have them: one row is full, the others lack a token.

    Raises:
        ValueError: the length is not given, or below 1.
    """
    modality, draw = task.model.modality, torch.Generator().manual_seed(seed)
    if isinstance(task, MatchTask):
        return _pairs(task, batch, length, draw)
    fixed = modality.tokens_per_sample() is not None
    if not fixed and length is None:
        raise ValueError("the recipe's rows have no length of their own: give one")
    if batch < 1 or (length is not None and length < 1):
        raise ValueError(f"a batch of {batch} rows of length {length}; both are at least 1")
    raw, lengths, resets = modality.example(batch, 1 if length is None else length, draw)
    made: Batch = {"raw": raw, "index": torch.arange(batch)}
    if lengths is not None and not streamed and batch > 1:
        made["lengths"] = torch.full((batch,), max(raw.shape[-1] - 1, 1))
        made["lengths"][0] = raw.shape[-1]
    if resets is not None and streamed:
        made["resets"] = torch.rand(batch, raw.shape[-1], generator=draw) < 1e-3
    if getattr(task, "carry", False):
        made["continues"] = torch.ones(batch, dtype=torch.bool)
    return made | _targets(task, made, draw)


def _pairs(task: Task, batch: int, length: int | None, draw: torch.Generator) -> Batch:
    """Rows of two sequences each; those of the first pair are full, the others lack a token."""
    if length is None or length < 1 or batch < 1:
        raise ValueError(f"pairs need a length of each sequence and rows, both at least 1; got {length} and {batch}")
    raw, _, _ = task.model.modality.example(batch, 2 * length, draw)
    each = torch.full((batch,), max(length - 1, 1))
    each[0] = length
    made: Batch = {"raw": raw, "index": torch.arange(batch), "second_at": each, "lengths": 2 * each}
    return made | _targets(task, made, draw)


def _targets(task: Task, batch: Batch, draw: torch.Generator) -> Batch:
    rows = batch["raw"].shape[0]
    head = task.model.config["head"]
    if isinstance(task, ContrastTask):
        return {"raw2": batch["raw"].clone()} if task.views is None else {}
    if isinstance(task, TagTask):
        shape = (rows, task.model.modality.count_tokens(batch["raw"][:1]))
        return {"label": torch.randint(int(head["num_classes"]), shape, generator=draw)}
    if isinstance(task, RegressTask):
        return {"target": torch.rand(rows, int(head["num_classes"]), generator=draw)}
    if isinstance(task, MultiLabelTask):
        return {"label": torch.randint(2, (rows, int(head["num_classes"])), generator=draw)}
    if isinstance(task, ClassifyTask):
        return {"label": torch.randint(int(head["num_classes"]), (rows,), generator=draw)}
    return {}


def precision_context(precision: Any, model: nn.Module, device: str) -> Callable[[], AbstractContextManager[Any]]:
    """What the trainer's ``precision`` puts around a training step; the ``-true`` kinds convert the model.

    Raises:
        ValueError: a precision that is not known here.
    """
    name = "32-true" if precision is None else str(precision)
    if name in AUTOCAST:
        return lambda: torch.autocast(device, AUTOCAST[name])
    if name not in WHOLE:
        known = [*AUTOCAST, *WHOLE]
        raise ValueError(f"trainer.precision {name!r}{nearest(name, known)}; steps are known in {', '.join(known)}")
    if WHOLE[name] != torch.float32:
        model.to(WHOLE[name])
    return nullcontext


class TrainingStep:
    """One step of training, part by part.

    Args:
        task: of the recipe; taken over: it is told to log nothing and to compile nothing.
        trainer: the recipe's trainer options; ``precision``, ``gradient_clip_val`` and ``accumulate_grad_batches`` are read.

    Attributes:
        model: the task's.
        optimizer: as the recipe asks, its state in place.
        averaged: the averaged weights, or ``None``.
        accumulate: batches to an optimiser step.
    """

    def __init__(self, task: Task, trainer: dict[str, Any]) -> None:
        self.task = task
        self.model = task.model
        task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        task.train()
        self.clip = trainer.get("gradient_clip_val")
        self.by_value = trainer.get("gradient_clip_algorithm") == "value"
        self.accumulate = int(trainer.get("accumulate_grad_batches") or 1)
        self.context = precision_context(trainer.get("precision"), task, "cpu")
        task.hold()
        decay = task.optim.ema
        self.averaged = AveragedModel(self.model, avg_fn=averaging(decay), use_buffers=False) if decay else None
        self.optimizer, _ = build_optimizer(self.model, task.optim, int(trainer.get("max_steps") or 1))

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that get a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def weights(self) -> list[Tensor]:
        """All parameters, averaged ones too."""
        return [*self.model.parameters(), *(() if self.averaged is None else self.averaged.parameters())]

    def settle(self, batch: Batch) -> None:
        """What the first step of a run does for all later ones: the optimiser's state is made, and a state to be carried."""
        if getattr(self.task, "carry", False):
            with torch.no_grad(), self.context():
                self.task.training_step(batch, 0)
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.update()
        self.optimizer.zero_grad()

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        with self.context():
            loss = self.task.training_step(batch, 0)
        assert isinstance(loss, Tensor)
        return loss / self.accumulate

    def update(self) -> None:
        """Clip, step and average."""
        if self.clip:
            clip = nn.utils.clip_grad_value_ if self.by_value else nn.utils.clip_grad_norm_
            clip(self.trained, float(self.clip))
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def __call__(self, batch: Batch) -> None:
        """The whole step, its gradients let go at the end."""
        for _ in range(self.accumulate):
            self.forward(batch).backward()
        self.update()
        self.optimizer.zero_grad()
