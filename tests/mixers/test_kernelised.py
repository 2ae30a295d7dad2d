"""Kernelised attention against the sum over all pairs, and against performer-pytorch, flash-linear-attention and softmax itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers import kernelised as module
from mmlong.mixers.kernelised import orthogonal_features
from mmlong.ops.kernel_attention import EPS, kernel_attention_reference
from mmlong.ops.linear_attention import scalar_decay_reference

NAMES = ("linear_transformer", "performer", "based")


def build(name: str, dim: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer(name, dim, **options).to(dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    return m


def heads(m: Any, x: Tensor) -> list[Tensor]:
    return [p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj)]


def kernel_features(m: Any, name: str, t: Tensor) -> Tensor:
    """Without any shift of exponents, and all of the second-order terms."""
    d = t.shape[-1]
    if name == "linear_transformer":
        return torch.where(t > 0, t + 1, t.exp())
    t = t * d**-0.25
    if name == "performer":
        return (t @ m.projection.T - t.square().sum(-1, keepdim=True) / 2).exp() * m.n_features**-0.5
    second = (t[..., :, None] * t[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(t[..., :1]), t, second], -1)


@pytest.mark.oracle("definition: sum over all pairs")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "dim", "length", "options"),
    [
        *((name, 16, 257, {}) for name in NAMES),
        *((name, 24, 63, {"heads": 3, "chunk": 8}) for name in NAMES),
        ("performer", 1, 9, {"features": 3}),
        ("based", 8, 9, {"feature_dim": 1}),
    ],
)
def test_against_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
    same_as: Any,
    held: Any,
    in_small_blocks: None,
    name: str,
    dim: int,
    length: int,
    options: dict[str, Any],
    causal: bool,
    batch: int,
) -> None:
    monkeypatch.setattr(module, "TWO_SIDED_TOKENS", 100)
    m = build(name, dim, torch.float64, causal=causal, **options)
    m.eps = 1e-30  # which the shift of exponents would scale
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    q, k, v = heads(m, x)
    q, k = (kernel_features(m, name, t) for t in (q, k))
    want = m.out_proj(kernel_attention_reference(q, k, v, causal=causal, eps=1e-30).flatten(2))
    got, state = m(x)
    S_got = S = None
    if causal:
        _, S = scalar_decay_reference(q, k, v, torch.zeros_like(v[..., 0]))
        S_got = state["S"][..., :-1, :]
        if name == "performer":
            S_got = S_got * state["log_scale"].exp()[..., None, None]
        if name == "based":  # whose features are fewer: what the state answers to other queries
            S_got = torch.einsum("bhpn,blhn->blhp", S_got, m.features(heads(m, x)[0], key=False)[0])
            S = torch.einsum("bhpn,blhn->blhp", S, q)
        torch.testing.assert_close(S_got, S)
    held(x, (got, S_got), (want, S))
    same_as(m, x, (got, None), (want, None), 1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resets", [False, True])
def test_two_sided_layouts(monkeypatch: pytest.MonkeyPatch, same_as: Any, name: str, resets: bool) -> None:
    monkeypatch.setattr(module, "TWO_SIDED_TOKENS", 20)
    m = build(name, 16, torch.float64, causal=False, heads=2)
    x = torch.randn(3, 63, 16, dtype=torch.float64, requires_grad=True)
    marks = torch.zeros(3, 63, dtype=torch.bool)
    marks[0, 20] = marks[0, 41] = marks[1, 0] = marks[2, 5] = True
    layout = Layout(lengths=torch.tensor([63, 30, 9]), resets=marks if resets else None)
    q, k, v = heads(m, x)
    q, k = (kernel_features(m, name, t) for t in (q, k))
    want = m.out_proj(kernel_attention_reference(q, k, v, layout, causal=False, eps=0).flatten(2))
    keep = layout.valid(63)
    assert keep is not None
    m.eps = 0
    got, _ = m(x, None, layout)
    same_as(m, x, *((torch.where(keep[..., None], t, 0), None) for t in (got, want)), 1e-8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.oracle("performer-pytorch: softmax_kernel, linear_attention", "performer")
def test_performer_against_performer_pytorch(same_as: Any, causal: bool) -> None:
    theirs = pytest.importorskip("performer_pytorch.performer_pytorch")
    m = build("performer", 24, torch.float32, heads=3, causal=causal)
    m.eps = 0
    x = torch.randn(2, 257, 24, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in heads(m, x))
    q, k = (
        theirs.softmax_kernel(t, projection_matrix=m.projection, is_query=query, eps=0)
        for t, query in ((q, True), (k, False))
    )
    if causal:
        y = theirs.causal_linear_attention_noncuda(q, k, v, chunk_size=4, eps=0)
    else:
        y = theirs.linear_attention(q, k, v)
    same_as(m, x, (m(x)[0], None), (m.out_proj(y.transpose(1, 2).flatten(2)), None), 1e-4)


@pytest.mark.oracle("fla: naive_recurrent_linear_attn", "linear_transformer")
def test_linear_transformer_against_flash_linear_attention(same_as: Any) -> None:
    naive = pytest.importorskip("fla.ops.linear_attn.naive")
    m = build("linear_transformer", 24, torch.float32, heads=3)
    x = torch.randn(2, 257, 24, requires_grad=True)
    q, k, v = heads(m, x)
    y, (S, z) = naive.naive_recurrent_linear_attn(
        F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, output_final_state=True, normalize=True
    )
    want = torch.cat([S.mT, z.squeeze(1).unsqueeze(2)], 2)
    got, state = m(x)
    same_as(m, x, (got, state), (m.out_proj(y.flatten(2)), {"S": want}), 1e-4)


@pytest.mark.oracle("fla: naive_parallel_based", "based")
def test_based_against_flash_linear_attention(same_as: Any) -> None:
    naive = pytest.importorskip("fla.ops.based.naive")
    m = build("based", 24, torch.float32, heads=3, feature_dim=5)
    x = torch.randn(2, 257, 24, requires_grad=True)
    y = naive.naive_parallel_based(*(t.transpose(1, 2) for t in heads(m, x))).transpose(1, 2)
    assert m.eps == EPS == 1e-6  # theirs
    same_as(m, x, (m(x)[0], None), (m.out_proj(y.flatten(2)), None), 1e-4)


def test_performer_tends_to_softmax() -> None:
    m = build("performer", 8, torch.float64, heads=1, features=20000, causal=False)
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    with torch.no_grad():
        m.q_proj.weight.div_(2)  # the features' variance grows with the length of queries and keys
        m.k_proj.weight.div_(2)
        want = m.out_proj(F.scaled_dot_product_attention(*(t.squeeze(2) for t in heads(m, x))))
        assert float((m(x)[0] - want).norm() / want.norm()) < 0.05


def test_orthogonal_features() -> None:
    torch.manual_seed(0)
    w = orthogonal_features(4000, 8)
    first = F.normalize(w[:8], dim=1)
    torch.testing.assert_close(first @ first.T, torch.eye(8), rtol=0, atol=1e-5)
    assert float(w.mean(0).abs().max()) < 0.06
    torch.testing.assert_close(w.T @ w / 4000, torch.eye(8), rtol=0, atol=0.06)
    m: Any = create_mixer("performer", 16)
    before = m.projection.clone()
    m.redraw()
    assert not torch.equal(m.projection, before)
    assert "projection" in m.state_dict()


def test_performer_at_keys_of_any_length() -> None:
    """A long past of keys whose exponentials underflow beside later ones, and the other way round; documents keep units of their own."""
    m = build("performer", 8, torch.float32, heads=1)
    with torch.no_grad():
        m.q_proj.weight.mul_(0.05)  # else queries would be as large, and see one feature only
    x = torch.randn(1, 80, 8)
    x[:, 20:40] *= 30
    marks = torch.zeros(1, 80, dtype=torch.bool)
    marks[:, [20, 60]] = True
    layout = Layout(resets=marks)
    exact = copy.deepcopy(m).double()
    with torch.no_grad():
        q, k, v = heads(exact, x.double())
        t = q * 8**-0.25, k * 8**-0.25
        # In logarithms, over all pairs.
        logs = [u @ exact.projection.T - u.square().sum(-1, keepdim=True) / 2 for u in t]
        scores = torch.logsumexp(
            logs[0].transpose(1, 2)[..., :, None, :] + logs[1].transpose(1, 2)[..., None, :, :], -1
        )
        documents = layout.documents()
        assert documents is not None
        seen = (documents[:, :, None] == documents[:, None, :]).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        want = exact.out_proj((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
        m.eps = 0
        got, _ = m(x, None, layout)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)


def test_defaults_at_any_width_and_state_bytes() -> None:
    for name in NAMES:
        for dim in (1, 3, 16, 24, 96, 256):
            m = create_mixer(name, dim)
            _, state = m(torch.randn(1, 3, dim))
            assert state_bytes(state) == m.state_bytes(3) == m.state_bytes(1000)


def test_impossible_options() -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match="do not divide into 3 heads"):
            create_mixer(name, 16, heads=3)
    with pytest.raises(ValueError, match="features"):
        create_mixer("performer", 16, features=0)
    with pytest.raises(ValueError, match="feature_dim"):
        create_mixer("based", 16, feature_dim=0)
