"""CoLT5's conditional feed-forward: its definition, the contract of both sides, and that causal backbones refuse it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.colt5 import CoLT5
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.testing import check_mixer


def test_the_contract() -> None:
    traits = Traits(paper="of the house", causal=False, bidirectional=True, streaming=False, state="none")

    def make(dim: int) -> nn.Module:
        config = BackboneConfig(
            dim=dim, depth=1, mixers=["attention"], direction="both", ffn={"name": "colt5", "share": 0.3}
        )
        return Backbone(config)

    kept = ("manners", "rows", "both sides", "padding", "resets", "gradients", "bfloat16")
    assert check_mixer(make, traits=traits, dims=(16,), only=kept, probed=31)


def test_colt5_is_its_definition() -> None:
    torch.manual_seed(0)
    m = CoLT5(8, 2.0, share=0.3).double()
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    resets = torch.zeros(2, 15, dtype=torch.bool)
    resets[1, 4] = True
    got = m(x, Layout(lengths=torch.tensor([15, 11]), resets=resets))
    for row, a, b in ((0, 0, 15), (1, 0, 4), (1, 4, 11)):
        piece, k = x[row, a:b], math.ceil(0.3 * (b - a))
        s = m.router(piece)[:, 0]
        shift = -s  # the published iteration
        for _ in range(300):
            level = math.log(k) - torch.logsumexp(s + shift, 0)
            shift = torch.minimum(-s - level, torch.zeros(()).double())
        p = torch.exp(s + shift + level)
        want = m.light(piece)
        for t in s.argsort(descending=True)[:k].tolist():
            want[t] = want[t] + p[t] * m.heavy(piece[t])
        torch.testing.assert_close(got[row, a:b], want, rtol=1e-6, atol=1e-8)
    m(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in m.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="colt5 chooses tokens of the whole sequence"):
        Backbone(BackboneConfig(dim=8, ffn="colt5"))
    with pytest.raises(ValueError, match="colt5 chooses tokens of the whole sequence"):
        Backbone(BackboneConfig(dim=8, ffn="colt5", parts=["s4d"]))
    # The first block of these runs its mixer forwards, and is causal but for the feed-forward.
    alternate = Backbone(BackboneConfig(dim=8, depth=1, ffn="colt5", direction="alternate"))
    assert not alternate.causal
    assert not alternate.streaming
    with pytest.raises(ValueError, match="above 0 and at most 1, got 2"):
        CoLT5(8, 2.0, share=2)
    with pytest.raises(ValueError, match="light 0"):
        CoLT5(8, 2.0, light=0)
