"""Mixers of continuous time at other rates: what they do to a signal does not depend on how densely it is sampled, once their step is changed; the others refuse."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import MIXERS, Mixer, Traits, create_mixer, list_mixers
from mmlong.testing import check_mixer

DIM = 4
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("s4", {}),
    ("s4", {"causal": False}),
    ("s4d", {}),
    ("s4d", {"causal": False, "init": "legs"}),
    ("s5", {}),
    ("s5", {"causal": False}),
    ("lru", {"max_phase": 0.2}),
]
RATES = [Fraction(1, 2), Fraction(1, 3), Fraction(2), Fraction(3, 2)]


def make(name: str, options: dict[str, Any]) -> Mixer:
    torch.manual_seed(0)
    return create_mixer(name, DIM, **options).double().requires_grad_(False)


def signal(times: Tensor, end: float, seed: int) -> Tensor:
    """Sums of slow sines that come up from silence and fade into it, at ``times``: ``(1, T, DIM)``; periods of 100 units of time and more."""
    draw = torch.Generator().manual_seed(seed)
    rate, phase, size = (torch.rand(5, DIM, generator=draw, dtype=torch.float64) for _ in range(3))
    waves = (size * torch.sin(2 * math.pi * (rate * times[:, None, None] / 100 + phase))).sum(1)
    return (torch.sin(math.pi * times / end) ** 2)[:, None].mul(waves)[None]


def differ(mixer: Mixer, other: Mixer, factor: Fraction, seed: int, end: float = 600.0) -> float:
    """How far ``other`` on the signal sampled ``1 / factor`` times as densely is from ``mixer`` on the signal, at the moments that both have; relative to the output's deviation."""
    ours, _ = mixer(signal(torch.arange(0, end, dtype=torch.float64), end, seed))
    theirs, _ = other(signal(torch.arange(0, end, float(factor), dtype=torch.float64), end, seed))
    ours, theirs = ours[:, :: factor.numerator], theirs[:, :: factor.denominator]
    length = min(ours.shape[1], theirs.shape[1])
    return float((ours[:, :length] - theirs[:, :length]).square().mean().sqrt() / ours.std())


@pytest.mark.parametrize(("name", "options"), FORMS)
@settings(deadline=None, max_examples=4)
@given(factor=st.sampled_from(RATES), seed=st.integers(0, 2**31))
def test_a_signal_sampled_otherwise_gives_the_same(
    name: str, options: dict[str, Any], factor: Fraction, seed: int
) -> None:
    mixer, changed = make(name, options), make(name, options)
    changed.resample(float(factor))
    near, far = differ(mixer, changed, factor, seed), differ(mixer, make(name, options), factor, seed)
    assert near < 0.05
    assert near < far / 10


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_the_difference_falls_with_the_step(name: str, options: dict[str, Any]) -> None:
    """Both hold the signal from one moment to the next, which is as wrong as a step is long: with steps of a quarter, a quarter as wrong or so."""
    errors = []
    for quarter in (1.0, 0.25):
        mixer, changed = make(name, options), make(name, options)
        for one, step in ((mixer, quarter), (changed, quarter / 2)):
            one.resample(step)
        x = [signal(torch.arange(0, 600, step, dtype=torch.float64), 600, 1) for step in (quarter, quarter / 2)]
        y, z = mixer(x[0])[0], changed(x[1])[0][:, ::2]
        errors.append(float((y - z).square().mean().sqrt() / y.std()))
    assert errors[1] < 0.4 * errors[0]


def test_a_finer_grid() -> None:
    mixer, changed, same = (make("s4nd", {"d_state": 16}) for _ in range(3))
    changed.resample(0.5)

    def picture(n: int) -> Tensor:
        side = torch.arange(0, 24, 24 / n, dtype=torch.float64) * 2 * math.pi / 24
        waves = [
            torch.sin(side + k)[:, None] * torch.cos(side + 2 * k)[None] + torch.sin(side)[None] for k in range(DIM)
        ]
        return torch.stack(waves, -1).flatten(0, 1)[None]

    y = mixer(picture(24), None, Layout(grid=(24, 24)))[0].view(24, 24, DIM)
    errors = []
    for other in (changed, same):
        z = other(picture(48), None, Layout(grid=(48, 48)))[0].view(48, 48, DIM)[::2, ::2]
        errors.append(float((y - z).square().mean().sqrt() / y.std()))
    assert errors[0] < 0.3
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("factor", [0.5, 0.3, 2.0])
def test_lru_is_held_by_scipy_at_both_steps(factor: float) -> None:
    """Each mode as the real system of least frequency that scipy's zero-order hold turns into it, held at the new step."""
    m, new = make("lru", {"d_state": 9}), make("lru", {"d_state": 9})
    new.resample(factor)
    (lam, b, _), (lam2, b2, _) = (each.discretise(torch.float64) for each in (m, new))  # type: ignore[operator]
    for n in range(9):
        a = np.log(lam[n].numpy())
        A = np.array([[a.real, -a.imag], [a.imag, a.real]])
        into = (b[n].numpy() * a / (lam[n].numpy() - 1))[None]
        system = (A, np.concatenate([into.real, into.imag]), np.eye(2), np.zeros((2, DIM)))
        for step, want, gain in ((1.0, lam, b), (factor, lam2, b2)):
            Ad, Bd, *_ = scipy.signal.cont2discrete(system, step, method="zoh")
            np.testing.assert_allclose(Ad[0, 0] + 1j * Ad[1, 0], want[n].numpy(), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(Bd[0] + 1j * Bd[1], gain[n].numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_there_and_back(name: str, options: dict[str, Any]) -> None:
    """Towards denser samples nothing folds over, so the way back is exact."""
    mixer, changed = make(name, options), make(name, options)
    x = torch.randn(2, 31, DIM, dtype=torch.float64)
    changed.resample(0.25)
    assert float((changed(x)[0] - mixer(x)[0]).abs().max()) > 1e-3
    changed.resample(4.0)
    torch.testing.assert_close(changed(x)[0], mixer(x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_the_contract_is_kept(name: str, options: dict[str, Any]) -> None:
    def resampled(dim: int) -> nn.Module:
        made = create_mixer(name, dim, **options)
        made.resample(0.5)
        return made

    checked = check_mixer(resampled, dims=[4], only=["pieces", "padding"])
    assert ("pieces" in checked) == options.get("causal", True)


def test_the_others_refuse() -> None:
    for name in list_mixers(continuous=False):
        mixer = create_mixer(name, 16, causal=MIXERS[name].traits.causal)
        with pytest.raises(ValueError, match=r"counts in tokens.*Mixers that do: lru, s4, s4d, s4nd, s5"):
            mixer.resample(2)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_is_none(factor: float) -> None:
    for name in list_mixers(continuous=True):
        mixer = create_mixer(name, 4, causal=MIXERS[name].traits.causal)
        before = {key: value.clone() for key, value in mixer.state_dict().items()}
        with pytest.raises(ValueError, match="the old rate over the new, a number above 0"):
            mixer.resample(factor)
        assert all(value.equal(before[key]) for key, value in mixer.state_dict().items())


def test_who_claims_it_must_define_it() -> None:
    class Claims(Mixer):
        traits = Traits(paper="none", continuous=True)

    with pytest.raises(TypeError, match="Claims does not define change_step"):
        Claims(4).resample(2)
