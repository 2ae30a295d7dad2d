"""Nystromformer against transformers' and lucidrains' modules, and the paper's formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from mmlong.mixers import create_mixer


def build(heads: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("nystromformer", 24, causal=False, heads=heads, **{"landmarks": 6, "kernel_size": 5, **options})
    return m.double()


@pytest.mark.parametrize(("length", "landmarks", "kernel_size"), [(42, 6, 33), (30, 6, 5), (12, 12, 5)])
@pytest.mark.oracle("transformers: NystromformerSelfAttention", "nystromformer")
def test_against_transformers(same_as: Any, length: int, landmarks: int, kernel_size: int) -> None:
    code = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    m = build(landmarks=landmarks, kernel_size=kernel_size)
    config = code.NystromformerConfig(
        hidden_size=24, num_attention_heads=3, num_landmarks=landmarks, segment_means_seq_len=length,
        conv_kernel_size=kernel_size, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = code.NystromformerSelfAttention(config).double()
    theirs.init_option = "exact"  # of each head's own norm, not of the largest in the batch
    none = torch.zeros(24, dtype=torch.float64)
    weights: dict[str, Tensor] = {}
    for name, proj in (("query", m.q_proj), ("key", m.k_proj), ("value", m.v_proj)):
        weights |= {f"{name}.weight": proj.weight, f"{name}.bias": none}
    weights["conv.weight"] = m.conv_weight[:, None, :, None]
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    y = functional_call(theirs, weights, (x,))[0]
    same_as(m, x, m(x), (m.out_proj(y), None))


@pytest.mark.oracle("nystrom-attention: NystromAttention", "nystromformer")
def test_against_nystrom_attention(same_as: Any) -> None:
    """One row and one head, since its first matrix is by the largest norm of all; a length that needs no filling up."""
    code = pytest.importorskip("nystrom_attention")
    m = build(heads=1)
    theirs = code.NystromAttention(24, dim_head=24, heads=1, num_landmarks=6, residual_conv_kernel=5).double()
    weights = {
        "to_qkv.weight": torch.cat([p.weight for p in (m.q_proj, m.k_proj, m.v_proj)]),
        "to_out.0.weight": m.out_proj.weight,
        "to_out.0.bias": torch.zeros(24, dtype=torch.float64),
        "res_conv.weight": m.conv_weight[:, None, :, None],
    }
    x = torch.randn(1, 42, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), (functional_call(theirs, weights, (x,)), None))


@pytest.mark.oracle("definition: dense, with uneven segments", "nystromformer")
def test_against_the_formula(same_as: Any) -> None:
    m = build(landmarks=7, steps=3)
    x = torch.randn(2, 45, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    bounds = [0, 7, 14, 21, 27, 33, 39, 45]  # 45 = 3 of 7 and 4 of 6
    means = [torch.stack([t[:, :, a:b].mean(2) for a, b in itertools.pairwise(bounds)], 2) for t in (q, k)]

    def weights(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / 8**0.5).softmax(-1)

    A = weights(means[0], means[1])
    Z = A.mT / A.sum(-2).amax(-1)[..., None, None]  # rows sum to 1
    one = torch.eye(7, dtype=torch.float64)
    for _ in range(3):
        Z = Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z))) / 4
    y = weights(q, means[1]) @ Z @ weights(means[0], k) @ v
    for h in range(3):
        taps = m.conv_weight[h]
        shifted = F.pad(v[:, h], (0, 0, 2, 2)).unfold(1, 5, 1) @ taps
        y = torch.cat([y[:, :h], y[:, h : h + 1] + shifted[:, None], y[:, h + 1 :]], 1)
    same_as(m, x, m(x), (m.out_proj(y.transpose(1, 2).flatten(2)), None))


def test_as_many_landmarks_as_tokens_are_attention() -> None:
    m = build(landmarks=40, kernel_size=None)
    for length in (39, 40):
        x = torch.randn(2, length, 24, dtype=torch.float64)
        q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
        y = (q @ k.mT / 8**0.5).softmax(-1) @ v
        torch.testing.assert_close(m(x)[0], m.out_proj(y.transpose(1, 2).flatten(2)))


def test_impossible_options() -> None:
    for option in ("landmarks", "steps"):
        with pytest.raises(ValueError, match=f"nystromformer: {option} must be at least 1, got 0"):
            build(**{option: 0})
    with pytest.raises(ValueError, match="nystromformer: kernel_size must be odd.*got 4"):
        build(kernel_size=4)
    with pytest.raises(ValueError, match="no causal form"):
        create_mixer("nystromformer", 24, causal=True)
