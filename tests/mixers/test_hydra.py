"""Hydra against its matrix over all pairs, and with other people's recurrences as its two halves."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer
from mmlong.mixers.hydra import Hydra

Recurrence = Callable[[Hydra, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(mixer, x before its SiLU, B and C before theirs, dt before bias and softplus) -> SS(x)``, ``(B, L, H P)``."""


def mixer(dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> Hydra:
    torch.manual_seed(0)
    made = create_mixer("hydra", dim, **options).to(dtype)
    assert isinstance(made, Hydra)
    with torch.no_grad():
        made.D.uniform_(-1, 1)
        made.norm_weight.uniform_(0.5, 1.5)
        made.A_log.uniform_(-1, 1)
        made.dt_bias.add_(3)  # faster decays than at the start of training, so that they matter
    return made


def convolved(m: Hydra, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, what is convolved before its SiLU, and dt, by torch's conv1d."""
    z, u, dt = m.in_proj(x).split([m.inner, m.conv_weight.shape[0], 2 * m.heads], -1)
    weight = m.conv_weight[:, None]
    u = F.conv1d(u.mT, weight, m.conv_bias, padding="same", groups=weight.shape[0]).mT
    return z, u, dt


def left(m: Hydra, y: Tensor, z: Tensor) -> Tensor:
    return m.out_proj(F.rms_norm(y, (m.inner,), m.norm_weight, m.norm_eps) * F.silu(z))


def by_matrix(m: Hydra, x: Tensor) -> Tensor:
    """The definition in the file's opening lines: every entry of each head's matrix."""
    B, L, _ = x.shape
    z, u, raw = convolved(m, x)
    v, *shared = F.silu(u).split([m.inner, *[m.ngroups * m.d_state] * 4], -1)
    B_f, C_f, B_b, C_b = (
        t.view(B, L, m.ngroups, -1).repeat_interleave(m.heads // m.ngroups, 2).transpose(1, 2) for t in shared
    )
    dt_f, dt_b = (F.softplus(t + m.dt_bias).mT for t in raw.split(m.heads, -1))  # (B, H, L)
    A = -m.A_log.exp()[:, None]
    diagonal = (v @ m.D_proj.weight.mT + m.D).mT
    rows = []
    for t in range(L):
        row = []
        for s in range(L):
            if s < t:
                decay = (A * dt_f[..., s + 1 : t]).sum(-1).exp()
                row.append((C_f[:, :, t - 1] * B_f[:, :, s]).sum(-1) * dt_f[..., s] * decay)
            elif s == t:
                row.append(diagonal[..., t])
            else:
                decay = (A * dt_b[..., t + 1 : s]).sum(-1).exp()
                row.append((C_b[:, :, t + 1] * B_b[:, :, s]).sum(-1) * dt_b[..., s] * decay)
        rows.append(torch.stack(row, -1))
    M = torch.stack(rows, -2)  # (B, H, L, L)
    y = M @ v.view(B, L, m.heads, -1).transpose(1, 2)
    return left(m, y.transpose(1, 2).flatten(2), z)


def by_halves(m: Hydra, x: Tensor, recurrence: Recurrence) -> Tensor:
    """The sum of two shifted recurrences of somebody else's, one of them reversed, and the diagonal."""
    z, u, raw = convolved(m, x)
    v, *shared = u.split([m.inner, *[2 * m.ngroups * m.d_state] * 2], -1)
    dts = raw.split(m.heads, -1)
    past = recurrence(m, v, shared[0], dts[0]).roll(1, 1)
    future = recurrence(m, *(t.flip(1) for t in (v, shared[1], dts[1]))).roll(1, 1)
    inner = torch.ones(x.shape[1], 1, dtype=x.dtype)
    inner[0] = 0
    v = F.silu(v)
    own = v * (F.linear(v, m.D_proj.weight, m.D)).repeat_interleave(m.headdim, -1)
    return left(m, past * inner + (future * inner).flip(1) + own, z)


def of_transformers(m: Hydra, v: Tensor, shared: Tensor, dt: Tensor) -> Tensor:
    """The recurrence of their Mamba-2 mixer, in chunks of 16."""
    code = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(code, "mamba2_chunk_scan"):
        pytest.skip("this release of transformers has the recurrence in the midst of its mixer")
    B, C = (t.unflatten(-1, (m.ngroups, -1)) for t in F.silu(shared).chunk(2, -1))
    heads = F.silu(v).unflatten(-1, (m.heads, -1))
    y = code.mamba2_chunk_scan(heads, dt, -m.A_log.exp(), B, C, 16, dt_bias=m.dt_bias, dt_softplus=True)
    return y.flatten(2).to(v.dtype)


def of_fla(m: Hydra, v: Tensor, shared: Tensor, dt: Tensor) -> Tensor:
    code = pytest.importorskip("fla.ops.simple_gla.naive")
    k, q = (
        t.unflatten(-1, (m.ngroups, -1)).repeat_interleave(m.heads // m.ngroups, 2) for t in F.silu(shared).chunk(2, -1)
    )
    step = F.softplus(dt + m.dt_bias)
    heads = F.silu(v).unflatten(-1, (m.heads, -1)) * step[..., None]
    y, _ = code.naive_recurrent_simple_gla(q, k, heads, -step * m.A_log.exp(), scale=1.0)
    return y.flatten(2).to(v.dtype)


OPTIONS: list[tuple[int, int, dict[str, Any]]] = [
    (16, 37, {}),
    (16, 65, {"headdim": 8, "ngroups": 2, "chunk": 16}),
    (12, 21, {"headdim": 4, "ngroups": 3, "d_state": 5, "d_conv": 3, "chunk": 7}),
]


@pytest.mark.parametrize(("dim", "length", "options"), [*OPTIONS, (1, 9, {"expand": 1}), (4, 3, {"d_conv": 1})])
@pytest.mark.oracle("definition: the matrix over all pairs", "hydra")
def test_against_the_matrix(same_as: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, **options)
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    assert state is None
    same_as(m, x, (y, None), (by_matrix(m, x), None))


@pytest.mark.parametrize("length", [1, 2])
def test_without_a_decay(length: int) -> None:
    m = mixer(4)
    x = torch.randn(2, length, 4, dtype=torch.float64)
    torch.testing.assert_close(m(x)[0], by_matrix(m, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "length", "options"), OPTIONS)
@pytest.mark.oracle("transformers: mamba2_chunk_scan, each way", "hydra")
def test_against_transformers(same_as: Any, dtype: torch.dtype, dim: int, length: int, options: dict[str, Any]) -> None:
    """Their recurrence runs in float32 whatever the input, which bounds the agreement."""
    m = mixer(dim, dtype, **options)
    x = torch.randn(2, length, dim, dtype=dtype, requires_grad=True)
    same_as(m, x, m(x), (by_halves(m, x, of_transformers), None), 1e-5)


@pytest.mark.parametrize(("dim", "length", "options"), OPTIONS)
@pytest.mark.oracle("fla: naive_recurrent_simple_gla, each way", "hydra")
def test_against_fla(same_as: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = mixer(dim, torch.float32, **options)
    x = torch.randn(2, length, dim, requires_grad=True)
    same_as(m, x, m(x), (by_halves(m, x, of_fla), None), 1e-5)


def test_documents_and_padding_are_rows_of_their_own(same_as: Any) -> None:
    """Documents of 1 to 20 tokens, some shorter than the taps' reach, one beginning in the padding."""
    m = mixer(8, headdim=4, chunk=8)
    x = torch.randn(3, 40, 8, dtype=torch.float64, requires_grad=True)
    lengths = [40, 0, 27]
    resets = torch.zeros(3, 40, dtype=torch.bool)
    resets[0, [0, 1, 3, 20, 39]] = True
    resets[2, [2, 26, 30]] = True
    layout = Layout(lengths=torch.tensor(lengths), resets=resets)
    want = []
    for row, n in enumerate(lengths):
        cuts = [0, *[t for t in resets[row].nonzero().flatten().tolist() if 0 < t < n], n]
        parts = [m(x[row : row + 1, i:j])[0] for i, j in pairwise(cuts) if j > i]
        want.append(F.pad(torch.cat(parts, 1) if parts else x[row : row + 1, :0], (0, 0, 0, 40 - n)))
    got = torch.where(layout.valid(40)[..., None], m(x, None, layout)[0], 0)
    same_as(m, x, (got, None), (torch.cat(want), None))


def test_lengths_alone(same_as: Any) -> None:
    m = mixer(8)
    x = torch.randn(3, 30, 8, dtype=torch.float64, requires_grad=True)
    layout = Layout(lengths=torch.tensor([30, 1, 13]))
    want = [F.pad(m(x[i : i + 1, :n])[0], (0, 0, 0, 30 - n)) for i, n in enumerate((30, 1, 13))]
    got = torch.where(layout.valid(30)[..., None], m(x, None, layout)[0], 0)
    same_as(m, x, (got, None), (torch.cat(want), None))


@pytest.mark.parametrize("layout", [None, "lengths and resets"])
def test_blocks_equal_whole(layout: str | None, same_as: Any, request: pytest.FixtureRequest) -> None:
    m = mixer(8, headdim=4, chunk=8)
    x = torch.randn(3, 330, 8, dtype=torch.float64, requires_grad=True)
    described = None
    if layout:
        resets = torch.zeros(3, 330, dtype=torch.bool)
        resets[0, [0, 99, 100, 130]] = True
        resets[2, [151, 199]] = True
        described = Layout(lengths=torch.tensor([330, 0, 201]), resets=resets)
    whole, _ = m(x, None, described)
    assert "Blockwise" not in whole.grad_fn.name()
    request.getfixturevalue("in_small_blocks")
    y, _ = m(x, None, described)
    if described is not None:
        valid = described.valid(330)[..., None]
        y, whole = (torch.where(valid, t, 0) for t in (y, whole))
    else:
        assert "Blockwise" in y.grad_fn.name()
    same_as(m, x, (y, None), (whole, None))


def test_first_values() -> None:
    torch.manual_seed(0)
    m = create_mixer("hydra", 256, headdim=1)  # 512 heads
    dt = F.softplus(m.dt_bias.detach().double()).log10()
    assert -3.001 < float(dt.min()) < -2.95
    assert -1.05 < float(dt.max()) < -0.999
    assert abs(float(dt.mean()) + 2) < 0.1
    assert torch.equal(m.A_log, torch.zeros(512))
    assert torch.equal(m.D, torch.ones(512))
    assert torch.equal(m.norm_weight, torch.ones(512))
    bound = 7**-0.5
    for p in (m.conv_weight, m.conv_bias):
        assert float(p.detach().abs().max()) <= bound
        assert abs(float(p.detach().std()) - bound / 3**0.5) < 0.02


def test_one_projection_as_the_authors_have_it() -> None:
    """z, x, B and C forwards, B and C backwards, dt of both."""
    m = create_mixer("hydra", 256)
    assert m.in_proj.weight.shape[0] == 512 + 512 + 4 * 64 + 2 * 8
    assert {name: tuple(p.shape) for name, p in m.named_parameters()} == {
        "in_proj.weight": (1296, 256),
        "conv_weight": (768, 7),
        "conv_bias": (768,),
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "D_proj.weight": (8, 512),
        "norm_weight": (512,),
        "out_proj.weight": (256, 512),
    }
    assert m.state_bytes(1000) == 0


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="hydra: inner width 32 .* must divide into heads of 7"):
        create_mixer("hydra", 16, headdim=7)
    with pytest.raises(ValueError, match="into 3 groups"):
        create_mixer("hydra", 16, headdim=8, ngroups=3)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        create_mixer("hydra", 16, chunk=0)
    with pytest.raises(ValueError, match="d_conv must be odd"):
        create_mixer("hydra", 16, d_conv=4)
    with pytest.raises(ValueError, match="no causal form"):
        create_mixer("hydra", 16, causal=True)
    with pytest.raises(ValueError, match="was given a state but has none"):
        create_mixer("hydra", 16)(torch.randn(1, 3, 16), {"S": torch.zeros(1)})
