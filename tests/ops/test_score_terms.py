"""Terms in the scores: the definition pair by pair, the tiles and every portable backend against it, and sums of gates over long sequences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.ops import tiled_attention as tiles
from mmlong.ops.attention import attention
from mmlong.ops.attention_backends import _fastest_with_terms
from mmlong.ops.backends import BackendError
from mmlong.ops.dense_attention import dense_attention
from mmlong.ops.score_terms import Terms, whole_decay
from mmlong.ops.tiled_attention import tiled_attention, tiled_attention_part, with_sink
from mmlong.ops.visible import Visible

D, R = 6, 5


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def made(what: str, B: int, H: int, L: int, S: int, visible: Visible) -> tuple[Terms, list[Tensor]]:
    """Terms of some kinds, and the leaves they are made of."""
    highest = S - 1 if visible.left is None else min(visible.left, S - 1)
    lowest = 1 - L if visible.right is None else -min(visible.right, L - 1)
    N = highest - lowest + 1
    given: dict[str, Any] = {"lowest": lowest}
    leaves: dict[str, Tensor] = {}
    if "decay" in what:
        leaves["g"] = draw(B, H, S)
        given["decay"] = whole_decay(torch.nn.functional.logsigmoid(leaves["g"]))
    if "bias" in what:
        leaves["bias"] = given["bias"] = draw(H, N)
    if "relative" in what:
        leaves["reads"], leaves["rows"] = draw(B, H, L, R), draw(1 if "shared" in what else H, N, R)
        given.update(reads=leaves["reads"], rows=leaves["rows"])
    if "fade" in what:
        given["fade"] = -0.1 * torch.rand(D, dtype=torch.float64)
    if "softcap" in what:
        given["softcap"] = 1.5
    if "sink" in what:
        leaves["sink"] = given["sink"] = draw(H)
    return Terms(**given), list(leaves.values())


def pair_by_pair(q: Tensor, k: Tensor, v: Tensor, visible: Visible, terms: Terms) -> Tensor:
    """The formula, one score at a time."""
    (B, H, L, _), (_, G, S, E) = q.shape, v.shape
    first, stop = visible.intervals(L, S)
    y = torch.zeros(B, H, L, E, dtype=q.dtype)
    rows: list[Tensor] = []
    for b, h, i in itertools.product(range(B), range(H), range(L)):
        own, g = S - L + i, h // (H // G)
        seen = range(int(first[b if len(first) > 1 else 0, i]), int(stop[b if len(stop) > 1 else 0, i]))
        scores = []
        for j in seen:
            d = own - j
            key = k[b, g, j] if terms.fade is None else k[b, g, j] * (terms.fade * d).exp()
            s = (q[b, h, i] * key).sum() / math.sqrt(q.shape[-1])
            if terms.softcap is not None:
                s = terms.softcap * torch.tanh(s / terms.softcap)
            if terms.rows is not None and terms.reads is not None:
                row = terms.rows[h if len(terms.rows) > 1 else 0, d - terms.lowest]
                s = s + (terms.reads[b, h, i] * row).sum() / math.sqrt(q.shape[-1])
            if terms.bias is not None:
                s = s + terms.bias[h, d - terms.lowest]
            if terms.decay is not None:
                s = s + terms.decay[b, h, own] - terms.decay[b, h, j]
            scores.append(s)
        e = torch.stack(scores).exp()
        total = e.sum() + (0 if terms.sink is None else terms.sink[h].exp())
        rows.append((e[:, None] * v[b, g, seen.start : seen.stop]).sum(0) / total)
    return y + torch.stack(rows).view(B, H, L, E)


KINDS = ["decay", "bias", "relative", "relative shared", "fade", "softcap", "sink"]
MIXED = ["bias relative softcap sink", "decay bias relative shared fade softcap sink"]
VISIBLE = {
    "causal": lambda B, L, S: Visible(None, 0),
    "window": lambda B, L, S: Visible(7, 0),
    "documents": lambda B, L, S: Visible(None, 0, torch.randint(0, S - L + 1, (B, L))),
    "both sides": lambda B, L, S: Visible(),
    "window to both sides": lambda B, L, S: Visible(5, 3),
}


@pytest.mark.parametrize("what", [*KINDS, *MIXED])
@pytest.mark.parametrize("seen", list(VISIBLE))
def test_dense_against_the_formula_pair_by_pair(what: str, seen: str) -> None:
    torch.manual_seed(0)
    B, H, G, L, S = 2, 2, 1, 7, 12
    visible = VISIBLE[seen](B, L, S)
    if "fade" in what and visible.right != 0:
        pytest.skip("a fade is for causal attention")
    q, k, v = draw(B, H, L, D), draw(B, G, S, D), draw(B, G, S, 4)
    terms, _ = made(what, B, H, L, S, visible)
    got, want = dense_attention(q, k, v, visible, terms), pair_by_pair(q, k, v, visible, terms)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("what", [*KINDS, *MIXED])
@pytest.mark.parametrize("seen", list(VISIBLE))
@pytest.mark.parametrize("sizes", [(1 << 19, 2048), (1 << 12, 37)], ids=["large", "merged"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 1, 40), (3, 4, 2, 63, 63), (2, 2, 1, 130, 150)], ids=str)
def test_tiles(what: str, seen: str, sizes: tuple[int, int], shape: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", sizes[0])
    monkeypatch.setattr(tiles, "MAX_KEYS", sizes[1])
    torch.manual_seed(0)
    B, H, G, L, S = shape
    visible = VISIBLE[seen](B, L, S)
    if "fade" in what and visible.right != 0:
        pytest.skip("a fade is for causal attention")
    q, k, v = draw(B, L, H, D).transpose(1, 2), draw(B, G, S, D), draw(B, G, S, 4)
    terms, leaves = made(what, B, H, L, S, visible)
    got = tiled_attention(q, k, v, *visible.intervals(L, S), 1 / math.sqrt(D), terms=terms)
    want = dense_attention(q, k, v, visible, terms)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    dy, leaves = torch.randn_like(want), [q, k, v, *leaves]
    found, true = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (got, want))
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_tiles_gradcheck(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(tiles, "MAX_KEYS", 4)
    B, H, L, S = 2, 2, 7, 9
    visible = Visible(None, 0, torch.randint(0, 3, (B, L)))
    shapes = [(B, H, L, 3), (B, 1, S, 3), (B, 1, S, 2), (B, H, S), (H, S), (B, H, L, 2), (H, S, 2), (H,)]
    first, stop = visible.intervals(L, S)

    def run(*t: Tensor) -> Tensor:
        torch.manual_seed(5)
        q, k, v, decay, bias, reads, rows, sink = t
        terms = Terms(decay, bias, reads, rows, softcap=2.0, sink=sink)
        return tiled_attention(q, k, v, first, stop, 0.7, dropout, terms)

    assert torch.autograd.gradcheck(run, [draw(*s) for s in shapes])


def test_parts_merge_with_terms_and_a_sink() -> None:
    """Keys in two calls, the second with a table and an own key that lie elsewhere; gradients of log sums too."""
    torch.manual_seed(0)
    B, H, L = 2, 2, 40
    visible = Visible(None, 0)
    q, k, v = draw(B, H, L, D), draw(B, H, L, D), draw(B, H, L, D)
    terms, leaves = made("bias relative sink", B, H, L, L, visible)
    want = dense_attention(q, k, v, visible, terms)
    parts = []
    for a, b in ((0, 17), (17, L)):
        first, stop = (t.clamp(a, b) - a for t in visible.intervals(L, L))
        pairs = tiles.Pairs(first, stop, 1 / math.sqrt(D), terms=terms, own=-a)
        bare, tensors = tiles._apart(pairs)
        parts.append(tiles._TiledPart.apply(q, k[:, :, a:b], v[:, :, a:b], bare, *tensors))
    total = torch.stack([log for _, log in parts]).logsumexp(0)
    y = sum((y * (log - total).exp()[..., None] for y, log in parts), torch.zeros(()))
    assert terms.sink is not None
    got = y * with_sink(total, terms.sink)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    dy, leaves = torch.randn_like(want), [q, k, v, *leaves]
    found, true = (torch.autograd.grad(t, leaves, dy, retain_graph=True) for t in (got, want))
    for d, dtrue in zip(found, true, strict=True):
        torch.testing.assert_close(d, dtrue, rtol=1e-9, atol=1e-9)


def test_a_sum_of_gates_over_65536_tokens_loses_nothing() -> None:
    """In float32, the last queries after gates that have summed to millions, against the same in float64 over the last keys alone."""
    torch.manual_seed(0)
    S, L = 65_536, 64
    q, k, v = (torch.randn(1, 2, n, 8) for n in (L, S, S))
    g = -torch.rand(1, 2, S) * 100
    g[:, :, -1000:] = -torch.rand(1, 2, 1000) * 0.01
    terms = Terms(decay=whole_decay(g))
    assert float(g.sum(-1).min()) < -1e6
    first, stop = Visible(None, 0).intervals(L, S)
    got = tiled_attention(q, k, v, first, stop, 1.0, terms=terms)
    n = 1100
    near = Terms(decay=whole_decay(g[..., -n:].double()))
    last = [t[:, :, -n:].double() for t in (8**0.5 * q, k, v)]
    want = dense_attention(last[0], last[1], last[2], Visible(None, 0), near)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
@pytest.mark.parametrize("L", [30, 257])
def test_backends(backend: str, L: int) -> None:
    torch.manual_seed(0)
    visible = Visible(None, 0)
    q, k, v = draw(2, 4, L, D), draw(2, 2, L, D), draw(2, 2, L, D)
    terms, _ = made("decay bias relative softcap sink", 2, 4, L, L, visible)
    got = attention(q, k, v, visible, terms=terms, scale=0.3, backend=backend)
    factor = 0.3 * math.sqrt(D)
    assert terms.reads is not None
    moved = dataclasses.replace(terms, reads=terms.reads * factor)
    torch.testing.assert_close(got, dense_attention(factor * q, k, v, visible, moved), rtol=1e-9, atol=1e-9)


def test_a_backend_without_terms_says_so() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    with pytest.raises(BackendError, match="backend 'sdpa' cannot do sink, softcap"):
        attention(q, k, v, terms=Terms(softcap=1.0, sink=torch.zeros(2)), backend="sdpa")
    assert torch.equal(attention(q, k, v, terms=Terms(), backend="sdpa"), attention(q, k, v, backend="sdpa"))


def test_what_auto_takes() -> None:
    assert _fastest_with_terms("cpu", 1 << 12)[0] == "dense"
    assert _fastest_with_terms("cpu", 1 << 24)[0] == "tiled"


def test_wide_values_make_no_matrix_of_scores() -> None:
    """Torch's kernel for CPUs takes values as wide as keys only."""
    from mmlong.estimate.meter import Meter

    L = 2048
    q, k, v = draw(1, 1, L, 4, dtype=torch.float32), draw(1, 1, L, 4, dtype=torch.float32), torch.randn(1, 1, L, 9)
    with Meter() as meter:
        attention(q, k, v, Visible(None, 0)).sum().backward()
    assert meter.peak < 4 * L * L / 3


