"""Linformer against the linformer package, and its forms of sharing against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mmlong.mixers import create_mixer


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return create_mixer("linformer", 24, causal=False, **{"heads": 3, "rank": 7, "max_length": 50, **options}).double()


@pytest.mark.parametrize("length", [50, 31, 1])
@pytest.mark.oracle("linformer: LinformerSelfAttention", "linformer")
def test_against_the_package(same_as: Any, length: int) -> None:
    code = pytest.importorskip("linformer.linformer")
    m = build()
    theirs = code.LinformerSelfAttention(24, 50, k=7, heads=3).double()
    weights = {
        "to_q.weight": m.q_proj.weight,
        "to_k.weight": m.k_proj.weight,
        "to_v.weight": m.v_proj.weight,
        "to_out.weight": m.out_proj.weight,
        "to_out.bias": torch.zeros(24, dtype=torch.float64),
        "proj_k": m.E.mT,
        "proj_v": m.F.mT,
    }
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), (functional_call(theirs, weights, (x,)), None))


@pytest.mark.parametrize("sharing", ["none", "head", "key_value"])
@pytest.mark.oracle("definition: head by head", "linformer")
def test_against_the_formula(same_as: Any, sharing: str) -> None:
    m = build(sharing=sharing)
    x = torch.randn(2, 31, 24, dtype=torch.float64, requires_grad=True)
    outputs: list[Tensor] = []
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        E = m.E[h] if sharing == "none" else m.E
        F = E if sharing == "key_value" else m.F[h] if sharing == "none" else m.F
        q, k, v = (x @ p.weight[part].T for p in (m.q_proj, m.k_proj, m.v_proj))
        k, v = (torch.einsum("kn,bnd->bkd", M[:, :31], t) for M, t in ((E, k), (F, v)))
        outputs.append((q @ k.mT / 8**0.5).softmax(-1) @ v)
    same_as(m, x, m(x), (torch.cat(outputs, -1) @ m.out_proj.weight.T, None))


def test_matrices_at_the_start() -> None:
    """Normal, of variance 1 / k, so that projected vectors keep their products; one, two or two a head."""
    torch.manual_seed(0)
    m: Any = create_mixer("linformer", 32, causal=False, rank=64, max_length=500)
    assert abs(float(m.E.detach().square().sum(1).mean()) / (500 / 64) - 1) < 0.05
    counts = {
        s: sum(p.numel() for p in build(sharing=s).parameters()) - 4 * 24 * 24 for s in ("none", "head", "key_value")
    }
    assert counts == {"none": 6 * 7 * 50, "head": 2 * 7 * 50, "key_value": 7 * 50}


def test_impossible_options_and_lengths() -> None:
    for option in ("rank", "max_length"):
        with pytest.raises(ValueError, match=f"linformer: {option} must be at least 1, got 0"):
            build(**{option: 0})
    with pytest.raises(ValueError, match="linformer: unknown sharing 'layer'; use one of none, head, key_value"):
        build(sharing="layer")
    with pytest.raises(ValueError, match="no causal form"):
        create_mixer("linformer", 24, causal=True)
    with pytest.raises(ValueError, match="linformer: a document of 51 tokens.*max_length=50.*larger max_length"):
        build()(torch.zeros(1, 51, 24, dtype=torch.float64))
