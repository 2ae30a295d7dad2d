"""Codes of somebody else's tokenizer: what is added to them, and what is refused; the contract is the conformance suite's."""

from __future__ import annotations

import pytest
import torch

from mmlong.modalities import create_modality


def test_what_is_added_to_a_code() -> None:
    torch.manual_seed(0)
    m = create_modality("tokens", 4, codes=10, special=2, places=9, first_place=2, scale=3.0, types=2)
    tokens = torch.tensor([[3, 11, 0]])
    want = 3 * m.code.weight[tokens] + m.type_table.weight[0] + m.place.weight[2:5]
    torch.testing.assert_close(m.embed(tokens), want)
    torch.testing.assert_close(
        m.embed(tokens, index=torch.tensor([[4, 5, 6]]))[0, 2], want[0, 2] + m.place.weight[8] - m.place.weight[4]
    )
    with pytest.raises(ValueError, match="the model has learned 7 places, and a sequence has 8"):
        m.places(None, 8)


def test_what_is_refused() -> None:
    m = create_modality("tokens", 4, codes=10, special=2)
    assert m.encode(torch.tensor([[11]]))[0].tolist() == [[11]]
    with pytest.raises(ValueError, match=r"codes must be 0 \.\. 11, got 3 \.\. 12"):
        m.encode(torch.tensor([[3, 12]]))
    with pytest.raises(ValueError, match=r"codes must be 0 \.\. 9"):
        m.decode(torch.tensor([[10]]))
    with pytest.raises(TypeError, match="tokens are int64"):
        m.encode(torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes must be at least 1"):
        create_modality("tokens", 4, codes=0)
    with pytest.raises(ValueError, match="of 2 places none is left where the first is number 2"):
        create_modality("tokens", 4, codes=5, places=2, first_place=2)
