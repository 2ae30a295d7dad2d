"""Experts: against their definition, token by token, and transformers' Switch; room, losses, gradients; and the whole contract in evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.experts import Experts, Switch
from mmlong.backbone.feedforward import create_ffn
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.mixers.own_loss import mean_own_loss, own_losses
from mmlong.testing import check_mixer


def build(top: int = 1, **options: Any) -> Experts:
    torch.manual_seed(0)
    made = Experts(8, 2.0, experts=4, top=top, **options).double()
    with torch.no_grad():
        made.router.weight.mul_(5)
    return made


@pytest.mark.parametrize("top", [1, 2])
def test_is_its_definition(top: int) -> None:
    m = build(top).eval()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    want = torch.zeros_like(x)
    for b in range(2):
        for t in range(11):
            p = (m.router.weight @ x[b, t]).softmax(0)
            best = p.argsort(descending=True)[:top].tolist()
            scale = p[best].sum() if top == 2 else 1.0
            for e in best:
                want[b, t] += p[e] / scale * m.experts[e](x[b, t])
    torch.testing.assert_close(m(x), want)


@pytest.mark.parametrize("top", [1, 2])
def test_room_is_for_the_first_and_what_is_lost_is_counted(top: int) -> None:
    m = build(top, capacity=0.5).train()
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    room = math.ceil(0.5 * top * 40 / 4)
    p = (x[0] @ m.router.weight.T).softmax(-1)
    weights, chosen = p.topk(top, -1)
    if top == 2:
        weights = weights / weights.sum(-1, keepdim=True)
    want, taken, lost = torch.zeros_like(x[0]), [0] * 4, 0
    for choice in range(top):
        for t in range(40):
            e = int(chosen[t, choice])
            if taken[e] == room:
                lost += 1
                continue
            taken[e] += 1
            want[t] += weights[t, choice] * m.experts[e](x[0, t])
    torch.testing.assert_close(m(x)[0], want)
    assert lost > 0
    assert m.dropped.tolist() == [lost, 40 * top]


def test_against_transformers_switch() -> None:
    """Router, choice and weights; its experts are made ours."""
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersConfig,
        SwitchTransformersTop1Router,
        load_balancing_loss_func,
        router_z_loss_func,
    )

    m = build(balance=1.0, z=1.0, capacity=None).train().float()
    config = SwitchTransformersConfig(
        hidden_size=8, d_model=8, num_experts=4, expert_capacity=64, router_jitter_noise=0.0
    )
    theirs: Any = SwitchTransformersTop1Router(config).eval()
    theirs.classifier.weight.data.copy_(m.router.weight)
    x = torch.randn(2, 30, 8)
    first, *rest = theirs(x)
    # Which of the outputs is which has changed between releases; the index is the one-hot.
    outs = [first, *rest]
    logits = next(t for t in outs if t.shape[-1] == 4 and t.is_floating_point())
    probabilities = torch.softmax(x @ m.router.weight.T, -1)
    torch.testing.assert_close(
        logits.softmax(-1) if not torch.allclose(logits.sum(-1), torch.ones(())) else logits, probabilities
    )
    chosen = probabilities.argmax(-1)
    with own_losses() as found:
        m(x)
    want = load_balancing_loss_func(probabilities, chosen[..., None]) + router_z_loss_func(x @ m.router.weight.T)
    got = mean_own_loss(found)
    assert got is not None
    # Theirs averages over rows, ours over all tokens: as one row they are the same.
    with own_losses() as found:
        m(x.reshape(1, 60, 8))
    flat = load_balancing_loss_func(probabilities.reshape(1, 60, 4), chosen.reshape(1, 60, 1))
    flat = flat + router_z_loss_func((x @ m.router.weight.T).reshape(1, 60, 4))
    torch.testing.assert_close(mean_own_loss(found), flat, rtol=1e-4, atol=1e-5)
    assert want.isfinite()


def test_padding_takes_no_room_and_changes_nothing() -> None:
    m = build(capacity=1.0).train()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    valid = torch.arange(12) < torch.tensor([12, 5])[:, None]
    with own_losses() as found:
        y = m(x, valid)
    packed = torch.cat([x[0], x[1, :5]])[None]
    with own_losses() as other:
        want = m(packed)[0]
    torch.testing.assert_close(torch.cat([y[0], y[1, :5]]), want)
    assert not bool(y[1, 5:].any())
    torch.testing.assert_close(mean_own_loss(found), mean_own_loss(other))


def test_every_parameter_has_a_gradient() -> None:
    """Of experts without a token, too: ranks wait for all."""
    m = Switch(8, 2.0, experts=16).train()
    m(torch.randn(1, 3, 8)).sum().backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize("name", ["switch", "st_moe"])
def test_the_contract_in_evaluation(name: str) -> None:
    class Made(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.inner = Backbone(BackboneConfig(dim=dim, depth=1, ffn={"name": name, "experts": 3}))
            self.causal = self.streaming = True

        def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
            return self.inner(x, state, layout)

    kept = ("rows", "causality", "pieces", "padding", "resets", "segments", "bfloat16")
    assert check_mixer(Made, traits=Traits(paper="of the house", streaming=True), dims=(16,), only=kept, probed=31)


def test_options() -> None:
    assert isinstance(create_ffn({"name": "st_moe", "experts": 2, "balance": 0.1}, 8, 2.0), Experts)
    for options, message in (({"top": 3}, "1 or 2"), ({"experts": 0}, "at least as many"), ({"z": -1.0}, "at least 0")):
        with pytest.raises(ValueError, match=message):
            Experts(8, 2.0, **options)
    with pytest.raises(TypeError, match="expert"):
        create_ffn({"name": "switch", "expert": 2}, 8, 2.0)
    with pytest.raises(ValueError, match="reversible keeps no graph"):
        Backbone(BackboneConfig(dim=8, ffn="switch", reversible=True))
