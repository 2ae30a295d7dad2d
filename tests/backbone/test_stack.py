"""The backbone: one signature at every level, directions, pooling, padding."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmlong.backbone import Backbone, BackboneConfig, Merge, Reversed
from mmlong.backbone.feedforward import create_ffn
from mmlong.layout import Layout, scan_order
from mmlong.mixers import select_rows, state_bytes
from mmlong.models import Model
from mmlong.testing.kinds import MORE_KINDS


def build(**options) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**{"dim": 16, "depth": 2, "mixers": ["mamba2"], **options})).double().eval()


@pytest.mark.parametrize("mixer", MORE_KINDS)
def test_whole_equals_pieces_equals_one_at_a_time(mixer: str) -> None:
    backbone = build(mixers=[mixer])
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    whole, final = backbone(x)
    for cuts in ([0, 1, 20, 33], list(range(34))):
        state, parts = None, []
        for i, j in itertools.pairwise(cuts):
            y, state = backbone(x[:, i:j], state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-8, atol=1e-10)
    assert state_bytes(final) == state_bytes(state)
    extra = torch.randn(2, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(backbone(extra, final)[0], backbone(extra, state)[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(backbone(extra[1:], select_rows(final, slice(1, 2)))[0], backbone(extra, final)[0][1:])


def test_mixers_repeat_over_depth() -> None:
    backbone = build(depth=5, mixers=["mamba2", {"name": "local", "window": 5}])
    names = [type(block.mixer).__name__ for block in backbone.blocks()]
    assert names == [names[0], names[1], names[0], names[1], names[0]]
    assert names[0] != names[1]


@pytest.mark.parametrize("direction", ["alternate", "both"])
def test_both_sides_are_seen_and_padding_is_not(direction: str) -> None:
    backbone = build(direction=direction)
    assert not backbone.causal
    assert not backbone.streaming
    x = torch.randn(1, 21, 16, dtype=torch.float64, requires_grad=True)
    # A random direction: the plain sum of a normed token is constant and has no gradient.
    (g,) = torch.autograd.grad((backbone(x)[0][0, 10] * torch.randn(16, dtype=torch.float64)).sum(), x)
    assert (g[0].abs().sum(-1) > 0).all()
    padded = torch.cat([x.detach(), torch.full((1, 9, 16), 1e3, dtype=torch.float64)], 1)
    y, state = backbone(padded, None, Layout(lengths=torch.tensor([21])))
    assert state is None
    torch.testing.assert_close(y[:, :21], backbone(x)[0])


def test_alternate_reverses_every_second_causal_mixer() -> None:
    kinds = [isinstance(block.mixer, Reversed) for block in build(depth=4, direction="alternate").blocks()]
    assert kinds == [False, True, False, True]


def test_pooled_stages_padding_and_layout() -> None:
    backbone = build(dim=[16, 24], depth=[1, 1], pool=[4], direction="alternate")
    assert (backbone.dim_in, backbone.num_features, backbone.stride) == (16, 24, 4)
    x = torch.randn(1, 63, 16, dtype=torch.float64)
    y = backbone(x)[0]
    assert y.shape == (1, 16, 24)
    padded = torch.cat([x, torch.full((1, 17, 16), 1e3, dtype=torch.float64)], 1)
    layout = Layout(lengths=torch.tensor([63]))
    found = backbone(padded, None, layout)[0]
    assert backbone.layout_out(layout, 80).lengths.tolist() == [16]
    torch.testing.assert_close(found[:, :16], y)
    grid = backbone.layout_out(Layout(grid=(8, 8), order="morton"), 64)
    assert grid.grid == (4, 4)


def test_merge_groups_are_blocks_of_the_image() -> None:
    merge = Merge(4, 1, 1)
    merge.norm = torch.nn.Identity()
    torch.nn.init.constant_(merge.project.weight, 0.25)
    torch.nn.init.zeros_(merge.project.bias)
    image = torch.arange(64.0).view(8, 8)
    tokens = image.flatten()[scan_order((8, 8), "morton")].view(1, 64, 1)
    expected = image.view(4, 2, 4, 2).mean((1, 3)).flatten()[scan_order((4, 4), "morton")]
    torch.testing.assert_close(merge(tokens)[0, :, 0], expected)


@pytest.mark.parametrize("order", ["raster", "serpentine", "hilbert"])
def test_patch_merging_is_timms(order: str) -> None:
    swin = pytest.importorskip("timm.models.swin_transformer")
    torch.manual_seed(0)
    theirs = swin.PatchMerging(6, 10).double()
    merge = Merge("2x2", 6, 10).double()
    torch.nn.init.normal_(theirs.norm.weight)
    torch.nn.init.normal_(theirs.norm.bias)
    # Theirs takes the cells of a patch down its columns, here they go along its rows.
    places = torch.arange(24).view(2, 2, 6).transpose(0, 1).flatten()
    with torch.no_grad():
        merge.norm.weight.copy_(theirs.norm.weight[places])
        merge.norm.bias.copy_(theirs.norm.bias[places])
        merge.project.weight.copy_(theirs.reduction.weight[:, places])
        merge.project.bias.zero_()
    image = torch.randn(2, 8, 12, 6, dtype=torch.float64, requires_grad=True)
    layout = Layout(grid=(8, 12), order=order)
    tokens = image.flatten(1, 2)[:, scan_order((8, 12), order)]
    got, want = merge(tokens, layout), theirs(image).flatten(1, 2)[:, scan_order((4, 6), order)]
    assert merge.layout_out(layout, 96).grid == (4, 6)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), image)[0] for y in (got, want)))


def test_swin_stages_on_an_image_in_any_scan_order() -> None:
    """Windows and patches of a pyramid: what comes out is a matter of the image, not of how it was unrolled."""
    stages = [[{"name": "swin_2d", "window": 4, "shift": shift, "heads": 2} for shift in (0, 2)]] * 3
    options = {"dim": [8, 12, 16], "depth": [2, 2, 2], "mixers": stages, "direction": "both"}
    backbone = build(pool=["2x2", "2x2"], **options)
    assert backbone.stride == 16
    image = torch.randn(2, 32 * 32, 8, dtype=torch.float64)
    want = backbone(image, None, Layout(grid=(32, 32)))[0]
    assert want.shape == (2, 64, 16)
    for order in ("morton", "hilbert", "random:3"):
        layout = Layout(grid=(32, 32), order=order)
        got = backbone(image[:, scan_order((32, 32), order)], None, layout)[0]
        out = backbone.layout_out(layout, 1024)
        assert (out.grid, out.order) == ((8, 8), order)
        torch.testing.assert_close(got, want[:, scan_order((8, 8), order)])
    # In Morton order four neighbours are a patch.
    neighbours = build(pool=[4, 4], **options)
    layout = Layout(grid=(32, 32), order="morton")
    torch.testing.assert_close(neighbours(image, None, layout)[0], backbone(image, None, layout)[0])
    with pytest.raises(ValueError, match="patches of 2x2 are of a whole grid"):
        backbone(image)
    with pytest.raises(ValueError, match="neither a number of neighbours nor the sides"):
        build(pool=["2by2", 4], **options)


def test_a_classifier_of_swin_stages() -> None:
    stages = [[{"name": "swin_2d", "window": 4, "shift": shift, "heads": 2} for shift in (0, 2)]] * 3
    config = {
        "modality": {"name": "image", "size": [32, 32], "channels": 3, "order": "raster"},
        "backbone": {
            "dim": [8, 16, 32],
            "depth": [2, 2, 2],
            "pool": ["2x2", "2x2"],
            "mixers": stages,
            "direction": "both",
        },
        "head": {"name": "readout", "num_classes": 5},
    }
    torch.manual_seed(0)
    model = Model(config)
    assert model.head.tokens == 64
    tokens, layout = model.encode(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    scores = model(tokens, None, layout)[0]
    assert scores.shape == (2, 5)
    scores.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_changes_nothing() -> None:
    backbone = build(dropout=0.2).train()
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        backbone.grad_checkpointing = enable
        backbone.zero_grad()
        torch.manual_seed(3)
        backbone(x)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in backbone.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="dim has 2 entries for 1 stages"):
        build(dim=[16, 32])
    with pytest.raises(ValueError, match="use direction alternate or both with pool"):
        build(dim=[16, 32], depth=[1, 1], pool=[4])
    with pytest.raises(KeyError, match="did you mean 'hyena'"):
        build(mixers=["hiena"])
    with pytest.raises(ValueError, match="unknown direction"):
        build(direction="sideways")
    with pytest.raises(ValueError, match="mixers is empty"):
        build(mixers=[])
    with pytest.raises(ValueError, match="pooling would mix documents"):
        backbone = build(dim=[16, 24], depth=[1, 1], pool=[4], direction="alternate")
        backbone(torch.zeros(1, 8, 16).double(), None, Layout(resets=torch.zeros(1, 8, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"takes \(B, L, 16\)"):
        build()(torch.zeros(1, 8, 15).double())
    with pytest.raises(ValueError, match="3 entries, the backbone 2 blocks"):
        build()(torch.zeros(1, 8, 16).double(), (None, None, None))


def test_integer_tokens_are_a_clear_error() -> None:
    for tokens in (torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, 16, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"takes real vectors, got torch.int64: embed codes first"):
            build()(tokens)


@pytest.mark.parametrize("norm", ["layer", "rms", "rms_offset"])
@pytest.mark.parametrize("after", [False, True])
def test_norms_before_and_after_are_their_formula(norm: str, after: bool) -> None:
    backbone = build(
        depth=1, mixers=["rwkv4"], norm=norm, norm_eps=1e-3, norm_after=after, norm_in=True, norm_out=not after
    )
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.1 * torch.randn_like(p))
    (block,), x = backbone.blocks(), torch.randn(2, 9, 16, dtype=torch.float64)

    def normed(u: torch.Tensor, m: torch.nn.Module) -> torch.Tensor:
        if norm == "layer":
            u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
            return u * m.weight + m.bias
        scale = m.weight if norm == "rms" else 1 + m.weight
        return u / (u.square().mean(-1, keepdim=True) + 1e-3).sqrt() * scale

    want = torch.nn.functional.layer_norm(x, (16,), backbone.norm_in.weight, backbone.norm_in.bias, 1e-3)
    for branch, m in ((lambda u: block.mixer(u)[0], block.norm1), (block.ffn, block.norm2)):
        want = normed(want + branch(want), m) if after else want + branch(normed(want, m))
    torch.testing.assert_close(backbone(x)[0], want if after else normed(want, backbone.norm))


def test_norms_that_there_are_not() -> None:
    with pytest.raises(KeyError, match="unknown norm 'rmss' \\(did you mean 'rms'"):
        build(norm="rmss")
    with pytest.raises(ValueError, match="which norm_after would change"):
        build(norm_after=True, reversible=True)


@pytest.mark.parametrize("bias", [False, True])
def test_gated_and_plain_feed_forwards_with_other_activations(bias: bool) -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    glu = create_ffn({"name": "glu", "activation": "gelu_tanh", "bias": bias}, 8, 1.375).double()
    a, b = glu.w_in(x).chunk(2, -1)
    assert a.shape[-1] == 11
    torch.testing.assert_close(glu(x), glu.w_out(torch.nn.functional.gelu(a, approximate="tanh") * b))
    assert len(list(glu.parameters())) == (4 if bias else 2)
    mlp = create_ffn({"name": "mlp", "activation": "quick_gelu"}, 8, 2).double()
    torch.testing.assert_close(mlp(x), mlp[2](mlp[0](x) * torch.sigmoid(1.702 * mlp[0](x))))
    assert create_ffn({"name": "swiglu", "bias": bias}, 8, 2).w_in.bias is None or bias
    with pytest.raises(ValueError, match="unknown activation 'gelu_new'.*known: gelu, gelu_tanh"):
        create_ffn({"name": "mlp", "activation": "gelu_new"}, 8, 2)