@pytest.mark.parametrize("what", ["bias", "relative", "relative shared"])
def test_memory_of_tables_is_linear(what: str) -> None:
    from mmlong.estimate.meter import Meter

    peaks = []
    for L in (4096, 8192):
        visible = Visible(None, 0)
        q, k, v = (draw(1, 1, L, D).detach().float().requires_grad_() for _ in range(3))
        terms, _ = made(what, 1, 1, L, L, visible)
        with Meter() as meter:
            attention(q, k, v, visible, terms=terms).sum().backward()
        peaks.append(meter.peak)
    assert peaks[1] < 2.1 * peaks[0]


def test_shapes_are_checked() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    for terms, message in (
        (Terms(sink=torch.zeros(3)), r"sink must be \(2,\), got \(3,\)"),
        (Terms(decay=torch.zeros(1, 2, 8)), r"decay must be \(1, 2, 9\)"),
        (Terms(rows=torch.zeros(2, 9, 8)), "both reads and rows"),
        (Terms(rows=torch.zeros(3, 9, 8), reads=q), r"rows must be \(2 or 1, 9, R\)"),
        (Terms(rows=torch.zeros(2, 9, 8), reads=q[:, :, 1:]), r"reads must be \(1, 2, 9, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, terms=terms)


def test_a_part_leaves_the_sink_to_the_merge() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    first, stop = Visible(None, 0).intervals(9, 9)
    sink = torch.randn(2, dtype=torch.float64)
    with_it = tiled_attention_part(q, k, v, first, stop, 0.5, terms=Terms(sink=sink))
    without = tiled_attention_part(q, k, v, first, stop, 0.5)
    for a, b in zip(with_it, without, strict=True):
        torch.testing.assert_close(a, b)
