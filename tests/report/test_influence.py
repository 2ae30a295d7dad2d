"""Who influences whom: against what a backbone is known to see, and against finite differences."""

from __future__ import annotations

import pytest
import torch

from mmlong.measure.pattern import seen_at
from mmlong.models import build_model
from mmlong.report.influence import Influence, influence_figure, influence_of


def _text(**backbone: object) -> dict[str, object]:
    return {
        "modality": {"name": "text"},
        "backbone": {
            "dim": 8,
            "depth": 1,
            "mixers": [{"name": "local", "window": 4}],
            "direction": "causal",
            **backbone,
        },
    }


def test_a_causal_window_is_seen_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = build_model({"kind": "autoregressive", **_text()}).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    raw = torch.randint(256, (1, 100), dtype=torch.uint8)
    found = influence_of(model, raw, 40)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.seen.shape == (40, 40)
    assert found.places == list(range(40))
    seen = found.seen > 0
    assert not seen.triu(1).any()
    reach = (torch.arange(40)[:, None] - torch.arange(40))[seen].max()
    assert 0 < int(reach) <= 4
    assert torch.equal(found.seen, influence_of(model, raw, 40).seen)  # the same every time
    shares = found.by_distance()
    assert sum(share for *_, share in shares) == pytest.approx(1)
    assert sum(share for low, _, share in shares if low >= 16) == 0
    figure = influence_figure(found, "<a sample>")
    assert "&lt;a sample&gt;" in figure
    assert "data:image/png;base64," in figure


def test_a_backbone_that_pools_has_fewer_outputs() -> None:
    config = {
        **_text(dim=[8, 8], depth=[1, 1], pool=[4], direction="alternate"),
        "head": {"name": "classify", "num_classes": 3},
    }
    found = influence_of(build_model(config), torch.randint(256, (1, 64), dtype=torch.uint8))
    assert found.seen.shape == (16, 64)
    assert found.places[:2] == [1.5, 5.5]


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(3, 2)

    class Mix(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, state: None, layout: None) -> tuple[torch.Tensor, None]:
            return self.layer(x.cumsum(1)).tanh(), None

    x = torch.randn(1, 5, 3)
    found = seen_at(Mix(), x, [1, 4], draws=400)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v.cumsum(1)).tanh(), x)
    exact = (
        jacobian[0, :, :, 0].square().sum((1, 3)).sqrt()
    )  # the mean over unit-variance cotangents is the Frobenius norm
    torch.testing.assert_close(found.float(), exact[[1, 4]], rtol=0.15, atol=1e-6)


def test_edges() -> None:
    nothing = Influence(torch.zeros(2, 300, dtype=torch.float64), [0.0, 299.0])
    assert sum(share for *_, share in nothing.by_distance()) == 0
    assert "3 tokens share a column" in influence_figure(nothing, "x")
    model = build_model({"kind": "autoregressive", **_text()})
    with pytest.raises(ValueError, match=r"got \(1, 0\)"):
        influence_of(model, torch.zeros(1, 0, dtype=torch.uint8))
