"""Token Turing machine: against its definition, token by token, with gradients; what a token depends on; batches of unlike rows; and the whole contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.segmented import segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.testing import check_mixer

PARTS: list[Any] = [{"ttm": 3, "size": 4, "read": 2, "heads": 2, "parts": ["attention"]}]


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    one: Any = Backbone(BackboneConfig(dim=8, parts=[{**PARTS[0], **options}])).double().parts()[0]
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return one


def summary(s: Any, tokens: list[Tensor]) -> list[Tensor]:
    placed = [t + p for t, p in zip(tokens, s.places, strict=True)]
    scores = torch.stack([s.w_out(F.gelu(s.w_in(s.norm(t)))) for t in placed])
    weights = scores.exp() / scores.exp().sum(0)
    return [sum(weights[n, k] * t for n, t in enumerate(placed)) for k in range(weights.shape[1])]


def by_definition(m: Any, x: Tensor) -> Tensor:
    """One token of one document at a time."""
    outputs = []
    for row in x:
        memory, came, chunk, rows = [torch.zeros_like(row[0])] * m.memory, list(m.first), [], []
        for token in row:
            normed, d = m.norm(token), 8 // m.heads
            q = m.q_proj(normed).view(m.heads, d)
            k, v = (torch.stack([w(m.norm_out(o)).view(m.heads, d) for o in came]) for w in (m.k_proj, m.v_proj))
            a = ((q * k).sum(-1) / math.sqrt(d)).softmax(0)
            rows.append(token + m.out_proj((a[..., None] * v).sum(0).flatten()))
            chunk.append(token)
            if len(chunk) == m.size:
                came = list(m.inner(torch.stack(summary(m.read, [*memory, *chunk]))[None])[0][0])
                memory = summary(m.write, [*memory, *chunk, *came])
                chunk = []
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@pytest.mark.parametrize("size", [1, 4, 30])
def test_is_its_definition(size: int) -> None:
    m = build(size=size)
    x = torch.randn(2, 23, 8, dtype=torch.float64, requires_grad=True)
    want = by_definition(m, x)
    # The same where rows are told apart.
    for layout in (None, Layout(lengths=torch.tensor([23, 23]))):
        got = m(x, None, layout)[0]
        torch.testing.assert_close(got, want)
        leaves, r = [x, *m.parameters()], torch.randn_like(got)
        found = (torch.autograd.grad((y * r).sum(), leaves, allow_unused=True, retain_graph=True) for y in (got, want))
        for a, b in zip(*found, strict=True):
            if a is not None or b is not None:
                torch.testing.assert_close(*(torch.zeros(1).double() if g is None else g for g in (a, b)))


def test_what_a_token_depends_on() -> None:
    """The chunks before its own, all of them through the memory, and itself; and the parts inside see both sides."""
    m = build()
    assert not m.inner.causal
    assert m.causal
    assert m.streaming
    x = torch.randn(1, 24, 8, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(m(x)[0][0, 14].sum(), x)
    assert g[0].abs().sum(-1).nonzero().flatten().tolist() == [*range(12), 14]


def test_batches_of_unlike_rows_in_pieces(unlike_rows: Callable[[Any], None]) -> None:
    unlike_rows(build())


def test_the_gradient_in_segments_is_the_whole_one() -> None:
    m = build()
    x = torch.randn(2, 31, 8, dtype=torch.float64)
    layout = Layout(lengths=torch.tensor([31, 20]))
    r = torch.randn_like(x) * layout.valid(31)[..., None]  # type: ignore[index]

    def step(pieces: Any, state: Any, layout: Any) -> tuple[Tensor, Any]:
        y, state = m(pieces[0], state, layout)
        return (y * pieces[1]).sum(), state

    found = []
    for segment in (31, 7):
        m.zero_grad()
        given = x.clone().requires_grad_()
        segmented_loss(m, step, [given, r], segment, None, layout)[0].backward()
        found.append([given.grad, *(p.grad for p in m.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_contract() -> None:
    class Made(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.inner = Backbone(BackboneConfig(dim=dim, parts=["gru", {**PARTS[0], "size": 7}], ffn="none"))
            self.causal, self.streaming = self.inner.causal, self.inner.streaming

        def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
            return self.inner(x, state, layout)

    # Gradients are held against the definition's.
    kept = ("manners", "rows", "causality", "pieces", "padding", "resets", "segments", "bfloat16")
    assert check_mixer(Made, traits=Traits(paper="of the house", state="growing"), dims=(16,), only=kept, probed=31)


def test_how_it_is_written() -> None:
    made = Backbone(BackboneConfig(dim=16, parts=["mamba2", {"ttm": 5, "size": 6, "read": 3, "parts": ["mamba2 x 2"]}]))
    assert len(made.blocks()) == 3
    assert made.streaming
    assert made.causal
    # A mixer that has no two-sided form runs both ways inside.
    assert type(made.blocks()[1].mixer).__name__ == "BothWays"
    for part, message in (
        ({"ttm": 0, "parts": ["mamba2"]}, "at least 1"),
        ({"ttm": 2, "heads": 3, "parts": ["mamba2"]}, "3 of 16"),
        ({"ttm": 2}, "needs parts"),
        ({"ttm": 2, "sizes": 3, "parts": ["mamba2"]}, "did you mean 'size'"),
    ):
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=16, parts=[part]))
