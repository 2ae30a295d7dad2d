"""Mixture of depths: the whole contract, its definition, documents of which nothing is chosen, and that the share is learned."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.mixers.own_loss import mean_own_loss, own_losses
from mmlong.testing import check_mixer

KEPT = (
    "manners", "rows", "causality", "both sides", "pieces", "padding", "resets", "gradients", "segments", "bfloat16",
)  # fmt: skip
LOCAL: dict[str, Any] = {"name": "local", "window": 5, "heads": 2}


class Made(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.inner = Backbone(BackboneConfig(**config))
        self.causal, self.streaming = self.inner.causal, self.inner.streaming

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
        return self.inner(x, state, layout)


def mixture(*parts: Any, share: float = 0.3, **options: Any) -> list[Any]:
    return [{"mixture_of_depths": share, "parts": list(parts), **options}]


CAUSAL: dict[str, list[Any]] = {
    "window": mixture(LOCAL),
    "nested": ["s4d", *mixture({"pool": 2, "parts": ["s4d"]})],
}


@pytest.mark.parametrize("name", list(CAUSAL))
def test_the_contract_causal(name: str) -> None:
    traits = Traits(paper="of the house", streaming=True, state="growing")

    def make(dim: int) -> nn.Module:
        return Made(dim=dim, parts=CAUSAL[name], ffn="none")

    kept = [p for p in KEPT if p != "both sides"] if name == "window" else ["pieces", "padding", "resets", "segments"]
    assert check_mixer(make, traits=traits, dims=(16,), only=kept, probed=31)


def test_the_contract_of_both_sides() -> None:
    traits = Traits(paper="of the house", causal=False, bidirectional=True, streaming=False, state="none")

    def make(dim: int) -> nn.Module:
        return Made(dim=dim, direction="both", parts=mixture("attention"), ffn="none")

    # Not "both sides": what is not chosen is not seen by others.
    kept = ("manners", "rows", "padding", "resets", "gradients", "bfloat16")
    assert check_mixer(make, traits=traits, dims=(16,), only=kept, probed=31)


def part_of(parts: list[Any], **config: Any) -> Any:
    torch.manual_seed(0)
    one: Any = Backbone(BackboneConfig(dim=8, parts=parts, **config)).double().parts()[0]
    with torch.no_grad():
        one.router.weight.mul_(4)
        one.router.bias.fill_(-0.7)
    return one


def test_a_causal_mixture_is_its_definition() -> None:
    one = part_of(mixture("mamba2", weight=0.5)).train()
    x = torch.randn(1, 40, 8, dtype=torch.float64, requires_grad=True)
    with own_losses() as found:
        got = one(x)[0]
    r = [one.router(x[0, t])[0] for t in range(40)]
    chosen = [t for t in range(40) if r[t] > 0]
    assert 3 < len(chosen) < 37
    z = one.inner(x[:, chosen])[0][0]
    rows = [x[0, t] for t in range(40)]
    for i, t in enumerate(chosen):
        rows[t] = x[0, t] + torch.sigmoid(r[t]) * (z[i] - x[0, t])
    want = torch.stack(rows)[None]
    torch.testing.assert_close(got, want)
    best = sorted(range(40), key=lambda t: -float(r[t].detach()))[: math.ceil(0.3 * 40)]
    loss = sum(-torch.log(torch.sigmoid(r[t] if t in best else -r[t])) for t in range(40)) / 40
    own = mean_own_loss(found)
    assert own is not None
    torch.testing.assert_close(own, 0.5 * loss)
    leaves, weights = [x, one.router.weight, one.router.bias], torch.randn_like(want)
    grads = [torch.autograd.grad((y * weights).sum() + o, leaves) for y, o in ((got, own), (want, 0.5 * loss))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_two_sided_mixture_takes_the_best_of_each_document() -> None:
    one = part_of(mixture("attention"), direction="both")
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    resets = torch.zeros(2, 21, dtype=torch.bool)
    resets[0, 9] = True
    got = one(x, None, Layout(lengths=torch.tensor([21, 10]), resets=resets))[0]
    for row, a, b in ((0, 0, 9), (0, 9, 21), (1, 0, 10)):
        piece = x[row : row + 1, a:b]
        r = one.router(piece)[0, :, 0]
        best = sorted(r.argsort(descending=True)[: math.ceil(0.3 * (b - a))].tolist())
        want = piece.clone()
        z = one.inner(piece[:, best])[0]
        want[:, best] += torch.sigmoid(r[best])[:, None] * (z - piece[:, best])
        torch.testing.assert_close(got[row : row + 1, a:b], want)
    assert not one.has_own_loss


def test_documents_of_which_nothing_is_chosen() -> None:
    """Token by token, with documents that begin long before something of them is chosen, or end without."""
    one = part_of(mixture("gru"))
    with torch.no_grad():
        one.router.bias.fill_(0)
        one.router.weight.copy_(torch.eye(8)[:1])
    x = torch.randn(3, 24, 8, dtype=torch.float64)
    x[..., 0] = -1
    for row, t in ((0, 3), (0, 12), (0, 13), (1, 20)):
        x[row, t, 0] = 1
    resets = torch.zeros(3, 24, dtype=torch.bool)
    for row, t in ((0, 5), (0, 8), (0, 15), (1, 2), (2, 7)):
        resets[row, t] = True
    layout = Layout(lengths=torch.tensor([24, 22, 9]), resets=resets)
    whole, last = one(x, None, layout)
    for row, cuts in enumerate(([0, 5, 8, 15, 24], [0, 2, 22], [0, 7, 9])):
        for a, b in itertools.pairwise(cuts):
            torch.testing.assert_close(whole[row : row + 1, a:b], one(x[row : row + 1, a:b])[0])
    assert torch.equal(last["waiting"], torch.tensor([True, False, True]))
    more = torch.randn(3, 6, 8, dtype=torch.float64)
    for size in (1, 7):
        state, found = None, []
        for a in range(0, 24, size):
            y, state = one(x[:, a : a + size], state, layout.slice(a, min(a + size, 24)))
            found.append(y)
        valid = layout.valid(24)
        torch.testing.assert_close(torch.cat(found, 1)[valid], whole[valid])
        torch.testing.assert_close(one(more, state)[0], one(more, last)[0])


def test_the_share_is_learned() -> None:
    """By the loss of its own alone, from a router that at first chooses half of the tokens."""
    one = part_of(mixture("gru", share=0.125, weight=1.0)).float().train()
    with torch.no_grad():
        one.router.bias.fill_(0)
    optimiser = torch.optim.Adam(one.router.parameters(), lr=0.03)
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        with own_losses() as found:
            one(torch.randn(2, 64, 8, generator=draw))
        loss = mean_own_loss(found)
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    share = (one.scores(torch.randn(8, 256, 8, generator=draw)) > 0).float().mean()
    assert 0.09 < float(share) < 0.16


def test_where_nothing_is_chosen_every_parameter_has_a_gradient() -> None:
    """Ranks wait for all."""
    one = part_of(mixture("gru"))
    with torch.no_grad():
        one.router.bias.fill_(-100)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y, _ = one(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert all(p.grad is not None and not bool(p.grad.any()) for p in one.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a mixture of depths takes a share .* got 0"):
        Backbone(BackboneConfig(dim=8, parts=mixture("mamba2", share=0)))
    with pytest.raises(ValueError, match="weight of a loss"):
        Backbone(BackboneConfig(dim=8, parts=mixture("mamba2", weight=-1)))
