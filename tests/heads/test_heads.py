"""Heads: what padding may not change, and the losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmlong.heads import create_head
from mmlong.layout import Layout


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_pooling_ignores_padding(pool: str) -> None:
    torch.manual_seed(0)
    head = create_head("classify", 8, num_classes=3, pool=pool)
    x = torch.randn(2, 9, 8)
    x[1, 5:] = 1e6
    padded = head(x, Layout(lengths=torch.tensor([9, 5])))
    torch.testing.assert_close(padded[0], head(x[:1])[0])
    torch.testing.assert_close(padded[1], head(x[1:, :5])[0])


def test_classify_loss_is_a_sum_of_nats() -> None:
    head = create_head("classify", 4, num_classes=4)
    loss, count = head.loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    assert float(loss) == pytest.approx(3 * math.log(4))
    assert float(count) == 3


def test_categorical_loss_counts_valid_positions_only() -> None:
    head = create_head("categorical", 4, num_classes=8)
    logits, target = torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.long)
    logits[1, 2:] = torch.nan
    loss, count = head.loss(logits, target, Layout(lengths=torch.tensor([5, 2])))
    assert float(count) == 7
    assert float(loss) == pytest.approx(7 * math.log(8), rel=1e-6)


def test_readout_reads_each_position_by_itself_and_refuses_other_lengths() -> None:
    torch.manual_seed(0)
    head = create_head("readout", 4, num_classes=2, tokens=6, width=3)
    x = torch.randn(2, 6, 4)
    assert not torch.allclose(head(x), head(x.flip(1)))
    with pytest.raises(ValueError, match="exactly 6 tokens, got 5 tokens"):
        head(x[:, :5])
    with pytest.raises(ValueError, match="padded rows"):
        head(x, Layout(lengths=torch.tensor([6, 5])))


def test_unknown_options_and_names() -> None:
    with pytest.raises(ValueError, match="unknown pooling 'sum'"):
        create_head("classify", 4, num_classes=2, pool="sum")
    with pytest.raises(KeyError, match="did you mean 'classify'"):
        create_head("clasify", 4)
    with pytest.raises(TypeError, match="did you mean 'num_classes'"):
        create_head("classify", 4, num_class=2)
