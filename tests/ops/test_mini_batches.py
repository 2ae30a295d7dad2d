"""Frames of mini-batches against lists of tokens, made one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout, document_index
from mmlong.ops.mini_batches import Frames, lay_out, whole_frames

Cells = list[list[dict[int, int]]]
"""Of each row, its frames: place -> token."""


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Tensor, Layout | None, int]:
    """``(place, layout, size)`` of a piece of some rows that began anywhere."""
    B, L, size = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    lengths = resets = None
    if draw(st.booleans()):
        lengths = torch.tensor(draw(st.lists(st.integers(0, L), min_size=B, max_size=B)))
    if draw(st.booleans()):
        flags = st.lists(st.sampled_from([False, False, False, True]), min_size=L, max_size=L)
        resets = torch.tensor(draw(st.lists(flags, min_size=B, max_size=B)))
    layout = None if lengths is None and resets is None else Layout(lengths=lengths, resets=resets)
    passed = torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=B, max_size=B)))
    return document_index(passed, L, layout) % size, layout, size


def listed(place: Tensor, layout: Layout | None) -> tuple[Cells, list[list[bool]]]:
    """Frames of each row, and whether a document begins in each."""
    cells: Cells = []
    fresh: list[list[bool]] = []
    for b, row in enumerate(place.tolist()):
        end = len(row) if layout is None or layout.lengths is None else int(layout.lengths[b])
        cells.append([{}])
        fresh.append([False])
        for t in range(end):
            if row[t] == 0 and t:
                cells[b].append({})
                fresh[b].append(False)
            cells[b][-1][row[t]] = t
            fresh[b][-1] |= layout is not None and layout.resets is not None and bool(layout.resets[b, t])
    return cells, fresh


def check(frames: Frames, place: Tensor, layout: Layout | None, size: int) -> None:
    B, L = place.shape
    cells, fresh = listed(place, layout)
    tokens = torch.arange(1.0, B * L * 2 * 3 + 1).view(B, L, 2, 3)
    cut = frames.cut(tokens)
    assert cut.shape == (frames.n, 2 * B, frames.slots, 3)
    assert frames.n >= max(len(row) for row in cells)
    there = torch.ones(B, frames.n, frames.slots, dtype=torch.bool) if frames.there is None else frames.there
    for b in range(B):
        for n in range(frames.n):
            held = cells[b][n] if n < len(cells[b]) else {}
            found = {}
            for slot in range(frames.slots):
                each = cut[n, 2 * b : 2 * b + 2, slot]
                if there[b, n, slot]:
                    at = int(frames.place.expand(B, -1, -1)[b, n, slot])
                    found[at] = (int(each[0, 0]) - 1) // 6 - b * L
                    assert torch.equal(each, tokens[b, found[at]])
                elif frames.slots > 1:
                    assert not each.any()
            assert found == held
            assert bool(frames.closes is None or frames.closes[b, n]) == (size - 1 in held)
            begins = n < len(fresh[b]) and fresh[b][n]
            assert bool(frames.fresh is not None and frames.fresh[b, n]) == begins
    valid = None if layout is None else layout.valid(L)
    back = frames.join(cut, 2)
    want = tokens if valid is None else torch.where(valid[..., None, None], tokens, 0)
    got = back if valid is None else torch.where(valid[..., None, None], back, 0)
    assert torch.equal(got, want)


@settings(max_examples=200, deadline=None)
@given(pieces())
def test_frames_are_mini_batches(piece: tuple[Tensor, Layout | None, int]) -> None:
    place, layout, size = piece
    check(lay_out(place, layout, size), place, layout, size)


@settings(max_examples=50, deadline=None)
@given(pieces())
def test_as_many_frames_as_there_can_be_where_places_are_not_known(
    piece: tuple[Tensor, Layout | None, int],
) -> None:
    place, layout, size = piece
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        frames = lay_out(place, layout, size)
    check(frames, place, layout, size)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (3, 4), (5, 1), (1, 7)])
def test_whole_frames(n: int, size: int) -> None:
    place = torch.arange(size).repeat(2, n)
    check(whole_frames(n, size, place.device), place, None, size)


def test_flags_beside_heads() -> None:
    frames = whole_frames(3, 2, torch.device("cpu"))
    flags = torch.tensor([[True, False, False], [False, True, True]])
    each = frames.each(flags, 2)
    assert each is not None
    assert each[..., 0, 0].tolist() == [
        [True, True, False, False],
        [False, False, True, True],
        [False, False, True, True],
    ]
    assert frames.each(None, 2) is None
