"""The sound modalities: exact inverse, torchaudio's mu-law, channels, padding, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.layout import Layout
from mmlong.modalities import create_modality
from mmlong.modalities.audio import MU, compand, expand, mulaw_decode, mulaw_encode


def recordings(batch: int, channels: int, length: int) -> torch.Tensor:
    """Noise, ``(B, T)`` of one channel and ``(B, C, T)`` of more."""
    raw = torch.rand(batch, channels, length) * 2 - 1
    return raw[:, 0] if channels == 1 else raw


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), channels=st.integers(1, 3), length=st.integers(1, 67), padded=st.booleans())
def test_decode_is_the_inverse_of_encode(batch: int, channels: int, length: int, padded: bool) -> None:
    raw = recordings(batch, channels, length)
    lengths = torch.randint(length + 1, (batch,)) if padded else None
    kept = raw
    if lengths is not None:
        valid = torch.arange(length) < lengths[:, None]
        kept = torch.where(valid if channels == 1 else valid[:, None], raw, 0)
    modality = create_modality("audio", 8, rate=8000, channels=channels)
    tokens, layout = modality.encode(raw, lengths)
    assert tokens.shape == (batch, length, channels)
    assert modality.decode(tokens, layout).equal(kept)
    assert modality.embed(tokens, layout).shape == (batch, length, 8)

    codes = create_modality("mulaw", 8, rate=8000, channels=channels)
    tokens, layout = codes.encode(raw, lengths)
    assert tokens.shape == (batch, length * channels)
    assert lengths is None or (layout.lengths == lengths * channels).all()
    again = codes.decode(tokens, layout)
    # Half a step of the curve: its slope times half of 2 / MU, at the larger of the two ends.
    step = math.log1p(MU) * (1 + MU * torch.maximum(kept.abs(), again.abs())) / MU / MU
    assert ((again - kept).abs() <= step + 1e-6).all()
    assert codes.embed(tokens, layout).shape == (batch, length * channels, 8)


def test_mulaw_is_torchaudios() -> None:
    transforms = pytest.importorskip("torchaudio.transforms")
    x = torch.cat([torch.linspace(-1, 1, 100_001), torch.randn(10_000).clamp(-1, 1) / 50, torch.zeros(1)])
    codes = mulaw_encode(x)
    assert codes.equal(transforms.MuLawEncoding(256)(x))
    every = torch.arange(256)
    assert torch.allclose(mulaw_decode(every), transforms.MuLawDecoding(256)(every), atol=1e-6, rtol=0)
    assert codes.unique().numel() == 256
    assert mulaw_encode(mulaw_decode(every)).equal(every), "a code is not its own code after decoding"


@given(st.floats(-4, 4, width=32))
def test_the_curve_is_odd_rising_and_invertible(value: float) -> None:
    x = torch.tensor(value, dtype=torch.float64)
    assert torch.isclose(expand(compand(x)), x, rtol=1e-9, atol=1e-12)
    assert compand(-x) == -compand(x)
    assert compand(x + 0.01) > compand(x)


def test_beyond_full_scale() -> None:
    raw = torch.tensor([[0.5, 1.5, -3.0]])
    tokens, _ = create_modality("audio", 8, rate=8000).encode(raw)
    assert tokens[..., 0].equal(raw)
    codes, _ = create_modality("mulaw", 8, rate=8000).encode(raw)
    assert codes[0, 1:].tolist() == [255, 0]


def test_stereo_codes_are_interleaved() -> None:
    modality = create_modality("mulaw", 8, rate=8000, channels=2)
    left, right = torch.linspace(-1, 1, 5), torch.linspace(1, 0, 5)
    resets = torch.tensor([[True, False, False, True, False]])
    tokens, layout = modality.encode(torch.stack([left, right])[None], torch.tensor([4]), resets)
    assert tokens[0, 0:8:2].equal(mulaw_encode(left[:4]))
    assert tokens[0, 1:8:2].equal(mulaw_encode(right[:4]))
    assert layout.resets is not None
    assert layout.resets[0].nonzero().flatten().tolist() == [0, 6]
    layout.check(1, 10)
    with pytest.raises(ValueError, match="9 codes are not whole moments of 2 channels"):
        modality.decode(tokens[:, :9])


@pytest.mark.parametrize("name", ["audio", "mulaw"])
def test_padding_changes_nothing(name: str) -> None:
    modality = create_modality(name, 8, rate=8000)
    raw = recordings(3, 1, 21)
    lengths = torch.tensor([21, 13, 1])
    spoilt = torch.where(torch.arange(21) < lengths[:, None], raw, float("nan"))
    clean, layout = modality.encode(raw, lengths)
    tokens, _ = modality.encode(spoilt, lengths)
    assert tokens.equal(clean)
    assert modality.embed(tokens, layout).isfinite().all()
    alone, _ = modality.encode(raw[1:2, :13])
    assert clean[1:2, :13].equal(alone)


@pytest.mark.parametrize("name", ["audio", "mulaw"])
def test_quiet_sounds_are_heard(name: str) -> None:
    """The stem tells samples apart whose difference is a thousandth of full scale, at any state of its random weights."""
    modality = create_modality(name, 32, rate=8000)
    tokens, layout = modality.encode(torch.tensor([[0.0, 0.001]]))
    quiet = modality.embed(tokens, layout)[0].diff(dim=0).norm()
    tokens, layout = modality.encode(torch.tensor([[0.5, 0.501]]))
    loud = modality.embed(tokens, layout)[0].diff(dim=0).norm()
    assert quiet > 5 * loud


def test_levels_are_those_of_the_integers() -> None:
    modality = create_modality("audio", 8, rate=8000)
    assert modality.levels is not None
    steps = (torch.arange(-32768, 32768) / 32768 + 1) / (2 / (modality.levels - 1))
    assert steps.equal(steps.round())
    assert create_modality("audio", 8, rate=8000, bits=None).levels is None
    assert create_modality("mulaw", 8, rate=8000).codes == 256


@pytest.mark.parametrize("name", ["audio", "mulaw"])
def test_refuses_other_raw_tensors(name: str) -> None:
    mono, stereo = create_modality(name, 8, rate=8000), create_modality(name, 8, rate=8000, channels=2)
    with pytest.raises(TypeError, match="float32 with full scale at -1 and 1, got torch.int16: divide"):
        mono.encode(torch.zeros(1, 5, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"hears 1 channel, \(B, T\), got \(1, 2, 5\)"):
        mono.encode(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"hears 2 channels, \(B, 2, T\), got \(1, 5\)"):
        stereo.encode(torch.zeros(1, 5))
    for bad in (float("nan"), float("inf")):
        raw = torch.zeros(3, 9)
        raw[1, 4] = bad
        with pytest.raises(ValueError, match="row 1 has a sample that is NaN or infinite, the first at 4"):
            mono.encode(raw)
    with pytest.raises(ValueError, match="between 0 and the 9 samples there are"):
        mono.encode(torch.zeros(1, 9), torch.tensor([10]))
    with pytest.raises(ValueError, match="lengths has 2 rows"):
        mono.encode(torch.zeros(1, 9), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="layout.resets"):
        mono.encode(torch.zeros(1, 9), None, torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="rate 0"):
        create_modality(name, 8, rate=0)
    with pytest.raises(TypeError):
        create_modality(name, 8)


def test_layout_is_plain() -> None:
    tokens, layout = create_modality("audio", 8, rate=8000).encode(torch.zeros(1, 1, 5))
    assert isinstance(layout, Layout)
    assert layout.lengths is None
    assert tokens.shape == (1, 5, 1), "one channel may also come as (B, 1, T)"
