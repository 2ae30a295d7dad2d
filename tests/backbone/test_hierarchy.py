"""Levels on chunks of tokens and parts within them: the whole contract, in every form; what each token depends on; and how they are written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.mixers.own_loss import own_losses
from mmlong.testing import check_mixer

KEPT = (
    "manners", "rows", "causality", "both sides", "pieces", "padding", "resets", "gradients", "segments", "bfloat16",
)  # fmt: skip

LOCAL: dict[str, Any] = {"name": "local", "window": 5, "heads": 2}


class Made(nn.Module):
    """A backbone without its norm at the end, which would hide nothing but is not needed."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.inner = Backbone(BackboneConfig(**config))
        self.causal, self.streaming = self.inner.causal, self.inner.streaming

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
        return self.inner(x, state, layout)


def level(parts: list[Any], k: int = 4, **options: Any) -> list[Any]:
    return [{"pool": k, "parts": parts, **options}]


FORMS: dict[str, list[Any]] = {
    "plain": level(["mamba2"]),
    "window inside": level([LOCAL], 3),
    "mean, repeat": level(["gla"], 5, down="mean", up="repeat"),
    "lag": level(["mamba2"], 4, lag=1, dim=24),
    "mean, lag": level(["gru"], 3, lag=1, down="mean", residual=False),
    "nested": ["mamba2", {"pool": 2, "parts": ["mamba2", {"pool": 3, "dim": 24, "parts": ["gru"]}]}, LOCAL],
    "dynamic": ["mamba2", {"dynamic": 3, "dim": 24, "parts": [LOCAL]}],
    "within": [{"within": 4, "parts": ["attention"]}],
    "recurrent memory": ["mamba2", {"recurrent_memory": 2, "segment": 23, "parts": [LOCAL]}],
    "universal": [{"universal": 3, "parts": [LOCAL]}],
    "megabyte": [{"pool": 4, "parts": ["attention"]}, {"within": 4, "parts": ["attention x 2"]}],
}


TWO_SIDED = ("plain", "mean, repeat", "nested", "within", "universal")


@pytest.mark.parametrize(
    ("name", "causal"), [*((name, True) for name in FORMS), *((name, False) for name in TWO_SIDED)], ids=str
)
def test_the_contract(name: str, causal: bool) -> None:
    def make(dim: int) -> nn.Module:
        return Made(dim=dim, parts=FORMS[name], direction="causal" if causal else "both", ffn="none")

    traits = Traits(paper="of the house", causal=causal, bidirectional=not causal, streaming=causal, state="growing")
    # Within chunks nothing is seen of other chunks.
    # A choice has no gradient, and one that goes through it as if it had is not that of finite differences.
    left_out = {"within": "both sides", "dynamic": "gradients"}.get(name)
    kept = [p for p in KEPT if p != left_out]
    assert check_mixer(make, traits=traits, dims=(16,), only=kept, probed=63)


