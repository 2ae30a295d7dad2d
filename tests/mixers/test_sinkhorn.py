"""Sinkhorn attention against sinkhorn-transformer and against its definition, block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer


def build(dim: int = 24, **options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer("sinkhorn", dim, **{"heads": 3, **options}).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(3)  # scores that matter
    return m


def tokens(m: Any, batch: int, length: int) -> Tensor:
    x = torch.randn(batch, length, m.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def heads(m: Any, t: Tensor) -> Tensor:
    return t.unflatten(-1, (m.heads, -1)).transpose(1, 2)


@pytest.mark.parametrize(("length", "block"), [(64, 8), (60, 12), (8, 8)])
@pytest.mark.oracle("sinkhorn-transformer: SinkhornAttention", "sinkhorn")
def test_against_sinkhorn_transformer(same_as: Any, length: int, block: int) -> None:
    """Its attention and balancing; its matrix without the Gumbel noise. It sorts keys where it should sort values, which is not seen where the two are alike."""
    code = pytest.importorskip("sinkhorn_transformer.sinkhorn_transformer")
    m = build(causal=False, block=block, iterations=5)
    m.v_proj = m.k_proj
    x = tokens(m, 2, length)
    attend = code.SinkhornAttention(block, 24, 8, 3, length, non_permutative=False).eval()

    class Sorted(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, topk: int) -> Tensor:
            means = [code.bucket(length // block, t).mean(2) for t in (q, k)]
            scores = torch.einsum("bie,bje->bij", *means) * 8**-0.5 / 0.75
            return code.sinkhorn_sorting_operator(scores, 5)

    attend.sort_net = Sorted()
    q, k, v = (heads(m, p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))
    y = m.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))
    same_as(m, x, m(x), (y, None))


def dense(m: Any, x: Tensor, b: int) -> Tensor:
    """The definition, one block at a time, one head at a time."""
    L, d, iterations = x.shape[1], m.head_dim, m.iterations
    out = torch.zeros(x.shape[0], m.heads, L, d, dtype=x.dtype)
    blocks = [slice(a, min(a + b, L)) for a in range(0, L, b)]
    n = len(blocks)
    for row in range(x.shape[0]):
        for h in range(m.heads):
            q, k, v = (p(x[row]).unflatten(-1, (m.heads, d))[:, h] for p in (m.q_proj, m.k_proj, m.v_proj))
            wants = [q[: s.start + 1].mean(0) if m.causal else q[s].mean(0) for s in blocks]
            scores = (
                torch.stack([torch.stack([w @ k[s].mean(0) for s in blocks]) for w in wants]) / d**0.5 / m.temperature
            )
            weights = scores.exp()
            if m.causal:
                below = torch.tril(torch.ones(n, n, dtype=x.dtype), -1)
                weights = weights * below
                for _ in range(iterations):
                    weights = weights / (weights.sum(1, keepdim=True) + 1 - below.amax(1, keepdim=True))
                    weights = weights / (weights.cumsum(0) + 1 - below)
            else:
                for _ in range(iterations):
                    weights = weights / weights.sum(1, keepdim=True)
                    weights = weights / weights.sum(0, keepdim=True)
            full = [torch.cat([t[s], t.new_zeros(b - (s.stop - s.start), d)]) for t in (k, v) for s in blocks]
            keys, values = full[:n], full[n:]
            for i, s in enumerate(blocks):
                own = s.stop - s.start
                K, V = (
                    torch.cat([sum(w * t for w, t in zip(weights[i], ts, strict=True)), ts[i][:own]])
                    for ts in (keys, values)
                )
                seen = torch.ones(own, b + own, dtype=torch.bool)
                if m.causal:
                    seen[:, b:] = torch.ones(own, own, dtype=torch.bool).tril()
                    seen[:, :b] = i > 0
                y = ((q[s] @ K.T) / d**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ V
                out = out.index_put((torch.tensor(row), torch.tensor(h), torch.arange(s.start, s.stop)), y)
    return m.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("length", [2, 5, 8, 23])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.oracle("definition: block by block", "sinkhorn")
def test_against_the_definition(same_as: Any, causal: bool, length: int) -> None:
    m = build(causal=causal, block=5, iterations=3)
    x = tokens(m, 2, length)
    found, _ = m(x)
    same_as(m, x, (found, None), (dense(m, x, min(5, length) if not causal else 5), None))


def test_blocks_are_about_the_root_of_the_length() -> None:
    m, named = build(causal=False), build(causal=False, block=8)
    x = tokens(m, 1, 64)
    torch.testing.assert_close(m(x)[0], named(x)[0])


def test_noise_is_gumbels_and_of_training_alone() -> None:
    m = build(causal=False)
    q = torch.zeros(1, 1, 400, 8, dtype=torch.float64)
    assert bool((m.scores(q, q) == 0).all())
    noise = m.train().scores(q, q) * m.temperature
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 0.05
    quiet = build(causal=False, noise=False).train()
    assert bool((quiet.scores(q, q) == 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Sinkhorn: {message}"):
        create_mixer("sinkhorn", 24, **options)
