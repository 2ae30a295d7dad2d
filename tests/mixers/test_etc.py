"""ETC against its formula, written densely: one matrix of scores over global and long tokens together, and a label for every pair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("etc", dim, **{"causal": False, **options}).double()
    with torch.no_grad():
        for name, p in m.named_parameters():
            # Labels and global tokens that matter.
            p.mul_(2) if "proj" in name else p.add_(torch.randn_like(p))
    return m


def by_definition(m: Any, x: Tensor) -> Tensor:
    N, T, _ = x.shape
    g, far = m.globals, m.max_distance
    heads = (m.heads, m.head_dim)

    def distances(n: int) -> Tensor:
        place = torch.arange(n)
        return (place - place[:, None]).clamp(-far, far) + far

    def attend(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
        """A vector a pair, added to its key; one softmax over all keys."""
        scores = torch.einsum("bihd,bijhd->bhij", q, k[:, None] + labels) / math.sqrt(m.head_dim)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)

    tokens = m.global_tokens.expand(N, -1, -1)
    q, k, v = (p(x).unflatten(-1, heads) for p in (m.q_proj, m.k_proj, m.v_proj))
    gq, gk, gv = (p(tokens).unflatten(-1, heads) for p in (m.q_global, m.k_global, m.v_global))
    labels = torch.cat(
        [m.global_labels.transpose(0, 1)[distances(g)], m.global_to_long.expand(g, T, *heads)], 1
    )  # (g, g + T, H, d)
    everything = torch.ones(g, g + T, dtype=torch.bool)
    read = attend(gq, torch.cat([gk, k], 1), torch.cat([gv, v], 1), labels, everything)
    tokens = F.layer_norm(tokens + m.out_global(read), (m.dim,), m.norm.weight, m.norm.bias)
    gk, gv = (p(tokens).unflatten(-1, heads) for p in (m.k_global, m.v_global))
    labels = torch.cat([m.long_to_global.expand(T, g, *heads), m.long_labels.transpose(0, 1)[distances(T)]], 1)
    place = torch.arange(T)
    seen = torch.cat([torch.ones(T, g, dtype=torch.bool), (place - place[:, None]).abs() <= m.window], 1)
    return m.out_proj(attend(q, torch.cat([gk, k], 1), torch.cat([gv, v], 1), labels, seen))


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (70, {"window": 9, "globals": 3, "max_distance": 4}),
        (131, {"window": 20, "globals": 5, "max_distance": 1, "bias": True}),
        (70, {"window": 4, "globals": 1, "max_distance": 4}),
        (70, {"window": 3, "globals": 2, "max_distance": 12}),
        (1, {"window": 9, "globals": 3, "max_distance": 4}),
    ],
)
@pytest.mark.oracle("definition: a label a pair", "etc")
def test_against_the_definition(same_as: Any, length: int, options: dict[str, Any]) -> None:
    m = build(24, heads=3, **options)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), (by_definition(m, x), None))


def test_the_window_is_that_of_xformers() -> None:
    """With global tokens whose values are nothing, who sees whom, from the Jacobian, beside the mask of its local attention."""
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    m = build(8, heads=1, window=5, globals=1, max_distance=3)
    with torch.no_grad():
        for p in (m.k_global, m.v_global):
            p.weight.zero_()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: m(t)[0].sum((0, 2)), x)[:, 0]
    local = bias.LocalAttentionFromBottomRightMask(window_left=5, window_right=5)
    assert torch.equal(jacobian.abs().sum(-1) > 1e-12, local.materialize((20, 20)) == 0)


def test_what_is_far_comes_by_the_global_tokens() -> None:
    m = build(16, heads=2, window=3, globals=2)
    x = torch.randn(1, 200, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 150] += 1.0
    assert float((m(x)[0] - m(other)[0])[:, :20].abs().min().detach()) > 0


def test_initial_sizes() -> None:
    torch.manual_seed(0)
    m: Any = create_mixer("etc", 256)
    assert m.global_tokens.shape == (32, 256)
    assert m.long_labels.shape == m.global_labels.shape == (4, 25, 64)
    for p in (m.global_tokens, m.long_labels, m.global_labels):
        assert abs(float(p.detach().std()) - 0.02) < 0.002


def test_impossible_options() -> None:
    for name in ("window", "globals", "max_distance"):
        with pytest.raises(ValueError, match=f"ETC: {name} must be at least 1, got 0"):
            create_mixer("etc", 16, causal=False, **{name: 0})
    with pytest.raises(ValueError, match="ETC has no causal form"):
        create_mixer("etc", 16, causal=True)
