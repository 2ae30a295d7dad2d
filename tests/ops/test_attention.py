"""Intervals, the tiles, and every portable backend against the definition with its full matrix of scores."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import tiled_attention as tiles
from mmlong.ops.attention import attention, attention_reference
from mmlong.ops.attention_backends import _fastest
from mmlong.ops.backends import BackendError
from mmlong.ops.kv_cache import counts_after, keep, positions_in
from mmlong.ops.tiled_attention import tiled_attention
from mmlong.ops.visible import Visible, visible_in


def draw(B: int, H: int, G: int, L: int, S: int, D: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v in different memory orders."""
    q = torch.randn(B, L, H, D, dtype=dtype).transpose(1, 2)
    k = torch.randn(B, G, S, D, dtype=dtype)
    v = torch.randn(B, S, G, D, dtype=dtype).transpose(1, 2)
    return [t.requires_grad_() for t in (q, k, v)]


def agree(got: Tensor, want: Tensor, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    dy = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def seen_by_hand(B: int, L: int, S: int, see: Any) -> Tensor:
    """Bool ``(B, 1, L, S)`` of a rule, pair by pair."""
    mask = torch.zeros(B, 1, L, S, dtype=torch.bool)
    for b, i, j in itertools.product(range(B), range(L), range(S)):
        mask[b, 0, i, j] = see(b, i, j)
    return mask


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (3, 0), (2, 4), (None, 2), (0, 0)])
@pytest.mark.parametrize("past", [0, 5])
def test_windows_are_aligned_to_the_last_key(left: int | None, right: int | None, past: int) -> None:
    L, S = 9, 9 + past

    def see(b: int, i: int, j: int) -> bool:
        own = past + i
        return (left is None or j >= own - left) and (right is None or j <= own + right)

    assert torch.equal(Visible(left, right).mask(L, S), seen_by_hand(1, L, S, see))


layouts = st.tuples(
    st.integers(1, 9), st.integers(0, 4), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 10**6)
)


@settings(max_examples=60, deadline=None)
@given(layouts, st.sampled_from([None, 1, 3]))
def test_intervals_of_a_layout(case: tuple[int, int, bool, bool, bool, int], window: int | None) -> None:
    """Padding, documents and a past, against a rule that looks at one pair at a time."""
    L, past, causal, padded, packed, seed = case
    past = past if causal else 0
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, L + 1, (3,), generator=generator) if padded else None
    resets = torch.rand(3, L, generator=generator) < 0.3 if packed else None
    counts = torch.randint(0, past + 1, (3,), generator=generator) if past else None
    layout = Layout(lengths=lengths, resets=resets)
    found = visible_in(layout, L, causal=causal, window=window, past=past, counts=counts)

    def document(b: int, i: int) -> int:
        return 0 if resets is None else int(resets[b, : i + 1].sum())

    def see(b: int, i: int, j: int) -> bool:
        own = past + i
        if window is not None and abs(j - own) > window:
            return False
        if j < past:
            return document(b, i) == 0 and (counts is None or j >= past - int(counts[b]))
        if document(b, j - past) != document(b, i):
            return False
        return j <= own if causal else lengths is None or j - past < int(lengths[b])

    mask, truth = found.mask(L, past + L).expand(3, -1, -1, -1), seen_by_hand(3, L, past + L, see)
    assert bool(mask.any(-1).all()), "a query sees nothing"
    for b in range(3):
        n = L if lengths is None else int(lengths[b])
        assert torch.equal(mask[b, :, :n], truth[b, :, :n])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 10**6))
def test_cache_holds_the_newest_of_the_last_document(pieces: list[int], slots: int, seed: int) -> None:
    """Pieces with padding and resets through ``keep`` and ``counts_after``, against lists of Python."""
    generator = torch.Generator().manual_seed(seed)
    truth: list[list[float]] = [[], [], []]
    cache, counts, number = torch.zeros(3, 1, slots, 1), torch.zeros(3, dtype=torch.long), 1.0
    for L in pieces:
        lengths = torch.randint(0, L + 1, (3,), generator=generator)
        resets = torch.rand(3, L, generator=generator) < 0.3
        layout = Layout(lengths=lengths, resets=resets)
        piece = torch.arange(number, number + 3 * L).view(3, 1, L, 1)
        positions = positions_in(layout, L, counts, torch.device("cpu"))
        number += 3 * L
        counts = counts_after(layout, L, counts)
        cache = keep(torch.cat([cache, piece], 2), slots, layout, L, counts)
        for b in range(3):
            for i in range(int(lengths[b])):
                if resets[b, i]:
                    truth[b] = []
                assert int(positions[b, i]) == len(truth[b])
                truth[b].append(float(piece[b, 0, i, 0]))
    assert counts.tolist() == [len(t) for t in truth]
    for b in range(3):
        newest = truth[b][-slots:]
        assert cache[b].flatten().tolist() == [0.0] * (slots - len(newest)) + newest


