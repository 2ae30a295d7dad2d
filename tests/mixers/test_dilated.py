"""LongNet's attention against dense softmaxes in float64 under explicit masks, mixed by their denominators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.ops.rotary import rotary_reference


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("dilated", dim, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    return m


def by_definition(m: Any, x: Tensor) -> Tensor:
    """For each segment length a softmax of its own and the sum of its exponentials; then the mean, weighed by the sums."""
    T, H = x.shape[1], m.heads
    q, k, v = (p(x).unflatten(-1, (H, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    if m.rope:
        q, k = (rotary_reference(t, torch.arange(T), m.rope_base) for t in (q, k))
    exponentials = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(m.head_dim)).exp()
    place = torch.arange(T)
    outputs, sums = [], []
    for w, r in zip(m.segments, m.rates, strict=True):
        taken = place % r == (torch.arange(H) % r)[:, None]
        seen = taken[:, :, None] & taken[:, None] & (place[:, None] // w == place // w)
        if m.causal:
            seen = seen & (place <= place[:, None])
        some = exponentials * seen
        sums.append(some.sum(-1))
        outputs.append(torch.einsum("bhij,bjhd->bhid", some / some.sum(-1, keepdim=True).clamp_min(1e-300), v))
    share = torch.stack(sums) / torch.stack(sums).sum(0)
    y = (torch.stack(outputs) * share[..., None]).sum(0)
    return m.out_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (100, {"segments": [4, 16, 32], "rates": [1, 2, 4]}),
        (64, {"segments": [8, 16], "rates": [1, 8], "rope": False}),
        (61, {"segments": [6, 6, 30], "rates": [1, 1, 5]}),
        (45, {"segments": [128], "rates": [1]}),
        (3, {"segments": [4, 16], "rates": [1, 8]}),
    ],
)
@pytest.mark.oracle("definition: softmaxes under masks", "dilated")
def test_against_the_definition(same_as: Any, length: int, options: dict[str, Any], causal: bool) -> None:
    m = build(24, heads=3, causal=causal, **options)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_definition(m, x), None))


def test_heads_are_offset() -> None:
    """At rate 4 each of four heads takes other tokens: of the first token's outputs, only the first head's know the fifth."""
    m = build(16, causal=False, heads=4, segments=[1, 8], rates=[1, 4], rope=False)
    with torch.no_grad():
        m.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: m(t)[0][0].unflatten(-1, (4, 4)).sum(-1), x)
    seen = jacobian[:, :, 0].abs().sum(-1) > 0  # (position, head, position)
    for i in range(8):
        for h in range(4):
            expected = {i} | ({i % 4, i % 4 + 4} if i % 4 == h else set())
            assert set(seen[i, h].nonzero().flatten().tolist()) == expected


def test_a_state_is_the_open_segment() -> None:
    m = build(16, heads=2, segments=[4, 8], rates=[1, 2])
    for length, slots in ((5, 5), (8, 0), (19, 3)):
        _, state = m(torch.randn(1, length, 16, dtype=torch.float64))
        assert state["k"].shape == (1, 2, slots, 8)
        assert m.state_bytes(length) == 2 * 4 * 16 * slots


def test_impossible_options() -> None:
    for options, message in (
        ({"segments": [4, 8], "rates": [1]}, "segments and rates must be as many"),
        ({"segments": [], "rates": []}, "segments and rates must be as many"),
        ({"segments": [4, 6], "rates": [1, 2]}, "each of segments must be a multiple of the one before"),
        ({"segments": [4, 8], "rates": [2, 4]}, "the first of rates must be 1"),
        ({"segments": [4, 8], "rates": [1, 3]}, "rates .* must divide the segments"),
    ):
        with pytest.raises(ValueError, match=f"Dilated: {message}"):
            create_mixer("dilated", 16, **options)
