"""What tests of parts share: rows of other lengths with several documents each, whole and in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mmlong.layout import Layout


def check_unlike_rows(m: nn.Module) -> None:
    """A part of width 8 in float64: every document is what it is by itself, from nothing and from a state, in pieces of 1 and 5, and so is what follows."""
    resets = torch.zeros(3, 37, dtype=torch.bool)
    for row, position in ((0, 10), (0, 11), (1, 19), (2, 5), (0, 30)):
        resets[row, position] = True
    layout = Layout(lengths=torch.tensor([37, 20, 9]), resets=resets)
    valid = layout.valid(37)
    assert valid is not None
    x = torch.randn(3, 37, 8, dtype=torch.float64)
    x = torch.where(valid[..., None], x, 100.0)
    past = m(torch.randn(3, 7, 8, dtype=torch.float64))[1]
    more = torch.randn(3, 6, 8, dtype=torch.float64)
    for given in (None, past):
        whole, last = m(x, given, layout)
        for row, cuts in enumerate(([0, 10, 11, 30, 37], [0, 19, 20], [0, 5, 9])):
            before = None if given is None else {name: t[row : row + 1] for name, t in given.items()}
            for a, b in itertools.pairwise(cuts):
                y, before = m(x[row : row + 1, a:b], before if a == 0 else None)
                torch.testing.assert_close(whole[row : row + 1, a:b], y)
            torch.testing.assert_close(m(more, last)[0][row : row + 1], m(more[row : row + 1], before)[0])
        for size in (1, 5):
            state, parts = given, []
            for a in range(0, 37, size):
                y, state = m(x[:, a : a + size], state, layout.slice(a, min(a + size, 37)))
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid])
            torch.testing.assert_close(m(more, state)[0], m(more, last)[0])


@pytest.fixture
def unlike_rows() -> Callable[[Any], None]:
    return check_unlike_rows
