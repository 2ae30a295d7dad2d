"""Product-key memory: against all n^2 keys, and product-key-memory's; in blocks; and the whole contract, in training too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.feedforward import create_ffn
from mmlong.backbone.product_key_memory import ProductKeyMemory, candidates
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.testing import check_mixer
from mmlong.training.optim import OptimConfig, parameter_groups


def build(keys: int = 9, topk: int = 5, **options: Any) -> ProductKeyMemory:
    torch.manual_seed(0)
    made = ProductKeyMemory(8, 2.0, keys=keys, heads=3, topk=topk, **options).double()
    with torch.no_grad():
        made.scale.normal_()
        made.shift.normal_()
    return made


def by_all_keys(m: ProductKeyMemory, x: Tensor) -> Tensor:
    """One token and head at a time, every key whole."""
    n, rows = m.keys.shape[2], []
    for t in x.reshape(-1, x.shape[-1]):
        y = torch.zeros_like(t)
        for h, q in enumerate(m.query(t).unflatten(0, (m.heads, 2, -1))):
            q = torch.stack([(p - p.mean()) / (p.var(unbiased=False) + 1e-5).sqrt() for p in q])
            q = (q * m.scale[h] + m.shift[h]).flatten()
            keys = torch.stack([torch.cat([m.keys[h, 0, i], m.keys[h, 1, j]]) for i in range(n) for j in range(n)])
            scores = keys @ q
            best = scores.argsort(descending=True)[: m.topk]
            y = y + scores[best].softmax(0) @ m.values[best]
        rows.append(y)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(("keys", "topk"), [(9, 5), (9, 1), (4, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("scores", [1, 1 << 21], ids=["a token at a time", "whole"])
def test_is_its_definition(keys: int, topk: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.backbone.product_key_memory.SCORES", scores)
    m = build(keys, topk)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    got, want = m(x), by_all_keys(m, x)
    torch.testing.assert_close(got, want)
    leaves, r = [x, *m.parameters()], torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * r).sum(), leaves, allow_unused=True) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_the_best_pairs_are_among_the_candidates() -> None:
    r = torch.Generator().manual_seed(0)
    for k in (1, 2, 7, 32):
        few = candidates(k)
        assert len(few) == len(set(few)) < k * k or k == 1
        for _ in range(20):
            a, b = (torch.randn(k, generator=r, dtype=torch.float64).sort(descending=True).values for _ in range(2))
            best = (a[:, None] + b).flatten().topk(k).indices.tolist()
            assert {divmod(p, k) for p in best} <= set(few)
    assert len(candidates(32)) == 119


def test_against_product_key_memory() -> None:
    """Its layer norm, of one scale for all heads and halves; weights copied."""
    pytest.importorskip("product_key_memory")
    from product_key_memory import PKM

    m = build(query_dim=12)
    with torch.no_grad():
        m.query.bias.zero_()
        m.scale.copy_(torch.randn(6).expand(3, 2, 6))
        m.shift.copy_(torch.randn(6).expand(3, 2, 6))
    theirs = PKM(8, heads=3, num_keys=9, topk=5, dim_head=6).double()
    with torch.no_grad():
        theirs.to_queries.weight.copy_(m.query.weight.view(3, 2, 6, 8).transpose(0, 1).reshape(36, 8))
        theirs.keys.copy_(m.keys.transpose(1, 2))
        theirs.norm.weight.copy_(m.scale[0, 0])
        theirs.norm.bias.copy_(m.shift[0, 0])
        theirs.values.weight.copy_(m.values)
    x = torch.randn(2, 63, 8, dtype=torch.float64, requires_grad=True)
    got, want = m(x), theirs(x)
    torch.testing.assert_close(got, want)
    r = torch.randn_like(got)
    mine = torch.autograd.grad((got * r).sum(), [x, m.keys, m.values])
    other = torch.autograd.grad((want * r).sum(), [x, theirs.keys, theirs.values.weight])
    torch.testing.assert_close(mine[0], other[0])
    torch.testing.assert_close(mine[1], other[1].transpose(1, 2))
    torch.testing.assert_close(mine[2], other[2])


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_contract(training: bool) -> None:
    class Made(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            ffn = {"name": "product_key_memory", "keys": 12, "topk": 6, "heads": 2}
            self.inner = Backbone(BackboneConfig(dim=dim, depth=1, ffn=ffn))
            self.causal = self.streaming = True

        def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
            self.inner.train(training)
            return self.inner(x, state, layout)

    kept = ("rows", "causality", "pieces", "padding", "resets", "segments", "bfloat16")
    assert check_mixer(Made, traits=Traits(paper="of the house", streaming=True), dims=(16,), only=kept, probed=31)


def test_it_learns_where_to_look() -> None:
    """A table of random answers to 64 tokens: more than its 16 + 16 halves of keys could each have one for."""
    torch.manual_seed(0)
    m = ProductKeyMemory(16, 2.0, keys=16, heads=2, topk=8)
    x, want = torch.randn(64, 16), torch.randn(64, 16)
    optimiser = torch.optim.Adam(m.parameters(), lr=0.02)
    for _ in range(150):
        loss = F.mse_loss(m(x), want)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1 * float(want.square().mean())


def test_options() -> None:
    assert isinstance(create_ffn({"name": "product_key_memory", "keys": 32}, 8, 2.0), ProductKeyMemory)
    groups = parameter_groups(Backbone(BackboneConfig(dim=8, depth=1, ffn="product_key_memory")), OptimConfig(lr=0.1))
    (of_values,) = [g for g in groups if g["lr"] == pytest.approx(0.4)]
    assert [tuple(p.shape) for p in of_values["params"]] == [(128**2, 8)]
    assert of_values["weight_decay"] == 0
    for options, message in (
        ({"topk": 0}, "topk 0 of 9"),
        ({"topk": 10}, "at most as many"),
        ({"query_dim": 3}, "even"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    with pytest.raises(TypeError, match="did you mean 'topk'"):
        create_ffn({"name": "product_key_memory", "top_k": 2}, 8, 2.0)