INTERVALS = {
    "full": lambda B, L, S: Visible(),
    "causal": lambda B, L, S: Visible(None, 0),
    "window": lambda B, L, S: Visible(10, 5),
    "left": lambda B, L, S: Visible(7, 0),
    "starts": lambda B, L, S: Visible(None, 0, torch.randint(0, S - L + 1, (B, L))),
    "documents": lambda B, L, S: Visible(
        5, 5, S - L + (torch.arange(L) // 9 * 9)[None], (S - L + torch.arange(L) // 9 * 9 + 9)[None].expand(B, L)
    ),
}


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 4, 2, 63, 63), (2, 4, 1, 257, 300)], ids=str)
@pytest.mark.parametrize("what", list(INTERVALS))
@pytest.mark.parametrize("sizes", [(1 << 19, 2048), (1 << 12, 37), (1 << 14, 64)], ids=["large", "merged", "rows"])
def test_tiles(shape: tuple[int, ...], what: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", sizes[0])
    monkeypatch.setattr(tiles, "MAX_KEYS", sizes[1])
    torch.manual_seed(0)
    B, H, G, L, S = shape
    visible = INTERVALS[what](B, L, S)
    leaves = draw(B, H, G, L, S)
    got = tiled_attention(*leaves, *visible.intervals(L, S), 1 / math.sqrt(8))
    agree(got, attention_reference(*leaves, visible), leaves)


@pytest.mark.parametrize("sizes", [(1 << 19, 2048), (1 << 12, 37)], ids=["large", "merged"])
def test_parts_of_the_keys_merge(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part by itself, forward and backward; some queries see no key of a part."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", sizes[0])
    monkeypatch.setattr(tiles, "MAX_KEYS", sizes[1])
    torch.manual_seed(0)
    B, H, G, L, S = 3, 4, 2, 63, 257
    leaves = draw(B, H, G, L, S)
    visible = Visible(None, 0, torch.randint(0, S - L + 1, (B, L)))
    first, stop = visible.intervals(L, S)
    want = attention_reference(*leaves, visible)
    dy = torch.randn_like(want)
    gradients = torch.autograd.grad(want, leaves, dy)
    q, k, v = (t.detach() for t in leaves)
    y, log = torch.zeros_like(q), torch.full((B, H, L, 1), tiles.HIDDEN, dtype=q.dtype)
    parts = [(0, 5), (5, 150), (150, S)]
    within = [tiles.Pairs(first.clamp(a, b) - a, stop.clamp(a, b) - a, 1 / math.sqrt(8)) for a, b in parts]
    for (a, b), pairs in zip(parts, within, strict=True):
        part, sums = tiles.attend(q, k[:, :, a:b], v[:, :, a:b], pairs, partial=True)
        assert sums is not None
        y, log = tiles.merge(y, log, part, sums[..., None])
    torch.testing.assert_close(y, want)
    dq = torch.zeros_like(q)
    for (a, b), pairs in zip(parts, within, strict=True):
        found = tiles.attend_backward(dy, q, k[:, :, a:b], v[:, :, a:b], y, log[..., 0], pairs, partial=True)
        dq += found[0]
        torch.testing.assert_close(found[1], gradients[1][:, :, a:b])
        torch.testing.assert_close(found[2], gradients[2][:, :, a:b])
    torch.testing.assert_close(dq, gradients[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_tiles_gradcheck(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(tiles, "MAX_KEYS", 4)
    leaves = draw(2, 2, 1, 7, 9, 3)
    first, stop = Visible(None, 0, torch.randint(0, 3, (2, 7))).intervals(7, 9)

    def run(*t: Tensor) -> Tensor:
        torch.manual_seed(5)
        return tiled_attention(*t, first, stop, 0.7, dropout)

    assert torch.autograd.gradcheck(run, leaves)


def test_tiles_drop_weights_without_bias() -> None:
    torch.manual_seed(0)
    leaves = [t.detach() for t in draw(1, 1, 1, 64, 64)]
    first, stop = Visible().intervals(64, 64)
    want = tiled_attention(*leaves, first, stop, 0.3)
    runs = torch.stack([tiled_attention(*leaves, first, stop, 0.3, 0.25) for _ in range(400)])
    assert float(runs.std(0).mean()) > 0.01
    error = (runs.mean(0) - want).abs() / (runs.std(0) / 20)
    assert float(error.mean()) < 1.0  # standard errors; 0.8 is expected of a mean that is right


def test_tiles_refuse_a_query_that_sees_nothing() -> None:
    leaves = draw(1, 1, 1, 4, 4)
    first, stop = torch.tensor([[0, 1, 3, 3]]), torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="sees no key"):
        tiled_attention(*leaves, first, stop, 1.0)


def test_tiles_with_hidden_keys_of_any_size() -> None:
    q, k, v = (t.detach() for t in draw(1, 1, 1, 40, 40, dtype=torch.float32))
    k[:, :, 20:], v[:, :, 20:] = 1e4, 1e30
    first, stop = Visible(None, 0).intervals(40, 40)
    got = tiled_attention(q, k, v, first, stop, 1.0)[:, :, :20]
    torch.testing.assert_close(
        got, tiled_attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], first[:, :20], stop[:, :20], 1.0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_in_half_precision_sum_in_float32(dtype: torch.dtype) -> None:
    leaves = draw(1, 2, 1, 257, 257, dtype=dtype)
    first, stop = Visible(None, 0).intervals(257, 257)
    got = tiled_attention(*leaves, first, stop, 0.35)
    want = tiled_attention(*(t.float() for t in leaves), first, stop, 0.35)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0)


KINDS = {
    "full": (257, 257, Visible()),
    "causal": (257, 257, Visible(None, 0)),
    "past": (63, 257, Visible(None, 0)),
    "one token": (1, 257, Visible(None, 0)),
    "window": (257, 257, Visible(20, 20)),
    "left window with a past": (257, 280, Visible(30, 0)),
    "ragged": (63, 63, Visible(None, 0, torch.tensor([[3], [0], [2]]).clamp_max(0).expand(3, 63))),
    "ragged past": (63, 70, Visible(None, 0, torch.tensor([[3], [0], [7]]).expand(3, 63))),
    "ragged window": (257, 280, Visible(30, 0, torch.tensor([[13], [0], [23]]).expand(3, 257))),
}


@pytest.mark.parametrize("what", list(KINDS))
@pytest.mark.parametrize("backend", ["auto", "sdpa", "tiled", "blocks"])
def test_backends(what: str, backend: str) -> None:
    L, S, visible = KINDS[what]
    if backend == "blocks" and "window" not in what:
        with pytest.raises(BackendError, match="backend 'blocks' has no mask of the kind"):
            attention(*draw(3, 4, 2, L, S), visible, backend=backend)
        return
    torch.manual_seed(0)
    leaves = draw(3, 4, 2, L, S)
    agree(attention(*leaves, visible, backend=backend), attention_reference(*leaves, visible), leaves)


def test_what_auto_takes() -> None:
    causal, window = Visible(None, 0), Visible(512, 512)
    assert _fastest("causal", "cpu", 1, 1 << 16, 1 << 16, causal)[0] == "sdpa"
    assert _fastest("window", "cpu", 1, 1 << 16, 1 << 16, window)[0] == "tiled"
    assert _fastest("window", "cuda", 1, 1 << 16, 1 << 16, window)[0] == "blocks"
    assert _fastest("past", "cpu", 1, 1 << 14, 1 << 16, causal)[0] == "tiled"
    assert _fastest("past", "cuda", 1, 1 << 14, 1 << 16, causal)[0] == "sdpa"
    assert _fastest("ragged", "cuda", 1, 1 << 16, 1 << 16, Visible(first=torch.zeros(1, 1 << 16))) == ("flex", "tiled")


def test_a_long_past_makes_no_square_mask() -> None:
    """Peak memory of a piece after a past, padded, counted: far below one byte for each pair."""
    from mmlong.estimate.meter import Meter

    L = 4096
    q, k, v = draw(1, 1, 1, L, 2 * L, 4, torch.float32)
    visible = Visible(None, 0, torch.full((1, L), 5))
    with Meter() as meter:
        attention(q, k, v, visible).sum().backward()
    assert meter.peak < L * 2 * L / 2


def test_shapes_are_checked() -> None:
    q, k, v = draw(1, 3, 2, 5, 5)
    with pytest.raises(ValueError, match="G dividing H"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="S >= L"):
        attention(*draw(1, 2, 2, 5, 4))
    with pytest.raises(ValueError, match="left >= 0"):
        Visible(left=-1)
    with pytest.raises(BackendError, match="attention has no backend 'flash'"):
        attention(*draw(1, 2, 2, 5, 5), backend="flash")


def test_autocast_lowers_every_backend() -> None:
    visible = Visible(20, 0)
    q, k, v = draw(1, 2, 2, 257, 257, dtype=torch.float32)
    want = attention_reference(q, k, v, visible)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("sdpa", "tiled", "blocks"):
            got = attention(q, k, v, visible, backend=backend)
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2)
