"""Feedback memory: against its definition, token by token, with gradients; batches of unlike rows; segments; and the whole contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.feedback import Feedback
from mmlong.backbone.segmented import segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.testing import check_mixer


def build(window: int = 5, layers: int = 2, heads: int = 2) -> Feedback:
    torch.manual_seed(0)
    made = Feedback(layers, 8, window=window, heads=heads).double()
    with torch.no_grad():
        made.merge.normal_()
    return made


def by_definition(m: Feedback, x: Tensor) -> Tensor:
    """One token at a time, of one document a row."""
    memories: list[Tensor] = []
    w, d, rows = m.merge.softmax(0), 8 // m.heads, []
    for t in range(x.shape[1]):
        h = x[:, t]
        found = [h]
        for layer in m.layers:
            past = memories[-m.window :]
            if past:
                q = layer.q_proj(layer.norm1(h)).view(-1, m.heads, d)
                parts = []
                for n, memory in enumerate(past):
                    distance = len(past) - n
                    k = m.k_proj(m.norm(memory)).view(-1, m.heads, d) + m.places[m.window - distance]
                    parts.append((q * k).sum(-1) / math.sqrt(d))
                a = torch.stack(parts, -1).softmax(-1)
                v = torch.stack([m.v_proj(m.norm(memory)).view(-1, m.heads, d) for memory in past], 2)
                h = h + layer.out_proj((a[..., None] * v).sum(2).flatten(1))
            h = h + layer.ffn(layer.norm2(h))
            found.append(h)
        memories.append(sum(w[n] * one for n, one in enumerate(found)))
        rows.append(h)
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("window", "block"), [(1, 3), (5, 1), (5, 3), (5, 32), (40, 3)])
def test_is_its_definition(window: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.backbone.feedback.BLOCK", block)
    m = build(window)
    x = torch.randn(2, 23, 8, dtype=torch.float64, requires_grad=True)
    got, want = m(x)[0], by_definition(m, x)
    torch.testing.assert_close(got, want)
    leaves, r = [x, *m.parameters()], torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * r).sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_first_layer_reads_what_the_last_one_found() -> None:
    """What a plain stack of two layers cannot: through one layer of the next token, both layers of the one before."""
    m = build()
    x = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []
    m.layers[0].norm2.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    m(x)
    (g,) = torch.autograd.grad(seen[1].sum(), m.layers[1].ffn.w_out.weight)
    assert float(g.abs().max()) > 0


def test_batches_of_unlike_rows_in_pieces(monkeypatch: pytest.MonkeyPatch, unlike_rows: Callable[[Any], None]) -> None:
    monkeypatch.setattr("mmlong.backbone.feedback.BLOCK", 3)
    m = build()
    unlike_rows(m)
    # The state is the window, whatever has come.
    assert m(torch.randn(3, 37, 8, dtype=torch.float64))[1]["k"].shape[2] <= 5


def test_the_gradient_in_segments_is_the_whole_one() -> None:
    m = build(window=40)
    x = torch.randn(2, 31, 8, dtype=torch.float64)
    r = torch.randn_like(x)

    def step(pieces: Any, state: Any, layout: Any) -> tuple[Tensor, Any]:
        y, state = m(pieces[0], state, layout)
        return (y * pieces[1]).sum(), state

    layout = Layout(lengths=torch.tensor([31, 20]))
    found = []
    for segment in (31, 7):
        m.zero_grad()
        given = x.clone().requires_grad_()
        loss, _ = segmented_loss(m, step, [given, r * layout.valid(31)[..., None]], segment, None, layout)  # type: ignore[index]
        loss.backward()
        found.append([given.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.backbone.feedback.BLOCK", 7)

    class Made(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.inner = Backbone(BackboneConfig(dim=dim, parts=["gru", {"feedback": 2, "window": 6, "heads": 2}]))
            self.causal, self.streaming = self.inner.causal, self.inner.streaming

        def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
            return self.inner(x, state, layout)

    # Gradients are held against the definition's, and pieces above: of so many small steps both would take minutes.
    kept = ("manners", "rows", "causality", "padding", "resets", "segments", "bfloat16")
    assert check_mixer(Made, traits=Traits(paper="of the house", state="growing"), dims=(16,), only=kept, probed=31)


def test_how_it_is_written() -> None:
    made = Backbone(BackboneConfig(dim=16, parts=["mamba2", {"feedback": 3, "window": 7, "heads": 4, "ffn_ratio": 2}]))
    one: Any = made.parts()[1]
    assert (len(one.layers), one.window, one.heads, made.streaming) == (3, 7, 4, True)
    for part, message in (
        ({"feedback": 0}, "at least 1 layer"),
        ({"feedback": 2, "heads": 3}, "3 of 16"),
        ({"feedback": 2, "windows": 3}, "did you mean 'window'"),
        ({"feedback": 2, "parts": ["mamba2"]}, "no option 'parts'"),
    ):
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=16, parts=[part]))
