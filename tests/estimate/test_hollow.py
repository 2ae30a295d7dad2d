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
    # What it computes depends on what was learned, and what is followed is the most that may be.
    spec = {"name": mixer, "initial_span": 1.0} if mixer == "adaptive_span" else mixer
    followed, computed = counted(text(spec), hollow=True), counted(text(spec), hollow=False)
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


def conditional(**backbone: Any) -> AutoregressTask:
    return AutoregressTask({"name": "text"}, BackboneConfig(dim=16, depth=2, **backbone))


@pytest.mark.parametrize("name", ["switch", "st_moe"])
def test_experts_are_followed_as_if_they_had_even_shares(name: str) -> None:
    """Without a limit the shares make no difference to the work, but for its form."""
    ffn = {"name": name, "experts": 4, "capacity": None}
    followed, computed = (counted(conditional(ffn=ffn), hollow=hollow) for hollow in (True, False))
    products = [key for key in computed if key.startswith("flops products")]
    assert products
    for key in products:
        assert followed[key] == pytest.approx(computed[key], rel=1e-9)
    assert total_flops(followed) == pytest.approx(total_flops(computed), rel=0.05)
    assert followed["peak"] == pytest.approx(computed["peak"], rel=0.3)
    few = counted(conditional(ffn={**ffn, "experts": 2}), hollow=True)
    assert few["flops products float32"] < followed["flops products float32"]


@pytest.mark.parametrize("key", ["dynamic", "mixture_of_depths"])
def test_chosen_tokens_are_followed_at_the_share_aimed_at(key: str) -> None:
    """As computed where that many are chosen, in every row."""

    def task(size: float) -> AutoregressTask:
        return conditional(parts=[{key: size, "parts": ["mamba2"]}, "mamba2"])

    def fixed(size: float) -> AutoregressTask:
        made = task(size)
        part: Any = made.model.backbone.parts()[0]
        every = round(size if key == "dynamic" else 1 / size)

        def values(x: Tensor, *_: Any) -> Tensor:
            found = torch.where(torch.arange(x.shape[1]) % every == 0, 0.9, -0.9).expand(x.shape[:2])
            made_of = part.q_proj(x)[..., 0] if key == "dynamic" else part.router(x)[..., 0]
            return found.clamp_min(0) + 0 * made_of if key == "dynamic" else found + 0 * made_of

        setattr(part, "chances" if key == "dynamic" else "scores", values)
        return made

    size = 4 if key == "dynamic" else 0.25
    followed, computed = counted(fixed(size), hollow=True), counted(fixed(size), hollow=False)
    assert followed["flops products float32"] == pytest.approx(computed["flops products float32"], rel=1e-9)
    assert total_flops(followed) == pytest.approx(total_flops(computed), rel=0.02)
    assert followed["peak"] == pytest.approx(computed["peak"], rel=0.05)
    more = counted(task(2 if key == "dynamic" else 0.5), hollow=True)
    assert total_flops(more) > total_flops(counted(task(size), hollow=True))


def test_what_is_picked_by_a_fixed_number_is_followed_as_computed() -> None:
    def make() -> ClassifyTask:
        backbone = BackboneConfig(dim=16, depth=1, direction="both", ffn={"name": "colt5", "share": 0.25})
        return ClassifyTask({"name": "text"}, backbone, {"num_classes": 3})

    assert counted(make(), hollow=True, rows=3) == counted(make(), hollow=False, rows=3)
