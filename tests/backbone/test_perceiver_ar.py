"""Perceiver AR: the contract, the paper's model run on every prefix, what is dropped in training, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.segmented import segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.ops.rotary import rotary_reference
from mmlong.testing import check_mixer

KEPT = ("manners", "rows", "causality", "pieces", "padding", "resets", "segments", "bfloat16")


def build(latents: int = 4, dim: int = 8, **options: Any) -> Any:
    torch.manual_seed(0)
    spec = {"perceiver_ar": latents, "heads": 2, "parts": ["attention x 2"], **options}
    made = Backbone(BackboneConfig(dim=dim, parts=[spec]))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.double().eval().parts()[0]


def test_the_contract() -> None:
    def make(dim: int) -> nn.Module:
        spec = {"perceiver_ar": 5, "heads": 2, "parts": [{"name": "local", "window": 3, "heads": 2}]}
        return Backbone(BackboneConfig(dim=dim, parts=[spec], ffn="none"))

    traits = Traits(paper="of the house", state="growing")
    assert check_mixer(make, traits=traits, dims=(16,), only=KEPT, probed=63)


def papers(one: Any, x: Tensor, latents: int, seen: Tensor | None = None) -> Tensor:
    """The paper's model of a context ``(L, D)``: its last tokens are latents, which read it all (or what is ``seen`` of it) once."""
    L, read = x.shape[0], one.read
    asked, known = read.norm_queries(x[-latents:]), read.norm_source(x)
    q, k, v = (
        p(t).view(t.shape[0], 2, -1) for p, t in ((read.q_proj, asked), (read.k_proj, known), (read.v_proj, known))
    )
    q, k = rotary_reference(q[None], torch.arange(L - latents, L))[0], rotary_reference(k[None], torch.arange(L))[0]
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    hidden = torch.arange(L) > torch.arange(L - latents, L)[:, None]
    if seen is not None:
        hidden = hidden | ~seen
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    z = x[-latents:] + read.out_proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    return one.inner.inner((z + one.ffn(one.norm(z)))[None])[0][0]


@pytest.mark.parametrize("length", [4, 22, 1])
def test_every_chunk_is_the_papers_model(length: int) -> None:
    one = build()
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    got, _ = one(x)
    want = torch.stack(
        [torch.cat([papers(one, row[: a + 4], len(row[a : a + 4])) for a in range(0, length, 4)]) for row in x]
    )
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, want)))


def test_batches_of_unlike_rows_in_pieces() -> None:
    one = build()
    resets = torch.zeros(3, 37, dtype=torch.bool)
    for row, position in ((0, 10), (0, 11), (1, 19), (2, 5), (0, 30)):
        resets[row, position] = True
    x = torch.randn(3, 37, 8, dtype=torch.float64)
    layout = Layout(lengths=torch.tensor([37, 20, 9]), resets=resets)
    whole, last = one(x, None, layout)
    for row, cuts in enumerate([[0, 10, 11, 30, 37], [0, 19, 20], [0, 5, 9]]):
        for a, b in itertools.pairwise(cuts):
            torch.testing.assert_close(whole[row : row + 1, a:b], one(x[row : row + 1, a:b])[0])
    more = torch.randn(3, 6, 8, dtype=torch.float64)
    valid = layout.valid(37)
    for size in (1, 5):
        state, parts = None, []
        for a in range(0, 37, size):
            y, state = one(x[:, a : a + size], state, layout.slice(a, min(a + size, 37)))
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid])
        torch.testing.assert_close(one(more, state)[0], one(more, last)[0])


def test_a_share_of_the_prefix_is_dropped_in_training() -> None:
    """Each chunk is the paper's model that does not see some of the tokens before it; which, is told by the gradient through the values."""
    one = build(dropout=0.5).train()
    x = torch.randn(2, 14, 8, dtype=torch.float64)
    found: list[Tensor] = []
    handle = one.read.v_proj.register_forward_hook(lambda module, given, out: found.append(out))
    got, _ = one(x)
    handle.remove()
    drawn = set()
    for row, a in itertools.product(range(2), range(0, 14, 4)):
        b = min(a + 4, 14)
        (g,) = torch.autograd.grad(got[row, b - 1].square().sum(), found[0], retain_graph=True)
        seen = g[row].abs().sum(-1) > 0
        assert int(seen[:a].sum()) == round(a / 2)
        assert bool(seen[a:b].all())
        drawn.add(tuple(seen[:8].tolist()) if a >= 8 else (row, a))
        torch.testing.assert_close(got[row, a:b], papers(one, x[row, :b], b - a, seen[:b]))
    assert len(drawn) > 5  # rows and chunks draw their own
    # In evaluation all is seen, and in segments what was drawn is drawn again.
    torch.testing.assert_close(one.eval()(x)[0], build(dropout=0.0)(x)[0])


def test_dropped_prefixes_are_replayed_in_segments() -> None:
    one = build(dropout=0.5).train()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    weights = torch.randn(1, 12, 8, dtype=torch.float64)

    def step(pieces: list[Tensor], state: Any, layout: Layout | None) -> tuple[Tensor, Any]:
        y, state = one(pieces[0], state, layout)
        return (y * pieces[1]).sum(), state

    torch.manual_seed(3)
    loss, _ = segmented_loss(one, step, [x, weights], 5)
    loss.backward()
    slopes = [p.grad.clone() for p in one.parameters()]
    one.zero_grad()
    torch.manual_seed(3)
    total, state = torch.zeros((), dtype=torch.float64), None
    for a in (0, 5, 10):
        part, state = step([x[:, a : a + 5], weights[:, a : a + 5]], state, None)
        total = total + part
    total.backward()
    torch.testing.assert_close(loss, total)
    for p, slope in zip(one.parameters(), slopes, strict=True):
        torch.testing.assert_close(p.grad, slope)


def test_what_it_does_not_go_with() -> None:
    for options, direction, message in (
        ({}, "both", "parts that are causal and stream"),
        ({"perceiver_ar": 0}, "causal", "at least 1 token"),
        ({"heads": 3}, "causal", "does not divide into 3 heads"),
        ({"dropout": 1.0}, "causal", r"dropout must be in \[0, 1\)"),
    ):
        spec = {"perceiver_ar": 4, "parts": ["attention"], **options}
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=16, parts=[spec], direction=direction))
