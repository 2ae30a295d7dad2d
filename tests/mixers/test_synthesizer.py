"""Synthesizers against their formulas, with the whole matrix of weights; their state, their options and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer

DENSE: list[dict[str, Any]] = [{}, {"hidden": 3}, {"factors": (6, 10)}]
RANDOM: list[dict[str, Any]] = [{}, {"rank": None}, {"rank": 8, "learned": False}, {"rank": None, "learned": False}]


def build(name: str, causal: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer(name, 24, causal=causal, **{"heads": 3, "max_length": 60, **options}).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)  # weights that are far from even
    return m


def by_weights(m: Any, x: Tensor, scores: Tensor) -> Tensor:
    """``W_o softmax(scores) W_v x``, scores ``(B or 1, heads, T, T)``."""
    T = x.shape[1]
    if m.causal:
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    v = m.v_proj(x).unflatten(-1, (m.heads, -1))
    return m.out_proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).expand(len(x), -1, -1, -1), v).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [60, 31, 2])
@pytest.mark.parametrize("options", DENSE)
@pytest.mark.oracle("definition: the matrix of weights", "synthesizer_dense")
def test_dense(
    same_as: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], length: int, causal: bool
) -> None:
    monkeypatch.setattr("mmlong.ops.given_scores.BLOCK_ELEMENTS", 1000)
    m = build("synthesizer_dense", causal, **options)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    sizes = options.get("factors", (60,))
    made = []
    for i, n in enumerate(sizes):
        rows = []
        for h in range(3):
            units = slice((3 * i + h) * m.hidden, (3 * i + h + 1) * m.hidden)
            inner = (x @ m.in_proj.weight[units].T + m.in_proj.bias[units]).clamp_min(0)
            rows.append(inner @ m.tables[i][h].T + m.biases[i][h])
        made.append(torch.stack(rows, 1))  # (2, 3, length, n)
        assert made[-1].shape[-1] == n
    scores = made[0] if len(made) == 1 else made[0].repeat_interleave(10, -1) * made[1].repeat(1, 1, 1, 6)
    same_as(m, x, (m(x)[0], None), (by_weights(m, x, scores[..., :length]), None))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [60, 31, 2])
@pytest.mark.parametrize("options", RANDOM)
@pytest.mark.oracle("definition: the matrix of weights", "synthesizer_random")
def test_random(
    same_as: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], length: int, causal: bool
) -> None:
    monkeypatch.setattr("mmlong.ops.given_scores.BLOCK_ELEMENTS", 1000)
    m = build("synthesizer_random", causal, **options)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    R = m.R if m.rank is None else m.R1 @ m.R2.mT
    same_as(m, x, (m(x)[0], None), (by_weights(m, x, R[None, :, :length, :length]), None))


def test_a_frozen_matrix_is_saved_and_not_learned() -> None:
    for rank in (None, 8):
        m = build("synthesizer_random", rank=rank, learned=False)
        assert {name for name, _ in m.named_parameters()} == {"v_proj.weight", "out_proj.weight"}
        assert set(m.state_dict()) > ({"R"} if rank is None else {"R1", "R2"})


def test_random_scores_are_standard_normal_at_the_start() -> None:
    torch.manual_seed(0)
    for rank in (None, 8):
        m: Any = create_mixer("synthesizer_random", 16, max_length=500, rank=rank)
        R = m.R if rank is None else m.R1 @ m.R2.mT
        assert abs(float(R.detach().std()) - 1) < 0.05


def test_weights_of_dense_know_their_own_token_only() -> None:
    """Moving other tokens moves values, not weights: the output is linear in all tokens but its own."""
    m = build("synthesizer_dense", causal=False)
    x, other = torch.randn(2, 1, 20, 24, dtype=torch.float64)
    own = x[:, :1]
    a, b, mean = (m(torch.cat([own, t[:, 1:]], 1))[0][:, 0] for t in (x, other, (x + other) / 2))
    torch.testing.assert_close((a + b) / 2, mean)


def test_impossible_options_and_lengths() -> None:
    for name in ("synthesizer_dense", "synthesizer_random"):
        with pytest.raises(ValueError, match=f"{name}: max_length must be at least 1, got 0"):
            build(name, max_length=0)
        m = build(name)
        with pytest.raises(ValueError, match=f"{name}: a document of 61 tokens.*max_length=60.*larger max_length"):
            m(torch.zeros(1, 61, 24, dtype=torch.float64))
        _, state = m(torch.zeros(1, 60, 24, dtype=torch.float64))
        with pytest.raises(ValueError, match=f"{name}: a document of 61 tokens"):
            m(torch.zeros(1, 1, 24, dtype=torch.float64), state)
    with pytest.raises(ValueError, match="synthesizer_dense: hidden must be at least 1, got 0"):
        build("synthesizer_dense", hidden=0)
    for factors in ((6, 9), (60,), (-6, -10)):
        with pytest.raises(
            ValueError, match="synthesizer_dense: factors must be two numbers whose product is max_length=60"
        ):
            build("synthesizer_dense", factors=factors)
    with pytest.raises(ValueError, match="synthesizer_random: rank must be at least 1, got 0"):
        build("synthesizer_random", rank=0)
