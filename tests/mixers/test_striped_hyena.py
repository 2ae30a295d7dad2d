"""StripedHyena 2's three operators against torch's convolutions with filters made lag by lag, their state, initial values and options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import StripedHyena2, create_mixer, state_bytes
from mmlong.mixers.striped_hyena import LongImplicit, MediumRegularised
from mmlong.testing import check_mixer

CASES: list[tuple[int, int, dict[str, Any]]] = [
    (6, 63, {"form": "se"}),
    (8, 77, {"form": "se", "taps": 3, "group": 1}),
    (32, 300, {"form": "mr"}),
    (6, 130, {"form": "mr", "taps": 40, "group": 3}),
    (4, 5, {"form": "mr", "taps": 2}),
    (4, 257, {"form": "li"}),
    (6, 63, {"form": "li", "modes": 3, "group": 3}),
]


def make(dim: int, **options: Any) -> StripedHyena2:
    torch.manual_seed(0)
    mixer = create_mixer("stripedhyena2", dim, **options).double()
    assert isinstance(mixer, StripedHyena2)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return mixer


def lags(m: StripedHyena2, length: int) -> Tensor:
    """The filter of each channel, lag 0 first ``(D, lags)``, a group and a lag at a time."""
    f, rows = m.filter, []
    for g in range(f.groups):
        if isinstance(f, LongImplicit):
            powers = [torch.exp(-torch.exp(f.log_rate[g]) * lag) for lag in range(length)]
            row = torch.stack([(f.residue[g] * p).sum() for p in powers])
        else:
            row = f.taps[g].flip(0)
            if isinstance(f, MediumRegularised):
                alpha = 10 ** (-2 + 4 * g / max(f.groups - 1, 1))
                K = len(row)
                row = torch.stack([row[lag] * math.exp(-alpha * lag / max(K - 1, 1)) for lag in range(K)])
        rows += [row] * (m.dim // f.groups)
    return torch.stack(rows)


def convolve(z: Tensor, k: Tensor) -> Tensor:
    """By torch: ``z (B, L, D)``, ``k (D, lags)`` from lag 0 on."""
    padded = F.pad(z.transpose(1, 2), (k.shape[1] - 1, 0))
    return F.conv1d(padded, k.flip(1)[:, None], groups=k.shape[0]).transpose(1, 2)


def direct(m: StripedHyena2, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's operator, and what it leaves behind."""
    projected = m.in_proj(x)
    q, k, v = convolve(projected, m.conv_weight.flip(1)).chunk(3, -1)
    z, length = k * v, x.shape[1]
    y = convolve(z, lags(m, length))
    f = m.filter
    if isinstance(f, LongImplicit):
        rate = torch.exp(f.log_rate).repeat_interleave(m.dim // f.groups, 0)
        after = x.new_zeros(len(x), *rate.shape)
        for t in range(length):
            after = after * torch.exp(-rate) + z[:, t, :, None]
    else:
        K = f.taps.shape[1]
        after = F.pad(z, (0, 0, K - 1, 0))[:, length:]
    if not isinstance(f, LongImplicit | MediumRegularised):
        return m.out_proj(q * y), {"conv": projected[:, -2:], "filter": after}
    return m.out_proj(q * (y + f.skip * z)), {"conv": projected[:, -2:], "filter": after}


@pytest.mark.parametrize(("dim", "length", "options"), CASES)
@pytest.mark.oracle("torch: conv1d, filters lag by lag", "stripedhyena2")
def test_against_torch_convolutions(same_as: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = make(dim, **options)
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    got, want = m(x), direct(m, x)
    same_as(m, x, got, want)
    assert state_bytes(got[1]) == 2 * 2 * m.state_bytes(length)  # two rows in float64
    assert list(got[1]) == list(want[1])


@pytest.mark.parametrize(("form", "reach"), [("se", 7), ("mr", 128), ("li", None)])
@torch.no_grad()
def test_how_far_an_operator_reaches(form: str, reach: int | None) -> None:
    m = make(4, form=form)
    x = torch.randn(1, 400, 4, dtype=torch.float64)
    other = x.clone()
    other[:, 5] += 1
    change = (m(x)[0] - m(other)[0]).abs().amax((0, 2))
    assert change[:5].max() == 0
    last = 399 if reach is None else 5 + reach - 1 + 2  # beyond the filter, the convolution of width 3
    assert change[last] > 0
    assert reach is None or change[last + 1 :].max() < 1e-12


@pytest.mark.parametrize(
    "options", [{"form": "se"}, {"form": "se", "taps": 1, "group": 1}, {"form": "li", "modes": 2, "group": 4}], ids=str
)
@pytest.mark.parametrize("prop", ["pieces", "padding", "resets", "state", "gradients"])
def test_the_other_forms_keep_the_contract(options: dict[str, Any], prop: str) -> None:
    """The conformance suite sees the default and a medium one."""
    assert check_mixer("stripedhyena2", options=options, only=prop, dims=(16,))


def test_initial_values() -> None:
    torch.manual_seed(0)
    li, mr, se = (StripedHyena2(256, form=form).filter for form in ("li", "mr", "se"))
    assert isinstance(li, LongImplicit)
    assert isinstance(mr, MediumRegularised)
    rate = li.log_rate.detach().exp() * math.e
    assert 0.01 <= float(rate.min()) < 0.011
    assert 0.099 < float(rate.max()) <= 0.1
    assert abs(float(li.residue.detach().std()) - 0.1 / 4) < 1e-3
    assert tuple(mr.taps.shape) == (16, 128)
    assert abs(float(mr.taps.detach().std()) / (1e-5 / 128**0.5) - 1) < 0.1
    window = mr.window(torch.float32)
    assert (window[:, -1] == 1).all()
    assert (window.diff(dim=0) <= 0).all()
    torch.testing.assert_close(window[[0, -1], 0], torch.tensor([-0.01, -100.0]).exp())
    for skip in (li.skip.detach(), mr.skip.detach()):
        assert abs(float(skip.std()) - 1) < 0.2
    assert not hasattr(se, "skip")
    assert tuple(se.taps.shape) == (16, 7)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "lr"}, "unknown form 'lr'"),
        ({"form": "se", "taps": 0}, "taps must be at least 1"),
        ({"form": "li", "modes": 0}, "modes must be at least 1"),
        ({"form": "li", "taps": 7}, "taps is no size of form 'li'"),
        ({"form": "mr", "modes": 7}, "modes is no size of form 'mr'"),
        ({"form": "mr", "group": 3}, "group must divide dim 8, got 3"),
        ({"causal": False}, "causal only"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_mixer("stripedhyena2", 8, **options)
