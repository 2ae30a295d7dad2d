"""A step that is followed is counted as the same step computed, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import BackboneConfig
from mmlong.estimate.count import Counts, count_step, total_flops
from mmlong.estimate.hollow import Hollow
from mmlong.estimate.step import TrainingStep, synthetic_batch
from mmlong.mixers import list_mixers
from mmlong.tasks import AutoregressTask, ClassifyTask, MaskedTask, Task
from mmlong.training.optim import OptimConfig


def text(mixer: Any = "mamba2", **options: Any) -> AutoregressTask:
    backbone = BackboneConfig(dim=16, depth=2, mixers=[mixer])
    return AutoregressTask({"name": "text"}, backbone, optim=OptimConfig(ema=0.9), **options)


def counted(task: Task, hollow: bool, rows: int = 2, length: int | None = 40, **trainer: Any) -> Counts:
    step = TrainingStep(task, {"gradient_clip_val": 1.0, **trainer})
    batch = synthetic_batch(task, rows, length, streamed=isinstance(task, AutoregressTask))
    with Hollow(step.weights if hollow else []):
        step.settle(batch)
        return count_step(step, batch)


@pytest.mark.parametrize("mixer", list_mixers(streaming=True))
def test_followed_as_computed(mixer: str) -> None:
    followed, computed = counted(text(mixer), hollow=True), counted(text(mixer), hollow=False)
    if mixer in ("lstm", "gru"):
        # Torch's recurrent kernels are taken apart where they are followed, and not where they are computed.
        assert total_flops(followed) == total_flops(computed)
        assert followed["peak"] == pytest.approx(computed["peak"], rel=0.4)
    else:
        assert followed == computed


@pytest.mark.parametrize(
    "options", [{"segment": 16}, {"segment": 16, "keep": 2}, {"segment": 16, "truncate": True}], ids=str
)
def test_segments(options: dict[str, Any]) -> None:
    assert counted(text(**options), hollow=True) == counted(text(**options), hollow=False)


@pytest.mark.parametrize("trainer", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}], ids=str)
def test_trainers(trainer: dict[str, Any]) -> None:
    assert counted(text(), hollow=True, **trainer) == counted(text(), hollow=False, **trainer)


def test_both_sides_with_dropout_and_checkpoints() -> None:
    def make() -> ClassifyTask:
        backbone = BackboneConfig(
            dim=[8, 16], depth=1, pool=[4], direction="both", dropout=0.1, drop_path=0.1, checkpoint=True
        )
        return ClassifyTask({"name": "text"}, backbone, {"num_classes": 3})

    assert counted(make(), hollow=True, rows=3) == counted(make(), hollow=False, rows=3)


def test_masks_that_are_known_pick_what_they_pick() -> None:
    def make() -> MaskedTask:
        return MaskedTask({"name": "text"}, BackboneConfig(dim=8, depth=2, direction="alternate"))

    assert counted(make(), hollow=True) == counted(make(), hollow=False)


def test_nothing_is_computed_and_parameters_stay() -> None:
    task = text()
    before = [p.detach().clone() for p in task.parameters()]
    counted(task, hollow=True)
    assert all(torch.equal(p, q) for p, q in zip(task.parameters(), before, strict=True))


def test_a_look_at_what_was_not_computed_is_refused() -> None:
    layer = nn.Linear(3, 3)

    def look(y: Tensor) -> bool:
        return bool(y.sum() > 0)

    with Hollow(layer.parameters()), pytest.raises(ValueError, match="looks at a value that it computes"):
        look(layer(torch.ones(1, 3)))
    with Hollow(layer.parameters()):
        assert look(torch.ones(3))  # nothing of the parameters is in it
