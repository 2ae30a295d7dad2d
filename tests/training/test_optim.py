from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmlong.models import create_model
from mmlong.training.optim import OptimConfig, build_optimizer, optim_hints, parameter_groups, schedule_factor


def model() -> nn.Module:
    return create_model("pixel_sequence", size=[8, 8], dim=16, depth=2, mixers=["s4d", "mamba2"])


def test_every_trained_parameter_is_in_one_group_with_the_decay_and_rate_it_asks_for() -> None:
    net = model()
    next(net.parameters()).requires_grad_(False)
    config = OptimConfig(lr=0.1, weight_decay=0.3)
    groups = parameter_groups(net, config)
    hints = optim_hints(net)
    assert hints, "a state-space model declares hints"
    names = {id(p): name for name, p in net.named_parameters()}
    placed = [id(p) for group in groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    for group in groups:
        for p in group["params"]:
            hint = hints.get(names[id(p)], {})
            assert group["weight_decay"] == hint.get("weight_decay", 0.0 if p.ndim <= 1 else 0.3)
            assert group["lr"] == pytest.approx(0.1 * hint.get("lr_scale", 1.0))


def test_layer_decay_is_in_the_rate_that_the_optimiser_uses() -> None:
    net = model()
    optimizer, schedule = build_optimizer(net, OptimConfig(lr=1.0, layer_decay=0.5, warmup=0, schedule="constant"), 10)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(net.named_parameters())
    stem, head = rate[id(named["modality.pixel.weight"])], rate[id(named["head.linear.weight"])]
    assert head == 1.0
    assert stem < 0.5
    schedule.step()
    assert {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]} == rate


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]), st.integers(0, 50), st.integers(1, 500), st.floats(0, 1)
)
def test_schedules_rise_to_the_peak_and_end_at_the_floor(kind: str, warmup: int, total: int, floor: float) -> None:
    config = OptimConfig(schedule=kind, warmup=warmup, min_lr=floor)  # type: ignore[arg-type]
    rates = [schedule_factor(step, config, warmup + total) for step in range(warmup + total + 5)]
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert rates[warmup] == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warmup:]))
    assert rates[-1] == pytest.approx(1.0 if kind == "constant" else floor)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert schedule_factor(50, OptimConfig(warmup=0, min_lr=0.0), 100) == pytest.approx(0.5)
    assert schedule_factor(25, OptimConfig(warmup=0, min_lr=0.0), 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_a_hint_for_a_parameter_that_is_not_there_is_refused() -> None:
    net = nn.Linear(2, 2)
    net.optim_hints = {"wieght": {"lr_scale": 0.1}}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="'wieght'"):
        parameter_groups(net, OptimConfig())
    net.optim_hints = {"weight": {"lr": 0.1}}  # type: ignore[assignment]
    with pytest.raises(ValueError, match="unknown options"):
        parameter_groups(net, OptimConfig())


def test_training_reduces_a_loss() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer, schedule = build_optimizer(net, OptimConfig(lr=0.05, warmup=5, weight_decay=0.0), 100)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    first = last = float(((net(x) - y) ** 2).mean().detach())
    for _ in range(100):
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        last = float(loss.detach())
    assert last < 0.2 * first
