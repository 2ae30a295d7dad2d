"""Luna against the paper's formulas: both-sided with whole matrices of weights, causal token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("luna", 24, **{"heads": 3, "packed": 5, **options}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    return m


def heads(t: Tensor) -> Tensor:
    return t.unflatten(-1, (3, 8)).transpose(-2, -3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.oracle("definition: two whole attentions", "luna")
def test_both_sides(same_as: Any, tied: bool) -> None:
    m = build(causal=False, tied=tied)
    x = torch.randn(2, 31, 24, dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (heads(q) @ heads(k).mT / 8**0.5).softmax(-1)
        return (weights @ heads(v)).transpose(-2, -3).flatten(-2)

    pv, v = (m.pk_proj, m.k_proj) if tied else (m.pv_proj, m.v_proj)
    C = attend(m.pq_proj(m.P), m.pk_proj(x), pv(x))
    same_as(m, x, m(x), (m.out_proj(attend(m.q_proj(x), m.k_proj(C), v(C))), None))


@pytest.mark.parametrize(("tied", "activation"), [(True, "softplus"), (False, "softplus"), (False, "elu")])
@pytest.mark.oracle("definition: token by token", "luna")
def test_causal(same_as: Any, tied: bool, activation: str) -> None:
    m = build(tied=tied, activation=activation)
    x = torch.randn(2, 31, 24, dtype=torch.float64, requires_grad=True)
    pq = heads(m.pq_proj(m.P)) / 8**0.5  # (3, 5, 8)
    packing, values = (torch.zeros(2, 3, n, r, dtype=torch.float64) for n, r in ((5, 8), (8, 5)))
    outputs = []
    for t in range(31):
        token = x[:, t : t + 1]
        q, k, v, c = (heads(p(token))[:, :, 0] for p in (m.q_proj, m.k_proj, m.k_proj if tied else m.v_proj, m.pk_proj))
        raw = torch.einsum("hpd,bhd->bhp", pq, c)
        a = torch.log2(1 + 2**raw) if activation == "softplus" else torch.where(raw > 0, raw + 1, raw.exp())
        packing = packing + a[..., :, None] * k[..., None, :]
        values = values + v[..., :, None] * a[..., None, :]
        s = (torch.einsum("bhpd,bhd->bhp", packing, q) / 8**0.5 / (t + 1)).softmax(-1)
        outputs.append(torch.einsum("bhdp,bhp->bhd", values, s).flatten(1) / (t + 1))
    y = m.out_proj(torch.stack(outputs, 1))
    got, state = m(x)
    same_as(m, x, (got, [state["keys"], state["values"]]), (y, [packing, values]))


def test_softplus_is_one_at_nothing() -> None:
    """In base 2, so that the weights of an unlearned packing are means."""
    assert torch.nn.functional.softplus(torch.zeros(()), beta=math.log(2)) == 1


def test_state_is_of_one_size() -> None:
    m = build()
    _, state = m(torch.randn(2, 7, 24, dtype=torch.float64))
    assert {key: tuple(t.shape) for key, t in state.items()} == {
        "keys": (2, 3, 5, 8), "values": (2, 3, 8, 5), "seen": (2, 7, 0),
    }  # fmt: skip
    assert m.state_bytes(7) == m.state_bytes(10**6) == 4 * 2 * 3 * 5 * 8


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="luna: packed must be at least 1, got 0"):
        build(packed=0)
    with pytest.raises(ValueError, match="luna: unknown activation 'relu'; use one of softplus, elu"):
        build(activation="relu")
