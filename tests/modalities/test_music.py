"""Music: steps of voices in turn, documents of whole steps, places of voice and beat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.modalities import create_modality
from mmlong.modalities.music import CODES, HOLD, REST


def test_a_step_is_its_voices_in_turn() -> None:
    raw = torch.tensor([[[60, HOLD, 62], [48, 50, REST]]], dtype=torch.uint8)
    modality = create_modality("music", 8, voices=2, period=2)
    resets = torch.tensor([[True, False, True]])
    tokens, layout = modality.encode(raw, torch.tensor([3]), resets)
    assert tokens.tolist() == [[60, 48, HOLD, 50, 62, REST]]
    assert layout.lengths is not None
    assert layout.lengths.tolist() == [6]
    assert layout.resets is not None
    assert layout.resets.tolist() == [[True, False, False, False, True, False]]
    assert (modality.count_tokens(raw), modality.count_tokens(raw, torch.tensor([2]))) == (6, 4)
    places = modality.places(None, 6)[0]
    assert torch.equal(places[0], places[4]), "two steps on"
    assert len({tuple(place.tolist()) for place in places}) == 4, "two voices, two steps"


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_events_come_back(data: st.DataObject) -> None:
    voices, steps = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    row = st.lists(st.integers(0, CODES - 1), min_size=steps, max_size=steps)
    raw = torch.tensor([data.draw(st.lists(row, min_size=voices, max_size=voices))], dtype=torch.uint8)
    modality = create_modality("music", 4, voices=voices)
    tokens, layout = modality.encode(raw)
    assert torch.equal(modality.decode(tokens, layout), raw)


def test_what_is_refused() -> None:
    modality = create_modality("music", 8)
    with pytest.raises(TypeError, match=r"music is uint8 \(B, 4, T\), got torch.int64"):
        modality.encode(torch.zeros(1, 4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"reads music \(B, 4, T\), T >= 1, got \(1, 3, 5\)"):
        modality.encode(torch.zeros(1, 3, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"128 \(hold\) or 129 \(rest\), got 130"):
        modality.encode(torch.full((1, 4, 3), 130, dtype=torch.uint8))
    with pytest.raises(ValueError, match="7 are no whole steps"):
        modality.decode(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one voice"):
        create_modality("music", 8, voices=0)
    raw = torch.zeros(1, 4, 3, dtype=torch.uint8)
    raw[..., 2] = 200  # past a row's end there may be anything
    assert modality.encode(raw, torch.tensor([2]))[0][0, 8:].tolist() == [0] * 4
