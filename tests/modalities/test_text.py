"""Text is bytes: any bytes, there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.modalities import create_modality


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=3))
def test_any_bytes_come_back(rows: list[bytes]) -> None:
    modality = create_modality("text", 8)
    length = max(map(len, rows))
    raw = torch.tensor([list(row.ljust(length, b"!")) for row in rows], dtype=torch.uint8)
    codes, layout = modality.encode(raw, torch.tensor([len(row) for row in rows]))
    assert codes.dtype == torch.int64
    layout.check(*codes.shape)
    back = modality.decode(codes, layout)
    assert back.dtype == torch.uint8
    for row, text in enumerate(rows):
        assert codes[row].tolist() == list(text.ljust(length, b"\0"))
        assert bytes(back[row, : len(text)].tolist()) == text
    assert modality.embed(codes, layout).shape == (*codes.shape, 8)


@pytest.mark.parametrize("text", ["naïve, 日本, 🙂".encode(), b"\xff\xfe\x00 not UTF-8 \xc3", bytes(range(256))])
def test_every_byte_is_a_code(text: bytes) -> None:
    modality = create_modality("text", 8)
    assert (modality.unit, modality.codes, modality.levels, modality.channels) == ("byte", 256, 256, 1)
    codes, layout = modality.encode(torch.tensor([list(text)], dtype=torch.uint8))
    assert codes[0].tolist() == list(text)
    assert bytes(modality.decode(codes, layout)[0].tolist()) == text
    assert modality.places(None, len(text)) is None


def test_what_is_refused() -> None:
    modality = create_modality("text", 8)
    with pytest.raises(TypeError, match="one byte a token; got torch.int64"):
        modality.encode(torch.zeros(1, 3, dtype=torch.int64))
    for shape in ((3,), (1, 2, 3), (1, 0)):
        with pytest.raises(ValueError, match="T >= 1"):
            modality.encode(torch.zeros(shape, dtype=torch.uint8))
    raw = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"lengths must be 0 .. 3, got \[1, 4\]"):
        modality.encode(raw, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="lengths has 1 rows"):
        modality.encode(raw, torch.tensor([1]))
    with pytest.raises(ValueError, match="codes must be 0 .. 255, got 0 .. 256"):
        modality.decode(torch.tensor([[0, 256]]))
