"""Attention through inducing points against isab-pytorch, and with its inner block against the paper's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mmlong.mixers import create_mixer


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer("set_transformer", 24, causal=False, **{"heads": 3, "points": 5, **options}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return m


@pytest.mark.oracle("isab-pytorch: ISAB", "set_transformer")
def test_against_isab(same_as: Any) -> None:
    code = pytest.importorskip("isab_pytorch")
    m = build(inner_block=False)
    theirs = code.ISAB(dim=24, heads=3, num_latents=5).double()
    for attn in (theirs.attn1, theirs.attn2):
        attn.to_q, attn.to_kv, attn.to_out = (torch.nn.Linear(24, n, bias=False).double() for n in (24, 48, 24))
        attn.scale = 8**-0.5  # its heads are 64 wide whatever the width
    weights = {"latents": m.points}
    for name, mine in (("attn1", m.gather), ("attn2", m.spread)):
        weights[f"{name}.to_q.weight"] = mine.q_proj.weight
        weights[f"{name}.to_kv.weight"] = torch.cat([mine.k_proj.weight, mine.v_proj.weight])
        weights[f"{name}.to_out.weight"] = mine.out_proj.weight
    x = torch.randn(2, 31, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), (functional_call(theirs, weights, (x,))[0], None))


@pytest.mark.oracle("definition: MAB(I, X) by torch's layers", "set_transformer")
def test_against_the_formula(same_as: Any) -> None:
    m = build()
    x = torch.randn(2, 31, 24, dtype=torch.float64, requires_grad=True)

    def multi_head(p: Any, a: Tensor, b: Tensor) -> Tensor:
        y, _ = torch.nn.functional.multi_head_attention_forward(
            a.transpose(0, 1), b.transpose(0, 1), b.transpose(0, 1), 24, 3, None, None, None, None, False, 0.0,
            p.out_proj.weight, None, use_separate_proj_weight=True, q_proj_weight=p.q_proj.weight,
            k_proj_weight=p.k_proj.weight, v_proj_weight=p.v_proj.weight,
        )  # fmt: skip
        return y.transpose(0, 1)

    def norm(t: Tensor, p: Any) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + p.eps).sqrt() * p.weight + p.bias

    points = m.points.expand(2, -1, -1)
    mab = m.gather
    Z = norm(points + multi_head(mab.attend, points, x), mab.norm_attention)
    H = norm(Z + (Z @ mab.feedforward.weight.T + mab.feedforward.bias).clamp_min(0), mab.norm_feedforward)
    same_as(m, x, m(x), (multi_head(m.spread, x, H), None))


def test_a_set_has_no_order() -> None:
    m = build()
    x = torch.randn(2, 31, 24, dtype=torch.float64)
    order = torch.randperm(31)
    torch.testing.assert_close(m(x[:, order])[0], m(x)[0][:, order])


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="set_transformer: points must be at least 1, got 0"):
        build(points=0)
    with pytest.raises(ValueError, match="no causal form"):
        create_mixer("set_transformer", 24, causal=True)
