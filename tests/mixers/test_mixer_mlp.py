"""The token MLP of MLP-Mixer against timm's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmlong.mixers import create_mixer


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_mixer("mixer_mlp", dim, **options).double()


class Tokens(nn.Module):
    """A module over the last axis, of the tokens."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.oracle("timm: mlp_tokens of MixerBlock", "mixer_mlp")
def test_against_timm(same_as: Any) -> None:
    timm = pytest.importorskip("timm.models.mlp_mixer")
    m = build(16, max_length=24)
    block = timm.MixerBlock(16, 24).double()
    assert block.mlp_tokens.fc1.out_features == m.hidden
    theirs = Tokens(block.mlp_tokens)
    # The same tensors, so that gradients of the parameters can be compared too.
    theirs.mlp.fc1.weight, theirs.mlp.fc1.bias = m.fc1.weight, m.fc1.bias
    theirs.mlp.fc2.weight, theirs.mlp.fc2.bias = m.fc2.weight, m.fc2.bias
    x = torch.randn(3, 24, 16, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (theirs(x), None))


def test_a_shorter_document_is_one_with_zeros_after_it() -> None:
    m = build(6, max_length=24, hidden=5)
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    torch.testing.assert_close(m(x)[0], m(F.pad(x, (0, 0, 0, 11)))[0][:, :13])


def test_options() -> None:
    assert create_mixer("mixer_mlp", 1).hidden == 1
    m = create_mixer("mixer_mlp", 8, max_length=20)
    with pytest.raises(
        ValueError, match="mixer_mlp: a document of 21 tokens, but its matrices have max_length=20 columns"
    ):
        m(torch.randn(1, 21, 8))
    for option in ("hidden", "max_length"):
        with pytest.raises(ValueError, match=f"mixer_mlp: {option} must be at least 1, got 0"):
            create_mixer("mixer_mlp", 8, **{option: 0})
    with pytest.raises(ValueError, match="has no causal form"):
        create_mixer("mixer_mlp", 8, causal=True)
