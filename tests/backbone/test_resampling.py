"""Attention resampling of levels: the definition token by token, another implementation, the whole contract, and rows of unlike documents."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.hierarchy import Level
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.ops.rotary import rotary_reference
from mmlong.testing import check_mixer

WAYS = {"down": "attention", "up": "attention"}


def level(k: int = 3, ffn: str = "swiglu", direction: str = "causal", **options: Any) -> Any:
    torch.manual_seed(0)
    part = {"pool": k, "dim": 12, "heads": 2, "parts": ["gru"], **WAYS, **options}
    made = Backbone(BackboneConfig(dim=8, parts=[part], ffn=ffn, direction=direction)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.parts()[0]


def attend(m: Any, asks: Tensor, read: Tensor, place: int, places: list[int]) -> Tensor:
    """One vector's attention to others, from the equations; ``(D)`` and ``(n, other)``."""
    H, d = m.heads, m.head_dim
    q = rotary_reference(m.q_proj(m.norm(asks)).view(1, 1, H, d), torch.tensor([place]))[0, 0]
    k = rotary_reference(m.k_proj(m.norm_read(read)).view(1, -1, H, d), torch.tensor(places))[0]
    v = m.v_proj(m.norm_read(read)).view(-1, H, d)
    weights = (torch.einsum("hd,nhd->hn", q, k) / d**0.5).softmax(-1)
    y = asks + m.out_proj(torch.einsum("hn,nhd->hd", weights, v).flatten())
    return y + m.ffn(m.norm_ffn(y))


@pytest.mark.parametrize(("length", "lag", "reach"), [(17, 0, None), (16, 0, 2), (13, 1, None), (1, 0, None)])
def test_is_its_definition(length: int, lag: int, reach: int | None) -> None:
    k, one = 3, level(lag=lag, reach=reach)
    x = torch.randn(1, length, 8, dtype=torch.float64)
    shortened = []
    for start in range(0, length, k):
        at = [start - k + 1 - lag + n for n in range(k)]
        s = one.shorten(torch.cat([x[0, t] if t >= 0 else torch.zeros(8, dtype=torch.float64) for t in at]))
        there = [n for n, t in enumerate(at) if t >= 0]
        if there:
            s = attend(one.read_window, s, x[0, [at[n] for n in there]], k - 1, there)
        else:
            s = s + one.read_window.out_proj.bias
            s = s + one.read_window.ffn(one.read_window.norm_ffn(s))
        shortened.append(s)
    z = one.inner(torch.stack(shortened)[None])[0][0]
    rows = []
    for t in range(length):
        g = t // k
        u = x[0, t] + one.lengthen(z[g]).view(k, 8)[t % k]
        seen = list(range(0 if reach is None else max(0, g - reach + 1), g + 1))
        rows.append(attend(one.read_chunks, u, z[seen], t, [k * n for n in seen]))
    want = torch.stack(rows)[None]
    torch.testing.assert_close(one(x)[0], want)
    # The same where rows are told apart.
    torch.testing.assert_close(one(x, None, Layout(lengths=torch.tensor([length])))[0], want)


def test_two_sided_reads_chunks_on_both_sides() -> None:
    one = level(direction="both", reach=2)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    z = one.inner(one._shortened(*one._windows(x, x[:, :0], one._alike(x), torch.arange(20)[None], None)))[0][0]
    for t in (0, 8, 19):
        g = t // 3
        u = x[0, t] + one.lengthen(z[g]).view(3, 8)[t % 3]
        seen = list(range(max(0, g - 1), min(7, g + 2)))
        want = attend(one.read_chunks, u, z[seen], t, [3 * n for n in seen])
        torch.testing.assert_close(one(x)[0][0, t], want)


class Theirs(nn.Module):
    """A transformer of the other package as inner parts."""

    causal, streaming = True, False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, None]:
        assert layout is None
        return self.inner(x), None


def copied(mine: Any, theirs: Any) -> None:
    """Weights of a one-layer transformer of theirs, whose keys have no norm and no place."""
    (attention, ffn) = theirs.layers[0]
    k, v = attention.fn.to_kv.weight.chunk(2)
    pairs = [
        (mine.norm, attention.norm), (mine.norm_ffn, ffn.norm), (mine.q_proj, attention.fn.to_q),
        (mine.out_proj, attention.fn.to_out), (mine.ffn[0], ffn.fn[0]), (mine.ffn[2], ffn.fn[3]),
    ]  # fmt: skip
    for ours, other in pairs:
        ours.load_state_dict(other.state_dict())
    with torch.no_grad():
        mine.k_proj.weight.copy_(k)
        mine.v_proj.weight.copy_(v)
    mine.norm_read, mine.rope = nn.Identity(), False


