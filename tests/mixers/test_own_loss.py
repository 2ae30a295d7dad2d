"""Losses of a mixer's own, in the steps of the tasks: whole, in segments, computed again, and not where nobody asks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.layout import Layout
from mmlong.mixers import create_mixer
from mmlong.mixers.own_loss import add_own_loss, mean_own_loss, own_loss_asked, own_losses, sum_own_loss
from mmlong.tasks import AutoregressTask, ClassifyTask, MaskedTask, Task

DSA: dict[str, Any] = {"name": "dsa", "heads": 2, "topk": 5}
SPAN: dict[str, Any] = {"name": "adaptive_span", "heads": 2, "max_span": 20, "initial_span": 0.4, "span_loss": 0.01}


def text(mixer: dict[str, Any], checkpoint: bool = False, **options: Any) -> AutoregressTask:
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=16, depth=2, mixers=[mixer], checkpoint=checkpoint)
    return quiet(AutoregressTask({"name": "text"}, backbone, **options).double())


def quiet(task: Any) -> Any:
    task.log = lambda *args, **kwargs: None
    return task.train()


def batch(rows: int = 2, length: int = 37) -> dict[str, Tensor]:
    r = torch.Generator().manual_seed(1)
    resets = torch.zeros(rows, length, dtype=torch.bool)
    resets[:, 11] = True
    return {
        "raw": torch.randint(256, (rows, length), generator=r, dtype=torch.uint8),
        "resets": resets,
        "lengths": torch.tensor([length, length - 9])[:rows],
        "index": torch.arange(rows),
        "label": torch.zeros(rows, dtype=torch.long),
    }


def gradients(task: Task, loss: Tensor) -> dict[str, Tensor]:
    task.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def test_nothing_is_asked_unless_within() -> None:
    one, other = nn.Identity(), nn.Identity()
    add_own_loss(one, torch.tensor(1.0), 2)
    assert not own_loss_asked()
    with own_losses() as outer:
        add_own_loss(one, torch.tensor(6.0), 3)
        with own_losses() as inner:
            add_own_loss(one, torch.tensor(5.0), 5)
        add_own_loss(other, torch.tensor(8.0), torch.tensor(2))
        # Of the same module: another part of its tokens.
        add_own_loss(one, torch.tensor(1.0), 4)
    assert float(mean_own_loss(outer)) == 5.0
    assert float(sum_own_loss(outer)) == 15.0
    assert float(mean_own_loss(inner)) == 1.0
    assert mean_own_loss([]) is None
    assert sum_own_loss([]) is None


@pytest.mark.parametrize("mixer", [DSA, SPAN], ids=["dsa", "adaptive_span"])
def test_a_training_step_adds_it_and_an_evaluation_does_not(mixer: dict[str, Any]) -> None:
    key = "index_loss" if mixer is DSA else "span_loss"
    task, without, given = text(mixer), text({**mixer, key: 0.0}), batch()
    bits = without.training_step(given, 0)
    loss = task.training_step(given, 0)
    if mixer is DSA:
        # By hand: every document from its beginning, layer by layer.
        tokens, layout = task.encode(given)
        means = []
        for block in task.model.backbone.blocks():
            seen: list[tuple[Tensor, Any]] = []
            block.mixer.register_forward_hook(lambda m, args, out, seen=seen: seen.append((m, args[0])))
            task.model(tokens, None, layout)
            (m, x), total, count = seen[0], 0.0, 0
            for row, length in enumerate(given["lengths"].tolist()):
                for a, b in ((0, 11), (11, length)):
                    total += float(m.indexer_loss(x[row : row + 1, a:b]).detach()) * (b - a)
                    count += b - a
            means.append(total / count)
        own = sum(means)
    else:
        own = 2 * 0.01 * 0.4 * 20
    assert loss.item() == pytest.approx(bits.item() + own / math.log(2), rel=1e-9)
    assert {n for n, g in gradients(task, loss).items() if ("index" in n or "span" in n) and bool(g.any())}
    task.eval()
    assert task._bits(given, "val").item() == pytest.approx(bits.item(), rel=1e-12)


@pytest.mark.parametrize("mixer", [DSA, SPAN], ids=["dsa", "adaptive_span"])
@pytest.mark.parametrize("options", [{"segment": 10}, {"segment": 8, "keep": 2}, {"checkpoint": True}], ids=str)
def test_in_segments_and_computed_again_it_is_the_same(mixer: dict[str, Any], options: dict[str, Any]) -> None:
    whole, other, given = text(mixer), text(mixer, **options), batch()
    a, b = whole.training_step(given, 0), other.training_step(given, 0)
    torch.testing.assert_close(a, b)
    wanted = gradients(whole, a)
    for name, g in gradients(other, b).items():
        torch.testing.assert_close(g, wanted[name], msg=name)


def test_what_is_logged_as_bits_is_without_it() -> None:
    task, given = text(SPAN, segment=10), batch()
    logged: dict[str, float] = {}
    task.log = lambda name, value, **rest: logged.setdefault(name, float(value.detach()))  # type: ignore[method-assign]
    task.training_step(given, 0)
    want = text({**SPAN, "span_loss": 0.0}).training_step(given, 0).item()
    assert logged["train/bits"] == pytest.approx(want, rel=1e-9)
    assert logged["train/loss"] == pytest.approx(want + 2 * 0.08 / math.log(2), rel=1e-9)


@pytest.mark.parametrize("kind", [ClassifyTask, MaskedTask])
def test_other_tasks_add_the_mean(kind: type[Task]) -> None:
    def made(weight: float) -> Task:
        torch.manual_seed(0)
        backbone = BackboneConfig(dim=16, depth=2, mixers=[{**SPAN, "span_loss": weight}], direction="alternate")
        head: dict[str, Any] = {"head": {"name": "classify", "num_classes": 3}} if kind is ClassifyTask else {}
        return quiet(kind({"name": "text"}, backbone, **head).double())  # type: ignore[call-arg]

    def loss(weight: float) -> float:
        torch.manual_seed(5)
        return float(made(weight).training_step(batch(), 0).detach())

    unit = 1 if kind is ClassifyTask else math.log(2)
    assert loss(0.01) == pytest.approx(loss(0.0) + 2 * 0.08 / unit, rel=1e-6)


def test_padding_has_no_part_in_it() -> None:
    m = create_mixer("adaptive_span", 16, **{k: v for k, v in SPAN.items() if k != "name"}).train()
    x = torch.randn(2, 30, 16)
    with own_losses() as found:
        m(x, None, Layout(lengths=torch.tensor([30, 4])))
    assert float(sum_own_loss(found)) == pytest.approx(34 * 0.08)
    assert float(mean_own_loss(found)) == pytest.approx(0.08)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="reversible keeps no graph that a mixer's own loss could be part of"):
        Backbone(BackboneConfig(dim=16, depth=1, mixers=[DSA], reversible=True))
    Backbone(BackboneConfig(dim=16, depth=1, mixers=[{**DSA, "index_loss": 0.0}], reversible=True))
    with pytest.raises(ValueError, match="index_loss must be at least 0"):
        create_mixer("dsa", 16, index_loss=-1.0)
    with pytest.raises(ValueError, match="span_loss must be at least 0"):
        create_mixer("adaptive_span", 16, span_loss=-1.0)
