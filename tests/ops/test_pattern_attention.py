"""Attention over patterns: each backend beside the definition, with all of the past and with what is kept of it; and what a pattern says of itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.ops.backends import BackendError
from mmlong.ops.block_patterns import CAUSAL, First, LastOfBlocks, Pattern, SameBlock, Window, kept, places_of
from mmlong.ops.pattern_attention import PATTERN_ATTENTION, pattern_attention

CAUSAL_ONES: list[Pattern] = [
    Window(5, 0),
    CAUSAL,
    SameBlock(7, 5) & CAUSAL,
    (SameBlock(6) | LastOfBlocks(6, 2)) & CAUSAL,
    (Window(4, 0) | First(3)) & CAUSAL,
    (LastOfBlocks(5, 5) | Window(0, 0)) & CAUSAL,
]
OTHERS: list[Pattern] = [Window(3, 9), SameBlock(4, 4, 9), Window(None, None), Window(2, 2) | First(2)]


def given_heads(T: int, S: int) -> list[Tensor]:
    r = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, n, 6, generator=r, dtype=torch.float64).requires_grad_() for h, n in ((4, T), (2, S), (2, S))
    ]


@pytest.mark.parametrize("backend", ["mask", "blocks", "auto"])
@pytest.mark.parametrize("pattern", [*CAUSAL_ONES, *OTHERS], ids=str)
def test_is_its_definition(pattern: Pattern, backend: str) -> None:
    for T, past in ((40, 0), (13, 20), (1, 30)):
        if past and pattern in OTHERS:
            continue
        for keeping in (None, pattern) if past else (None,):
            places = torch.from_numpy(places_of(T, past, keeping))
            q, k, v = given_heads(T, len(places))
            got = pattern_attention(q, k, v, pattern, past, keeping=keeping, q_size=8, k_size=4, backend=backend)
            seen = pattern.sees(torch.arange(past, past + T)[:, None], places).expand(T, len(places))
            assert bool(seen.any(1).all())
            scores = q @ k.repeat_interleave(2, 1).mT / 6**0.5
            want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
            torch.testing.assert_close(got, want)
            weights = torch.randn_like(want)
            slopes = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (got, want))
            for a, b in zip(*slopes, strict=True):
                torch.testing.assert_close(a, b)


@given(st.sampled_from(CAUSAL_ONES), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_what_is_kept_is_what_a_later_query_sees(pattern: Pattern, n: int) -> None:
    later, keys = np.arange(n, n + 200)[:, None], np.arange(n)
    asked = np.flatnonzero(np.broadcast_to(pattern.sees(later, keys), (200, n)).any(0))
    held = kept(pattern, n)
    assert set(asked) <= set(held)
    assert list(held) == sorted(held)
    # What is kept and never asked for is a share of what is: of these patterns only a window and a mark at its edge.
    assert len(held) - len(asked) <= 3


@given(st.sampled_from([*CAUSAL_ONES, *OTHERS]), st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_an_interval_is_all_that_is_seen(pattern: Pattern, n: int) -> None:
    i, j = np.arange(n), np.arange(n)
    bounds = pattern.interval(i)
    if bounds is None:
        return
    seen = np.broadcast_to(pattern.sees(i[:, None], j), (n, n))
    assert np.array_equal(seen, (j >= bounds[0][:, None]) & (j < bounds[1][:, None]))


def test_which_patterns_are_intervals() -> None:
    i = np.arange(5)
    assert all(p.interval(i) is not None for p in (Window(3, 0), SameBlock(4, 2) & CAUSAL, Window(None, 2)))
    assert all(p.interval(i) is None for p in (First(2), LastOfBlocks(3, 1) & CAUSAL, Window(1, 0) | First(1)))


def test_backends() -> None:
    assert PATTERN_ATTENTION.names() == ["mask", "blocks", "flex"]
    q, k, v = given_heads(9, 9)
    with pytest.raises(BackendError, match="backend 'flex' runs on cuda only"):
        pattern_attention(q, k, v, CAUSAL, backend="flex")
    with pytest.raises(BackendError, match="no backend 'flux'"):
        pattern_attention(q, k, v, CAUSAL, backend="flux")