@pytest.mark.parametrize(("way", "attention"), [("linear", False), ("naive", False), ("linear", True)])
def test_against_hourglass_transformer_pytorch(way: str, attention: bool) -> None:
    """Its level round its own transformer: resampling both ways, and the shift that keeps it causal."""
    package = pytest.importorskip("hourglass_transformer_pytorch.hourglass_transformer_pytorch")
    torch.manual_seed(0)
    # What it has before a document it counts as tokens where it takes means or attends; ours does not. So there all chunks but the first are compared, with nothing between them.
    whole = way == "linear" and not attention
    theirs = package.HourglassTransformer(
        12, depth=(0, 2 if whole else 0, 0), shorten_factor=4, attn_resampling=attention, updown_sample_type=way,
        heads=3, dim_head=4, causal=True,
    ).double()  # fmt: skip
    down, up = ("linear", "linear") if way == "linear" else ("mean", "repeat")
    if attention:
        down = up = "attention"
    mine: Any = Level(Theirs(theirs.valley_transformer), 4, 12, 12, down=down, up=up, heads=3, reach=1).double()
    if way == "linear":
        mine.shorten.load_state_dict(theirs.downsample.proj.state_dict())
        mine.lengthen.load_state_dict(theirs.upsample.proj.state_dict())
    else:
        mine.shorten = mine.lengthen = nn.Identity()
        mine.lengthen.in_features = 12
    if attention:
        copied(mine.read_window, theirs.attn_resampling_pre_valley)
        copied(mine.read_chunks, theirs.attn_resampling_post_valley)
    x = torch.randn(2, 32, 12, dtype=torch.float64, requires_grad=True)
    got, want = mine(x)[0], theirs(x)
    first = 0 if whole else 4
    torch.testing.assert_close(got[:, first:], want[:, first:])
    weights = torch.randn_like(want[:, first:])
    (a,), (b,) = (torch.autograd.grad((y[:, first:] * weights).sum(), x) for y in (got, want))
    torch.testing.assert_close(a, b)


class Made(nn.Module):
    def __init__(self, part: dict[str, Any], direction: str, dim: int) -> None:
        super().__init__()
        config = BackboneConfig(dim=dim, parts=[{"pool": 3, "parts": ["gru"], **part}], direction=direction, ffn="none")
        self.inner = Backbone(config)
        self.causal, self.streaming = self.inner.causal, self.inner.streaming

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
        return self.inner(x, state, layout)


@pytest.mark.parametrize(("reach", "causal"), [(2, True), (None, False)])
def test_the_contract(reach: int | None, causal: bool) -> None:
    traits = Traits(paper="of the house", causal=causal, bidirectional=not causal, streaming=causal, state="growing")
    kept = ["manners", "rows", "both sides", "padding", "resets", "bfloat16"]
    if causal:
        kept = [*(p for p in kept if p != "both sides"), "causality", "pieces", "gradients", "segments"]
    part = {**WAYS, "reach": reach, "dim": 12}

    def make(dim: int) -> nn.Module:
        return Made(part, "causal" if causal else "both", dim)

    assert check_mixer(make, traits=traits, dims=(8,), only=kept, probed=23)


@pytest.mark.parametrize("direction", ["causal", "both"])
def test_documents_are_their_own(direction: str) -> None:
    one = level(direction=direction)
    x = torch.randn(2, 29, 8, dtype=torch.float64)
    resets = torch.zeros(2, 29, dtype=torch.bool)
    resets[0, [4, 5, 17]], resets[1, 10] = True, True
    layout = Layout(lengths=torch.tensor([29, 22]), resets=resets)
    whole, last = one(x, None, layout)
    for row, cuts in ((0, [0, 4, 5, 17, 29]), (1, [0, 10, 22])):
        for a, b in itertools.pairwise(cuts):
            torch.testing.assert_close(whole[row : row + 1, a:b], one(x[row : row + 1, a:b])[0])
    if direction == "both":
        return
    for size in (1, 4):
        state, parts = None, []
        for a in range(0, 29, size):
            y, state = one(x[:, a : a + size], state, layout.slice(a, min(a + size, 29)))
            parts.append(y)
        valid = layout.valid(29)
        torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid])
        more = torch.randn(2, 7, 8, dtype=torch.float64)
        torch.testing.assert_close(one(more, state)[0], one(more, last)[0])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="reach must be at least 1"):
        level(reach=0)
    with pytest.raises(ValueError, match="does not divide into 5 heads"):
        level(heads=5)
