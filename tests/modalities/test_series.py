"""Series: what is observed, when, and what is missing."""

from __future__ import annotations

import pytest
import torch

from mmlong.modalities import create_modality


def series() -> torch.Tensor:
    """One row of two channels, four moments: 3.0 of channel 1 at time 1.5 is missing."""
    time, a, b = [0.5, 1.0, 1.5, 4.0], [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]
    return torch.tensor([[time, a, b, [1, 1, 0, 1], [1, 0, 1, 1]]], dtype=torch.float32)


def test_tokens_are_values_masks_and_gaps() -> None:
    tokens, layout = create_modality("series", 8, channels=2).encode(series())
    assert tokens[0].tolist() == [
        [1, 10, 1, 1, 0],
        [2, 0, 1, 0, 0.5],
        [0, 30, 0, 1, 0.5],
        [4, 40, 1, 1, 2.5],
    ]
    assert layout.positions.tolist() == [[[0.5], [1.0], [1.5], [4.0]]]


def test_times_come_back_by_positions_or_are_counted() -> None:
    modality = create_modality("series", 8, channels=2)
    tokens, layout = modality.encode(series())
    assert modality.decode(tokens, layout)[0, 0].tolist() == [0.5, 1.0, 1.5, 4.0]
    assert modality.decode(tokens)[0, 0].tolist() == [0.0, 0.5, 1.0, 3.5]


def test_means_and_deviations_are_of_what_was_observed() -> None:
    modality = create_modality("series", 8, channels=2)
    assert not modality.initialised
    padded = torch.cat([series(), torch.zeros(1, 5, 3)], 2)
    modality.initialise(padded)
    assert modality.initialised
    torch.testing.assert_close(modality.mean, torch.tensor([7 / 3, 80 / 3]))
    torch.testing.assert_close(
        modality.scale, torch.tensor([1, 2, 4.0]).std(correction=0)[None].repeat(2) * torch.tensor([1.0, 10.0])
    )
    torch.testing.assert_close(modality.gap, torch.tensor(3.5 / 3))
    # Nor is the step from a time before 0 to the padding a gap.
    early = series()
    early[:, 0] -= 5
    modality.initialise(torch.cat([early, torch.zeros(1, 5, 3)], 2))
    torch.testing.assert_close(modality.gap, torch.tensor(3.5 / 3))
    # A missing value is its channel's mean: what stands in its place in the raw data is not seen.
    other = series()
    other[0, 1, 2] = 99.0
    tokens, _ = modality.encode(other)
    assert torch.equal(modality.embed(tokens), modality.embed(modality.encode(series())[0]))
    fresh = create_modality("series", 8, channels=2)
    fresh.load_state_dict(modality.state_dict())
    assert fresh.initialised


def test_a_gap_is_told() -> None:
    """The same values at other times are other tokens."""
    modality, later = create_modality("series", 8, channels=2), series()
    later[0, 0, 3] = 9.0
    x, y = (modality.embed(*modality.encode(raw)) for raw in (series(), later))
    assert torch.equal(x[:, :3], y[:, :3])
    assert not torch.allclose(x[:, 3], y[:, 3])


@pytest.mark.parametrize(
    ("row", "moment", "value", "said"),
    [
        (0, 2, 0.7, "row 0: the time goes back at moment 2; order a series by its times"),
        (3, 1, 0.5, "masks of a series are 1 .observed. and 0 .missing."),
        (1, 0, float("nan"), "NaN or infinite: what is missing is told by its mask"),
    ],
)
def test_what_is_refused(row: int, moment: int, value: float, said: str) -> None:
    raw = series()
    raw[0, row, moment] = value
    with pytest.raises(ValueError, match=said):
        create_modality("series", 8, channels=2).encode(raw)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads series \(B, 7, T\), T >= 1: time, 3 values, 3 masks; got \(1, 5, 4\)"):
        create_modality("series", 8, channels=3).encode(series())
    with pytest.raises(ValueError, match="at least 1 channel"):
        create_modality("series", 8, channels=0)
    with pytest.raises(ValueError, match="takes no resets"):
        create_modality("series", 8, channels=2).encode(series(), None, torch.zeros(1, 4, dtype=torch.bool))
