"""Routing attention against routing-transformer's k-means attention and, causal, against the definition; how centroids move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.mixers.centroids import Centroids


def build(dim: int = 24, **options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer("routing", dim, **{"heads": 4, "head_dim": 6, **options}).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(3)  # scores that matter
    return m


def tokens(m: Any, batch: int, length: int) -> Tensor:
    x = torch.randn(batch, length, m.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def heads(m: Any, t: Tensor) -> Tensor:
    return t.unflatten(-1, (-1, m.head_dim)).transpose(1, 2)


def sphere(m: Any, t: Tensor) -> Tensor:
    """A layer norm without scale and bias, by its formula."""
    t = heads(m, t)
    t = t - t.mean(-1, keepdim=True)
    return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(("length", "clusters", "window"), [(60, 5, 12), (61, 7, 4), (9, 2, 40)])
@pytest.mark.oracle("routing-transformer: KmeansAttention", "routing")
def test_against_routing_transformer(same_as: Any, length: int, clusters: int, window: int) -> None:
    code = pytest.importorskip("routing_transformer.routing_transformer")
    m = build(causal=False, local_heads=0, clusters=clusters, window=window)
    x = tokens(m, 2, length)
    attend = code.KmeansAttention(clusters, window, 4, 6).double().eval()
    attend.kmeans.means.copy_(m.centroids.means)
    attend.kmeans.initted.fill_(True)
    q, k, v = sphere(m, m.q_proj(x)), sphere(m, m.k_proj(x)), heads(m, m.v_proj(x))
    y, _ = attend(q, k, v)
    # Their mean over the centroids that took a token has 1e-5 in its denominator.
    same_as(m, x, m(x), (m.out_proj(y.transpose(1, 2).flatten(2)), None), 3e-5)


@pytest.mark.parametrize("length", [1, 9, 70])
@pytest.mark.oracle("definition: counting back", "routing")
def test_causal_against_the_definition(same_as: Any, length: int) -> None:
    m = build(clusters=3, window=5, local_window=4)
    x = tokens(m, 2, length)
    q, v = sphere(m, m.q_proj(x)), heads(m, m.v_proj(x))
    nearest = torch.einsum("bhsd,hcd->bhsc", q, m.centroids.means).argmax(-1)
    rows = []
    for i in range(length):
        seen = torch.zeros(2, 2, length, dtype=torch.bool)
        for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
            same = [j for j in range(i + 1) if nearest[b, h, j] == nearest[b, h, i]]
            seen[b, h, same[-5:]] = True
        scores = (q[:, :, i, None] * q).sum(-1) / 6**0.5
        rows.append((scores.masked_fill(~seen, -torch.inf).softmax(-1)[..., None] * v).sum(-2))
    routed = torch.stack(rows, 2)
    # The local heads.
    lq, lk, lv = (heads(m, t) for t in m.local_proj(x).chunk(3, -1))
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turn = torch.polar(torch.ones_like(angle), angle)
    lq, lk = (torch.complex(t[..., :3], t[..., 3:]) * turn for t in (lq, lk))
    lk = torch.cat([lk.real, lk.imag], -1)
    apart = torch.arange(length)[:, None] - torch.arange(length)
    scores = (torch.cat([lq.real, lq.imag], -1) @ lk.mT) / 6**0.5
    local = scores.masked_fill((apart < 0) | (apart > 4), -torch.inf).softmax(-1) @ lv
    y = m.out_proj(torch.cat([local, routed], 1).transpose(1, 2).flatten(2))
    found, state = m(x)
    assert torch.equal(state["cluster"][..., 0].long(), nearest)
    kept = {"k": state["k"], "local_k": state["local_k"], "local_v": state["local_v"], "v": state["v"]}
    want = {"k": q, "local_k": lk[:, :, -4:], "local_v": lv[:, :, -4:], "v": v}
    same_as(m, x, (found, kept), (y, want))


def test_local_heads_see_both_sides_within_the_window() -> None:
    m = build(causal=False, clusters=1, window=1, local_window=6)
    with torch.no_grad():
        m.v_proj.weight.zero_()
    x = tokens(m, 1, 20)
    (slope,) = torch.autograd.grad(m(x)[0][0, 9].sum(), x)
    assert slope[0].abs().amax(-1).nonzero().flatten().tolist() == list(range(6, 13))


def test_a_token_that_no_centroid_takes_has_nothing_from_the_routing_heads() -> None:
    m = build(causal=False, clusters=2, window=3, local_heads=0)
    y, _ = m(tokens(m, 1, 40))
    taken = m.centroids.strongest(sphere(m, m.q_proj(tokens(m, 1, 40))), 2, 3)
    for t in range(40):
        assert bool((y[0, t] == 0).all()) == (t not in taken)


def test_centroids_move_when_the_weights_do_and_not_before() -> None:
    m = build(clusters=3).train()
    x = tokens(m, 2, 40)
    at_first = m.centroids.means.clone()
    for _ in range(2):
        m(x)
    assert torch.equal(m.centroids.means, at_first)
    vectors = sphere(m, m.q_proj(x))
    nearest = torch.einsum("bhsd,hcd->bhsc", vectors, at_first).argmax(-1)
    with torch.no_grad():
        m.q_proj.weight.mul_(1.01)
    m(x)
    for h in range(2):
        for c in range(3):
            mine = vectors[:, h][nearest[:, h] == c]
            moved = (
                at_first[h, c] if not len(mine) else F.normalize(0.999 * at_first[h, c] + 0.001 * mine.mean(0), dim=0)
            )
            torch.testing.assert_close(m.centroids.means[h, c], moved)
    frozen = m.eval().centroids.means.clone()
    m(x)
    assert torch.equal(m.centroids.means, frozen)


def test_what_was_noted_is_saved() -> None:
    m = build(clusters=3).train()
    x = tokens(m, 2, 40)
    m(x)
    twin = build(clusters=3, seed=5).train()
    twin.load_state_dict(copy.deepcopy(m.state_dict()))
    for each in (m, twin):
        with torch.no_grad():
            each.q_proj.weight.mul_(1.01)
        each(x)
    assert torch.equal(m.centroids.means, twin.centroids.means)


def test_centroids_begin_on_the_sphere_by_a_seed() -> None:
    a, b, c = (Centroids(2, 5, 8, 0.9, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(a.means.norm(dim=-1), torch.ones(2, 5))
    assert torch.equal(a.means, b.means)
    assert not torch.equal(a.means, c.means)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_heads": 4}, "local_heads must leave one"),
        ({"clusters": 0}, "clusters must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"local_window": 0}, "local_window must be at least 1"),
        ({"decay": 1.0}, "decay must be in"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("routing", 24, heads=4, **options)
