"""The image modality: exact inverse, grids, positions, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.layout import SCAN_ORDERS
from mmlong.modalities import create_modality


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 17), st.integers(1, 17), st.sampled_from([1, 3]), st.sampled_from(SCAN_ORDERS), st.integers(1, 3))
def test_decode_is_the_exact_inverse(height: int, width: int, channels: int, order: str, batch: int) -> None:
    modality = create_modality("image", 8, size=[height, width], channels=channels, order=order)
    raw = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8)
    tokens, layout = modality.encode(raw)
    assert tokens.shape == (batch, height * width, channels)
    assert tokens.min() >= -1
    assert tokens.max() <= 1
    assert layout.grid == (height, width)
    assert modality.decode(tokens, layout).equal(raw)
    assert modality.embed(tokens, layout).shape == (batch, height * width, 8)
    layout.check(batch, height * width)


def test_every_byte_survives() -> None:
    modality = create_modality("image", 8, size=[16, 16])
    raw = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    tokens, layout = modality.encode(raw)
    assert modality.decode(tokens, layout).equal(raw)


def test_tokens_follow_the_scan_order() -> None:
    modality = create_modality("image", 8, size=[4, 4], order="morton")
    raw = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    tokens, layout = modality.encode(raw)
    seen = ((tokens[0, :, 0] + 1) * 127.5).round().long()
    assert seen.tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    rows_and_columns = layout.coordinates(16)[0]
    assert (rows_and_columns[:, 0] * 4 + rows_and_columns[:, 1]).tolist() == seen.tolist()


def test_position_is_known_to_the_model() -> None:
    modality = create_modality("image", 16, size=[8, 8])
    tokens, layout = modality.encode(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8))
    x = modality.embed(tokens, layout)[0]
    assert torch.cdist(x, x).add(torch.eye(64) * 9).min() > 1e-3, "two equal pixels at different places look the same"


def test_refuses_other_images() -> None:
    modality = create_modality("image", 8, size=[8, 8])
    with pytest.raises(TypeError, match="uint8"):
        modality.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), got \(1, 3, 8, 8\)"):
        modality.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="whole images of 64 pixels, got 63"):
        modality.embed(torch.zeros(1, 63, 1), None)
    with pytest.raises(TypeError, match="did you mean 'order'"):
        create_modality("image", 8, size=[8, 8], odrer="raster")
    with pytest.raises(KeyError, match="did you mean 'image'"):
        create_modality("imgae", 8)
    with pytest.raises(ValueError, match="unknown scan order"):
        create_modality("image", 8, size=[8, 8], order="spiral")
