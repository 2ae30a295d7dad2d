"""RWKV-7 against its recurrence, and against flash-linear-attention's with the layer around it written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes
from mmlong.mixers.rwkv7 import MIXED, RWKV7, default_rank


def mixer(dim: int, dtype: torch.dtype = torch.float64, **options: Any) -> RWKV7:
    torch.manual_seed(0)
    made = create_mixer("rwkv7", dim, **options).to(dtype)
    assert isinstance(made, RWKV7)
    with torch.no_grad():
        for name, p in made.named_parameters():
            # Far from the start, where nothing depends on the token; keys long enough that they have a direction.
            p.add_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if "proj" in name or "down" in name else 0.3))
    return made


def inner(m: RWKV7, x: Tensor) -> dict[str, Tensor]:
    """What goes into the recurrence, by the paper's letters, and the gate."""
    heads = (x.shape[0], x.shape[1], m.heads, m.N)
    d = F.pad(x, (0, 0, 1, -1)) - x
    xs = {name: x + d * mu for name, mu in zip(MIXED, m.mix_share, strict=True)}
    r, k, v = m.r_proj(xs["r"]), m.k_proj(xs["k"]), m.v_proj(xs["v"])
    w = -math.exp(-0.5) * (m.decay_base + m.decay_up(m.decay_down(xs["w"]).tanh())).sigmoid()
    a = (m.rate_base + m.rate_up(m.rate_down(xs["a"]))).sigmoid()
    kappa = F.normalize((k * m.erase_scale).view(heads), dim=-1)
    key = k * (1 + (a - 1) * m.rate_share)
    found = {"r": r, "w": w, "k": key, "v": v, "a": a}
    gate = m.gate_up(m.gate_down(xs["g"]).sigmoid())
    return {name: t.view(heads) for name, t in found.items()} | {"kappa": kappa, "gate": gate}


def outer(m: RWKV7, y: Tensor, t: dict[str, Tensor]) -> Tensor:
    B, L, H, N = y.shape
    y = F.group_norm(y.reshape(B * L, H * N), H, m.norm_weight, m.norm_bias, m.norm_eps).view(B, L, -1)
    bonus = (t["r"] * t["k"] * m.bonus).sum(-1, keepdim=True) * t["v"]
    return m.out_proj((y + bonus.flatten(2)) * t["gate"])


def recurrence(m: RWKV7, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in the file's opening lines, token by token."""
    t = inner(m, x)
    S, outputs = x.new_zeros(x.shape[0], m.heads, m.N, m.N), []
    for i in range(x.shape[1]):
        r, w, k, v, a, kappa = (t[name][:, i] for name in ("r", "w", "k", "v", "a", "kappa"))
        transition = torch.diag_embed(w.exp()) - (a * kappa)[..., :, None] * kappa[..., None, :]
        S = transition @ S + k[..., :, None] * v[..., None, :]
        outputs.append((r[..., None, :] @ S).squeeze(-2))
    return outer(m, torch.stack(outputs, 1), t), S


@pytest.mark.parametrize(
    ("dim", "batch", "length", "options"),
    [
        (16, 3, 63, {}),
        (16, 1, 130, {"heads": 4, "chunk": 16, "depth": 0.5}),
        (12, 2, 33, {"heads": 2, "decay_rank": 3}),
    ],
)
@pytest.mark.oracle("definition: token by token", "rwkv7")
def test_against_recurrence(
    monkeypatch: pytest.MonkeyPatch,
    same_as: Callable[..., None],
    dim: int,
    batch: int,
    length: int,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr("mmlong.mixers.delta.UNIT_EPS", 0.0)  # as the definition takes the length
    m = mixer(dim, **options)
    x = torch.randn(batch, length, dim, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    want, S = recurrence(m, x)
    same_as(m, x, (y, {"S": state["S"]}), (want, {"S": S}))


@pytest.mark.oracle("fla: dplr_recurrence", "rwkv7")
def test_around_flas_recurrence(held: Any) -> None:
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    m = mixer(32, torch.float32, heads=2)
    x = torch.randn(2, 64, 32, requires_grad=True)
    t = inner(m, x)
    turned = {name: u.transpose(1, 2) for name, u in t.items() if name != "gate"}
    want, S = naive.dplr_recurrence(
        turned["r"] * m.N**0.5,  # which they divide by
        turned["k"],
        turned["v"],
        -turned["kappa"],
        turned["kappa"] * turned["a"],
        turned["w"],
    )
    want = outer(m, want.transpose(1, 2), t)
    y, state = m(x)
    held(x, (y, state["S"]), (want, S))
    torch.testing.assert_close((y, state["S"]), (want, S), rtol=1e-3, atol=1e-3)
    dy = torch.randn_like(y)
    leaves = [x, m.mix_share, m.decay_base, m.k_proj.weight, m.rate_up.weight]
    mine, theirs = (torch.autograd.grad(u, leaves, dy) for u in (y, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))


def test_blocks_equal_whole(request: pytest.FixtureRequest, blocks_equal_whole: Any) -> None:
    blocks_equal_whole(mixer(8, heads=2, chunk=8), lambda: request.getfixturevalue("in_small_blocks"))


def test_initial_values() -> None:
    m = create_mixer("rwkv7", 256)
    assert (m.heads, m.N) == (4, 64)
    assert (m.out_proj.weight == 0).all()
    zigzag = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(m.decay_base[[0, 255]], torch.tensor([-5.5, 0.5]) + 2.5 * zigzag)
    torch.testing.assert_close(m.rate_base[[0, 255]], -0.19 + 0.5 * zigzag)
    torch.testing.assert_close(m.mix_share[list(MIXED).index("w")], 1 - (torch.arange(256) / 256) ** 0.9)
    assert (create_mixer("rwkv7", 64, depth=1.0).mix_share == 0).all()
    torch.testing.assert_close(float(m.k_proj.weight.detach().std()), 0.05 / (3 * 256) ** 0.5, rtol=0.05, atol=0)
    assert [default_rank(d, 2.5) for d in (64, 768, 4096)] == [32, 64, 160]
    # Decays are the same for every token as yet, and none is faster than e^-0.607.
    g = -math.exp(-0.5) * m.decay_base.sigmoid()
    assert float(g.min()) > -0.607


def test_state_bytes_and_impossible_options() -> None:
    for dim in (1, 3, 16, 96):
        m = create_mixer("rwkv7", dim)
        _, state = m(torch.randn(1, 3, dim))
        assert state_bytes(state) == m.state_bytes(3)
    with pytest.raises(ValueError, match="into 3 heads"):
        create_mixer("rwkv7", 16, heads=3)
    with pytest.raises(ValueError, match="depth 2"):
        create_mixer("rwkv7", 16, depth=2)
