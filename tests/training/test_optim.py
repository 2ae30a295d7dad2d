from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmlong.mixers import list_mixers
from mmlong.models import build_model, create_model
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
    peak = min(warmup, (warmup + total) // 2)
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert rates[peak] == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[peak:]))
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


@pytest.mark.parametrize("mixer", list_mixers())
def test_muon_gets_the_linear_maps_of_the_backbone_and_nothing_else(mixer: str) -> None:
    net = create_model("pixel_sequence", size=[4, 4], dim=16, depth=2, mixers=[mixer])
    groups = parameter_groups(net, OptimConfig(name="muon"))
    names = {id(p): name for name, p in net.named_parameters()}
    fallback = {names[id(p)] for group in groups if group.get("use_fallback") for p in group["params"]}
    orthogonal = {names[id(p)] for group in groups if not group.get("use_fallback") for p in group["params"]}
    assert fallback | orthogonal == set(names.values())
    assert {"backbone.stages.0.0.ffn.w_in.weight", "backbone.stages.0.1.ffn.w_out.weight"} <= orthogonal
    maps = [m for m in net.backbone.blocks()[0].mixer.modules() if isinstance(m, nn.Linear)]
    assert any(".mixer." in name for name in orthogonal) == bool(maps)
    hints = optim_hints(net)
    for name, p in net.named_parameters():
        if name.startswith(("modality", "head")) or name in hints or p.ndim != 2 or "conv" in name:
            assert name in fallback, name
    if mixer == "mamba2":
        assert any(name.endswith("conv_weight") for name in fallback), "a convolution's taps are a matrix only in form"


def test_muon_moves_matrices_orthogonally_and_the_rest_as_adamw() -> None:
    """Momentum and decay off, Muon's first update of a matrix is orthogonal; a vector's is AdamW's: the rate times the sign."""
    torch.manual_seed(0)
    net = create_model("pixel_sequence", size=[4, 4], dim=16, depth=1, mixers=["mamba2"])
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.0, warmup=0, options={"fallback_lr_scale": 0.1})
    optimizer, _ = build_optimizer(net, config, 10)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in net.named_parameters()}
    step = moved["backbone.stages.0.0.ffn.w_out.weight"]
    values = torch.linalg.svdvals(step.double())
    assert float(values.min() / values.max()) > 0.5, "all directions move alike, to the five steps of Newton and Schulz"
    for name in ("head.linear.weight", "modality.pixel.weight", "backbone.norm.bias"):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 0.002), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layer_decay_is_timms(name: str) -> None:
    """timm's own groups store the scale of each layer; here it is in the rate, on top of what hints ask for."""
    from timm.optim import param_groups_layer_decay

    net = create_model("pixel_pyramid", size=[8, 8], dim=[8, 16], depth=[1, 2], pool=[4], mixers=["s4d"])
    scale = {id(p): g["lr_scale"] for g in param_groups_layer_decay(net, layer_decay=0.6) for p in g["params"]}
    hints = optim_hints(net)
    optimizer, schedule = build_optimizer(net, OptimConfig(name=name, lr=2.0, layer_decay=0.6, warmup=3), 10)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(set(scale.values())) > 3
    for key, p in net.named_parameters():
        wanted = 2.0 * scale[id(p)] * hints.get(key, {}).get("lr_scale", 1.0)
        assert rate[id(p)] == pytest.approx(wanted / 4), f"{key}: the first of four steps up to the peak"
    assert all(
        base == pytest.approx(4 * group["lr"])
        for base, group in zip(schedule.base_lrs, optimizer.param_groups, strict=True)
    )


def test_an_unknown_optimiser_or_option_is_answered() -> None:
    with pytest.raises(ValueError, match="no optimiser 'adamv'.*did you mean"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(name="adamv"), 10)
    with pytest.raises(ValueError, match="adamw does not take these options.*nesterof"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(options={"nesterof": True}), 10)
    optimizer, _ = build_optimizer(nn.Linear(2, 2), OptimConfig(name="sgd", options={"momentum": 0.5}), 10)
    assert optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize(("kind", "name"), [("masked", "mask"), ("autoregressive", "start")])
def test_what_stands_in_for_a_token_belongs_to_the_stem(kind: str, name: str) -> None:
    direction = "alternate" if kind == "masked" else "causal"
    net = build_model(
        {"kind": kind, "modality": {"name": "genome"}, "backbone": {"dim": 8, "direction": direction}, "head": {}}
    )
    groups = parameter_groups(net, OptimConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    found = {id(p): group for group in groups for p in group["params"]}
    named = dict(net.named_parameters())
    assert found[id(named[name])]["lr"] == found[id(named["modality.letter.weight"])]["lr"] < 0.1
    assert found[id(named[name])]["weight_decay"] == 0.0
