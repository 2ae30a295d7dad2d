"""The two-tower head by its formula, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmlong.heads import create_head
from mmlong.layout import Layout


@pytest.mark.parametrize("interaction", ["nli", "concat"])
def test_logits_by_hand(interaction: str) -> None:
    torch.manual_seed(0)
    head = create_head("match", 6, num_classes=3, interaction=interaction, hidden=10)
    x = torch.randn(4, 7, 6)
    lengths = torch.tensor([7, 3, 5, 1])
    u, v = (torch.stack([x[i, : lengths[i]].mean(0) for i in rows]) for rows in ((0, 2), (1, 3)))
    both = torch.cat([u, v, u * v, u - v] if interaction == "nli" else [u, v], -1)
    first, second = head.layers[0], head.layers[2]
    expected = head.linear(F.relu(second(F.relu(first(both)))))
    torch.testing.assert_close(head(x, Layout(lengths=lengths)), expected)
    assert first.out_features == 10
    assert second.out_features == 5
    total, count = head.loss(expected, torch.tensor([0, 2]))
    torch.testing.assert_close(total, F.cross_entropy(expected, torch.tensor([0, 2]), reduction="sum"))
    assert count == 2


def test_without_classes_each_document_has_its_vector() -> None:
    x = torch.randn(4, 7, 6)
    head = create_head("match", 6, num_classes=0)
    torch.testing.assert_close(head(x), x.mean(1))
    torch.testing.assert_close(create_head("match", 6).pooled(x), x.mean(1))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs of rows, got 3"):
        create_head("match", 6)(torch.randn(3, 7, 6))
    with pytest.raises(ValueError, match="nli or concat"):
        create_head("match", 6, interaction="dot")
