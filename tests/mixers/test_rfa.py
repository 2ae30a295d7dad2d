"""Random feature attention against its definition, and its kernel against softmax's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers.rfa import EPS


def build(dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("rfa", dim, **options).to(dtype)
    with torch.no_grad():
        m.sigma.uniform_(0.5, 1.0)
    return m


def definition(m: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The equations of the file's opening lines, token by token."""
    q, k, v = (p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    g = torch.sigmoid(m.gate_proj(x))
    W = m.directions * m.sigma[:, None]  # (H, m, d)
    fq, fk = (
        torch.cat([a.sin(), a.cos()], -1) / m.n_features**0.5
        for a in (torch.einsum("blhd,hmd->blhm", t / t.norm(dim=-1, keepdim=True), W) for t in (q, k))
    )
    S = x.new_zeros(x.shape[0], m.heads, m.d, 2 * m.n_features)
    z, outputs = S[:, :, 0], []
    for t in range(x.shape[1]):
        a = g[:, t, :, None]
        S = a[..., None] * S + (1 - a)[..., None] * v[:, t, :, :, None] * fk[:, t, :, None, :]
        z = a * z + (1 - a) * fk[:, t]
        weight = (z * fq[:, t]).sum(-1, keepdim=True)
        outputs.append((S * fq[:, t, :, None, :]).sum(-1) / (weight + EPS * torch.where(weight < 0, -1, 1)))
    return m.out_proj(torch.stack(outputs, 1).flatten(2)), {"S": torch.cat([S, z[:, :, None]], 2)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("dim", "length", "options"), [(16, 257, {}), (24, 63, {"heads": 3, "features": 40, "chunk": 8})]
)
@pytest.mark.oracle("definition: token by token", "rfa")
def test_against_definition(
    same_as: Any, in_small_blocks: None, dim: int, length: int, options: dict[str, Any], batch: int
) -> None:
    m = build(dim, torch.float64, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), definition(m, x))


def test_kernel_tends_to_softmax() -> None:
    """``f(q) . f(k) = exp(q . k - 1)`` in expectation, for vectors of length one and sigma 1."""
    m = build(8, torch.float64, heads=1, features=50000)
    q, k = torch.randn(2, 1, 20, 1, 8, dtype=torch.float64)
    sigma = torch.ones(1, 8, dtype=torch.float64)
    got = m.features(q, sigma)[0, :, 0] @ m.features(k, sigma)[0, :, 0].T
    want = (F.normalize(q[0, :, 0], dim=-1) @ F.normalize(k[0, :, 0], dim=-1).T - 1).exp()
    torch.testing.assert_close(got, want, rtol=0, atol=0.02)


def test_saved_and_sized() -> None:
    for dim in (1, 3, 16, 24, 96, 256):
        m = create_mixer("rfa", dim)
        assert "directions" in m.state_dict()
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)
    with pytest.raises(ValueError, match="features"):
        create_mixer("rfa", 16, features=0)