@pytest.mark.parametrize(("lag", "length"), [(0, 23), (1, 23), (0, 4), (1, 1)])
def test_a_level_is_its_definition(lag: int, length: int) -> None:
    torch.manual_seed(0)
    k = 4
    made = Backbone(BackboneConfig(dim=8, parts=level(["mamba2"], k, lag=lag, dim=12))).double()
    one: Any = made.parts()[0]
    x = torch.randn(2, length, 8, dtype=torch.float64)
    chunks = []
    for start in range(0, length, k):
        tokens = [start - k + 1 - lag + n for n in range(k)]
        chunks.append(torch.cat([x[:, t] if t >= 0 else torch.zeros(2, 8, dtype=torch.float64) for t in tokens], -1))
    z, _ = one.inner(one.shorten(torch.stack(chunks, 1)))
    want = torch.stack([x[:, t] + one.lengthen(z[:, t // k]).unflatten(-1, (k, 8))[:, t % k] for t in range(length)], 1)
    torch.testing.assert_close(one(x)[0], want)
    # The same where rows are told apart.
    ragged = Layout(lengths=torch.tensor([length, length]))
    torch.testing.assert_close(one(x, None, ragged)[0], want)


def test_what_a_token_depends_on() -> None:
    """Through the level alone: the tokens up to the one that begins its chunk, and itself."""
    torch.manual_seed(0)
    made = Backbone(BackboneConfig(dim=8, parts=level(["attention"], 4), ffn="none")).double()
    x = torch.randn(1, 24, 8, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(made.parts()[0](x)[0][0, 14].sum(), x)
    assert g[0].abs().sum(-1).nonzero().flatten().tolist() == [*range(13), 14]


def test_within_is_attention_in_each_chunk() -> None:
    torch.manual_seed(0)
    made = Backbone(BackboneConfig(dim=8, parts=[{"within": 4, "parts": ["attention"]}])).double()
    x = torch.randn(2, 22, 8, dtype=torch.float64)
    inner: Any = made.parts()[0].inner
    want = torch.cat([inner(piece)[0] for piece in x.split(4, 1)], 1)
    torch.testing.assert_close(made.parts()[0](x)[0], want)


@pytest.mark.parametrize("name", ["nested", "mean, repeat", "megabyte", "dynamic", "recurrent memory", "universal"])
def test_batches_of_unlike_rows_in_pieces(name: str) -> None:
    """Rows of other lengths and several documents, cut where no chunk ends, token by token too."""
    torch.manual_seed(0)
    made = Backbone(BackboneConfig(dim=16, parts=FORMS[name])).double()
    lengths = [37, 20, 9]
    resets = torch.zeros(3, 37, dtype=torch.bool)
    for row, position in ((0, 10), (0, 11), (1, 19), (2, 5), (0, 30)):
        resets[row, position] = True
    x = torch.randn(3, 37, 16, dtype=torch.float64)
    layout = Layout(lengths=torch.tensor(lengths), resets=resets)
    whole, last = made(x, None, layout)
    starts = [[0, 10, 11, 30, 37], [0, 19, 20], [0, 5, 9]]
    for row, cuts in enumerate(starts):
        for a, b in itertools.pairwise(cuts):
            torch.testing.assert_close(whole[row : row + 1, a:b], made(x[row : row + 1, a:b])[0])
    for size in (1, 5):
        state, parts = None, []
        for a in range(0, 37, size):
            y, state = made(x[:, a : a + size], state, layout.slice(a, min(a + size, 37)))
            parts.append(y)
        valid = layout.valid(37)
        torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid])
        more = torch.randn(3, 6, 16, dtype=torch.float64)
        torch.testing.assert_close(made(more, state)[0], made(more, last)[0])


def test_how_it_is_written() -> None:
    short = ["mamba2 x 2", ["pool 4", ["mamba2 x 4"], "up"], {"name": "local", "window": 7, "repeat": 2}]
    long = [
        "mamba2", "mamba2", {"pool": 4, "parts": ["mamba2"] * 4},
        {"name": "local", "window": 7}, {"name": "local", "window": 7},
    ]  # fmt: skip
    torch.manual_seed(0)
    one = Backbone(BackboneConfig(dim=16, parts=short, drop_path=0.2))
    torch.manual_seed(0)
    other = Backbone(BackboneConfig(dim=16, parts=long, drop_path=0.2))
    assert len(one.blocks()) == 8
    assert one.state_dict().keys() == other.state_dict().keys()
    x = torch.randn(1, 30, 16)
    torch.testing.assert_close(one.eval()(x)[0], other.eval()(x)[0])
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in one.blocks()]
    assert rates == pytest.approx([0.2 * n / 7 for n in range(8)])


def test_a_stack_says_how_often_too() -> None:
    conv = {"name": "masked_conv2d", "width": 4, "radius": 1}
    short = Backbone(BackboneConfig(dim=16, depth=7, mixers=[{**conv, "repeat": 3}, "s4d x 2", "mamba2"]))
    kinds = [type(block.mixer).__name__ for block in short.blocks()]
    assert kinds == ["MaskedConv2d"] * 3 + ["S4D"] * 2 + ["Mamba2", "MaskedConv2d"]
    with pytest.raises(ValueError, match="repeat must be a whole number of blocks, at least 1, got 0"):
        Backbone(BackboneConfig(dim=16, mixers=[{**conv, "repeat": 0}]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["mamba2 x 0"], "neither a mixer's name nor NAME x N"),
        ([["pol 4", ["mamba2"], "up"]], "a level is"),
        ([{"pool": 4}], "needs parts"),
        ([{"pool": 4, "parts": ["mamba2"], "dwn": "mean"}], "did you mean 'down'"),
        ([{"within": 4, "parts": ["mamba2"], "dim": 3}], "a part with within has no option 'dim'"),
        ([{"window": 4}], "neither name, nor one of .*dynamic, .*pool, recurrent_memory, "),
        ([{"pool": 0, "parts": ["mamba2"]}], "at least 1 token"),
        ([{"pool": 4, "parts": ["mamba2"], "up": "attentive"}], "its up one of repeat, linear, attention"),
        (["mamba3000"], "mamba3"),
    ],
)
def test_what_is_no_part(parts: list[Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        Backbone(BackboneConfig(dim=16, parts=parts))


def test_what_it_does_not_go_with() -> None:
    for options in ({"reversible": True}, {"pool": [2], "dim": [16, 16], "direction": "both"}):
        with pytest.raises(ValueError, match=r"backbone\.parts is a stack of its own making"):
            Backbone(BackboneConfig(**{"dim": 16, "parts": level(["mamba2"]), **options}))
    with pytest.raises(ValueError, match="a lag keeps the future out"):
        Backbone(BackboneConfig(dim=16, parts=level(["mamba2"], lag=1), direction="both"))


def test_recurrent_memory_is_its_definition() -> None:
    torch.manual_seed(0)
    made = Backbone(
        BackboneConfig(dim=8, parts=[{"recurrent_memory": 2, "segment": 5, "parts": ["attention"]}])
    ).double()
    one: Any = made.parts()[0]
    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    memory, rows = one.memory[None].double(), []
    for piece in x.split(5, 1):
        y, _ = one.inner(torch.cat([memory, piece, memory], 1))
        rows.append(y[:, 2:-2])
        memory = y[:, -2:]
    got = one(x)[0]
    torch.testing.assert_close(got, torch.cat(rows, 1))
    # Through the memory the last token depends on the first, and the gradient knows.
    (g,) = torch.autograd.grad(got[0, 12].sum(), x)
    assert bool((g[0].abs().sum(-1) > 0).all())


def test_adaptive_computation_time_is_its_definition() -> None:
    torch.manual_seed(0)
    made = Backbone(BackboneConfig(dim=8, parts=[{"universal": 4, "parts": ["mamba2"], "ponder": 0.5}])).double()
    one: Any = made.parts()[0].train()
    with torch.no_grad():
        one.halt.weight.normal_(std=2)
        one.halt.bias.fill_(-1.0)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with own_losses() as found:
        got = one(x)[0]
    h, y, costs = x, torch.zeros_like(x), torch.zeros(2, 9)
    sums, done = torch.zeros(2, 9, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.bool)
    taken = set()
    for t in range(4):
        new = one.inner(h + one.step_embed[t])[0]
        for b in range(2):
            for i in range(9):
                if done[b, i]:
                    new[b, i] = h[b, i]
        h = new
        for b in range(2):
            for i in range(9):
                if done[b, i]:
                    continue
                p = torch.sigmoid(one.halt(h[b, i]))[0]
                if sums[b, i] + p >= 0.99 or t == 3:
                    rest = 1 - sums[b, i]
                    y[b, i] += rest * h[b, i]
                    costs[b, i] = t + 1 + rest
                    done[b, i] = True
                    taken.add(t + 1)
                else:
                    y[b, i] += p * h[b, i]
                    sums[b, i] += p
    assert len(taken) > 1
    torch.testing.assert_close(got, y)
    _, total, tokens = found[0]
    assert float(total.detach()) / int(tokens) == pytest.approx(0.5 * float(costs.mean()), rel=1e-5)


def test_depth_recurrence_is_part_of_the_loss() -> None:
    backbone = Backbone(BackboneConfig(dim=8, parts=[{"universal": 2, "parts": ["mamba2"]}]))
    assert backbone.has_own_loss
    assert not Backbone(BackboneConfig(dim=8, parts=[{"universal": 2, "parts": ["mamba2"], "ponder": 0}])).has_own_loss


def test_dynamic_chunking_is_its_definition() -> None:
    torch.manual_seed(0)
    spec = [{"dynamic": 3, "dim": 12, "parts": ["mamba2"], "weight": 0.5}]
    one: Any = Backbone(BackboneConfig(dim=8, parts=spec)).double().parts()[0].train()
    with torch.no_grad():
        one.wider.normal_()
        one.q_proj.weight.add_(0.3 * torch.randn(8, 8))
    x = torch.randn(1, 40, 8, dtype=torch.float64, requires_grad=True)
    with own_losses() as found:
        got = one(x)[0]
    p = [torch.ones((), dtype=torch.float64)]
    for t in range(1, 40):
        q, k = one.q_proj(x[0, t]), one.k_proj(x[0, t - 1])
        p.append((1 - q @ k / (q.norm() * k.norm())) / 2)
    begins = [t for t in range(40) if p[t] >= 0.5]
    assert 5 < len(begins) < 35
    c, _ = one.inner(torch.stack([torch.cat([x[0, t], one.wider]) for t in begins])[None])
    smooth: list[Tensor] = []
    for g, t in enumerate(begins):
        smooth.append(p[t] * c[0, g] + (1 - p[t]) * (smooth[-1] if smooth else 0))
    rows = []
    for t in range(40):
        g = sum(b <= t for b in begins) - 1
        sure = p[t] if t in begins else 1 - p[t]
        rows.append(one.residual(x[0, t]) + (sure + (1 - sure).detach()) * smooth[g][:8])
    want = torch.stack(rows)[None]
    torch.testing.assert_close(got, want)
    leaves = [x, one.q_proj.weight, one.k_proj.weight, one.wider, one.residual.weight]
    weights = torch.randn_like(want)
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True) for y in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b)
    share, mean = len(begins) / 40, torch.stack(p).mean()
    loss = 0.5 * 3 / 2 * (2 * share * mean + (1 - share) * (1 - mean))
    torch.testing.assert_close(found[0][1] / found[0][2], loss)


def test_like_tokens_are_one_chunk() -> None:
    """As it begins: a chunk where a token points away from the one before."""
    one: Any = Backbone(BackboneConfig(dim=8, parts=[{"dynamic": 3, "parts": ["mamba2"]}])).parts()[0]
    x = torch.ones(1, 12, 8)
    x[0, 5:9] = -1
    p = one.chances(x, torch.zeros(1, 1, 8), torch.arange(12)[None] == 0)
    assert (p[0] >= 0.5).nonzero().flatten().tolist() == [0, 5, 9]
    for options, message in (({"dynamic": 1}, "more than 1 token"), ({"dynamic": 4, "dim": 4}, "at least as wide")):
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=8, parts=[{"parts": ["mamba2"], **options}]))
    with pytest.raises(ValueError, match="of causal parts"):
        Backbone(BackboneConfig(dim=8, parts=[{"dynamic": 4, "parts": ["mamba2"]}], direction="both"))


@pytest.mark.parametrize(
    ("direction", "down", "up"), [("causal", "mean", "attention"), ("both", "attention", "linear")]
)
def test_padding_alone_takes_the_same_way_as_full_rows(direction: Any, down: str, up: str) -> None:
    """Chunks as a view of the tokens, and gathered one by one, as rows of several documents are."""
    torch.manual_seed(0)
    one: Any = Backbone(
        BackboneConfig(dim=8, parts=level(["gru"], 3, down=down, up=up, dim=12), direction=direction)
    ).parts()[0]
    one.double()
    lengths = torch.tensor([14, 9, 0, 1])
    x = torch.randn(4, 14, 8, dtype=torch.float64)
    view, left = one(x, None, Layout(lengths=lengths))
    gathered, other = one(x, None, Layout(lengths=lengths, resets=torch.zeros(4, 14, dtype=torch.bool)))
    valid = Layout(lengths=lengths).valid(14)
    torch.testing.assert_close(view[valid], gathered[valid])
    if direction == "causal":
        more = torch.randn(4, 5, 8, dtype=torch.float64)
        torch.testing.assert_close(one(more, left)[0], one(more, other)[0])
