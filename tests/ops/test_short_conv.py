"""The short convolution against its definition, torch's own, and itself in pieces."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.layout import Layout
from mmlong.ops import short_conv as module
from mmlong.ops.short_conv import short_conv, short_conv_reference


def make(B: int, L: int, D: int, K: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(B * 1000 + L)
    shapes = [(B, L, D), (D, K), (D,), (B, K - 1, D)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_(grad) for s in shapes]


@pytest.fixture(params=[1 << 17, 1], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("B", "L", "D", "K"), [(1, 257, 6, 4), (3, 63, 5, 3), (3, 2, 7, 4), (2, 1, 4, 4), (2, 130, 600, 2), (2, 9, 3, 1)]
)
def test_value_and_gradients(B: int, L: int, D: int, K: int, activation: module.Activation) -> None:
    x, w, b, tail = make(B, L, D, K)
    y, after = short_conv(x, w, b, tail, activation=activation)
    expected, expected_after = short_conv_reference(x, w, b, tail, activation)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, expected_after)
    dy, dafter = torch.randn_like(y), torch.randn_like(after)
    leaves = [x, w, b] + ([tail] if K > 1 else [])
    got = torch.autograd.grad([y, after], leaves, [dy, dafter])
    wanted = torch.autograd.grad([expected, expected_after], leaves, [dy, dafter])
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("blocks")
def test_against_torch_conv1d() -> None:
    x, w, b, _ = make(3, 257, 8, 4)
    y, _ = short_conv(x, w, b)
    expected = F.conv1d(x.transpose(1, 2), w[:, None], b, padding=3, groups=8)[..., :257].transpose(1, 2)
    torch.testing.assert_close(y, expected)


def test_rows_apart_and_gradient_of_one_output_only() -> None:
    x, w, b, tail = make(2, 40, 12, 4)
    wide = torch.cat([x, x], dim=2)[:, :, :12]  # a row stride that is not D
    y, after = short_conv(wide, w, b, tail, activation="silu")
    expected, expected_after = short_conv_reference(x, w, b, tail, "silu")
    torch.testing.assert_close(y, expected)
    for mine, theirs in [(y, expected), (after, expected_after)]:
        got = torch.autograd.grad(mine.sin().sum(), [x, tail], retain_graph=True)
        wanted = torch.autograd.grad(theirs.sin().sum(), [x, tail], retain_graph=True)
        for m, t in zip(got, wanted, strict=True):
            torch.testing.assert_close(m, t)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pieces_lengths_and_resets(data: st.DataObject) -> None:
    B, L, D, K = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), 3, data.draw(st.integers(1, 5))
    x, w, b, tail = make(B, L, D, K, grad=False)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, L), min_size=B, max_size=B)))
    flags = data.draw(st.lists(st.booleans(), min_size=B * L, max_size=B * L))
    resets = torch.tensor(flags).view(B, L)
    layout = Layout(lengths=lengths, resets=resets)
    y, after = short_conv(x, w, b, tail, layout, "silu")
    # Each row, document by document, with the definition alone.
    for r in range(B):
        n = int(lengths[r])
        cuts = [0, *[t for t in range(n) if resets[r, t]], n]
        past: torch.Tensor | None = tail[r : r + 1]
        for index, (i, j) in enumerate(itertools.pairwise(cuts)):
            if index:
                past = None
            if i < j:
                piece, past = short_conv_reference(x[r : r + 1, i:j], w, b, past, "silu")
                torch.testing.assert_close(y[r : r + 1, i:j], piece)
        if past is None:  # no position after the last cut can only be an empty row
            raise AssertionError("a document without positions")
        torch.testing.assert_close(after[r : r + 1], past)
    cut = data.draw(st.integers(0, L))
    if 0 < cut < L:
        first, middle = short_conv(x[:, :cut], w, b, tail, layout.slice(0, cut), "silu")
        second, last = short_conv(x[:, cut:], w, b, middle, layout.slice(cut, L), "silu")
        valid = layout.valid(L)
        assert valid is not None
        torch.testing.assert_close(torch.cat([first, second], 1)[valid], y[valid])
        torch.testing.assert_close(last, after)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("often", [0.02, 0.5])
@pytest.mark.parametrize(("K", "G"), [(4, 6), (7, 2), (40, 6), (70, 1)])
def test_documents_of_a_row(K: int, G: int, often: float) -> None:
    """Far apart they are moved apart, close together each tap is masked; both with gradients, the tail's too."""
    B, L, D = 2, 130, 6
    x, _, b, tail = make(B, L, D, K)
    w = torch.randn(G, K, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(B, L, generator=torch.Generator().manual_seed(K)) < often
    resets[0, 0] = False
    y, after = short_conv(x, w, b, tail, Layout(resets=resets), "silu")
    rows, ends = [], []
    for r in range(B):
        parts, past = [], tail[r : r + 1]
        for start, stop in itertools.pairwise([0, *[t for t in range(1, L) if resets[r, t]], L]):
            if resets[r, start]:
                past = torch.zeros_like(past)
            part, past = short_conv_reference(x[r : r + 1, start:stop], w, b, past, "silu")
            parts.append(part)
        rows.append(torch.cat(parts, 1))
        ends.append(past)
    want, want_after = torch.cat(rows), torch.cat(ends)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(after, want_after)
    leaves, given = [x, w, b, tail], [torch.randn_like(y), torch.randn_like(after)]
    got = torch.autograd.grad([y, after], leaves, given)
    for mine, theirs in zip(got, torch.autograd.grad([want, want_after], leaves, given), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("K", [4, 64])
@pytest.mark.parametrize("documents", [8, 128, 4096])
def test_documents_keep_little_for_the_backward(K: int, documents: int) -> None:
    """The inputs, or twice as much with zeros between them, and matrices of the taps; a masked copy for each tap would be K times the inputs."""
    x, w, _, _ = make(1, 8192, 32, K, torch.float32)
    resets = torch.zeros(1, 8192, dtype=torch.bool)
    resets[0, :: 8192 // documents] = True
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        short_conv(x, w, layout=Layout(resets=resets))
    assert sum(kept.values()) < 2.6 * x.untyped_storage().nbytes()


def test_one_token_at_a_time_without_grad() -> None:
    x, w, b, tail = make(2, 9, 4, 4, grad=False)
    expected, expected_after = short_conv_reference(x, w, b, tail, "silu")
    got = []
    with torch.no_grad():
        for t in range(9):
            y, tail = short_conv(x[:, t : t + 1], w, b, tail, activation="silu")
            got.append(y)
    torch.testing.assert_close(torch.cat(got, 1), expected)
    torch.testing.assert_close(tail, expected_after)


def test_bfloat16_accumulates_in_float32() -> None:
    x, w, b, tail = make(2, 65, 8, 4, torch.float32, grad=False)
    half = x.bfloat16().requires_grad_()
    y, after = short_conv(half, w, b, tail, activation="silu")
    expected, _ = short_conv_reference(half.detach().float(), w, b, tail, "silu")
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(y.float().sum(), half)
    assert grad.dtype == torch.bfloat16
    assert torch.isfinite(grad).all()


def test_traced_form_is_the_same() -> None:
    x, w, b, tail = make(2, 33, 4, 4)
    y, after = module._plain(x, w, b, tail, "silu")
    expected, expected_after = short_conv_reference(x, w, b, tail, "silu")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, expected_after)


def test_shapes_that_do_not_fit() -> None:
    x, w, b, tail = make(2, 9, 4, 4)
    with pytest.raises(ValueError, match="D = 4 channels"):
        short_conv(x, w[:3], b)
    with pytest.raises(ValueError, match="tail is"):
        short_conv(x, w, b, tail[:, :2])
    with pytest.raises(ValueError, match="unknown activation"):
        short_conv(x, w, b, activation="relu")  # type: ignore[arg-type]
