"""Group norm of documents: torch's own where a row is one document, and each document as if alone where it is not. Batch norm of tokens: torch's, of all that is no padding."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.norms import NORMS, DocumentGroupNorm, create_norm
from mmlong.layout import Layout


def made(dim: int = 24) -> DocumentGroupNorm:
    torch.manual_seed(0)
    norm = create_norm("group", dim, 1e-5).double()
    assert isinstance(norm, DocumentGroupNorm)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize(("dim", "groups"), [(24, 8), (20, 4), (7, 1), (64, 8)])
@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("batch", [1, 3])
def test_of_whole_rows_it_is_torchs(dim: int, groups: int, length: int, batch: int) -> None:
    norm, theirs = made(dim), torch.nn.GroupNorm(groups, dim).double()
    theirs.load_state_dict(norm.state_dict())
    x = 3 + 2 * torch.randn(batch, length, dim, dtype=torch.float64)
    wanted = theirs(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(norm(x), wanted)
    torch.testing.assert_close(norm(x, Layout(lengths=torch.full((batch,), length))), wanted)
    nothing_new = torch.zeros(batch, length, dtype=torch.bool)
    torch.testing.assert_close(norm(x, Layout(resets=nothing_new)), wanted)


def test_each_document_as_if_alone() -> None:
    norm = made()
    x = torch.randn(2, 63, 24, dtype=torch.float64)
    resets = torch.zeros(2, 63, dtype=torch.bool)
    resets[0, 20] = resets[0, 21] = resets[1, 0] = resets[1, 40] = True
    lengths = torch.tensor([50, 40])
    far = x.clone()
    far[0, 50:], far[1, 40:] = torch.nan, torch.inf
    y = norm(far, Layout(lengths=lengths, resets=resets))
    for row, bounds in ((0, [0, 20, 21, 50]), (1, [0, 40])):
        for i, j in itertools.pairwise(bounds):
            torch.testing.assert_close(y[row : row + 1, i:j], norm(x[row : row + 1, i:j]))
    assert (y[0, 50:] == 0).all()
    assert (y[1, 40:] == 0).all()


def test_gradients() -> None:
    norm = made(8)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 4] = True
    layout = Layout(lengths=torch.tensor([9, 6]), resets=resets)
    assert torch.autograd.gradcheck(lambda x: norm(x, layout), x)
    assert torch.autograd.gradcheck(norm, x)


@pytest.mark.parametrize("norm_after", [False, True])
def test_in_a_backbone_padding_and_neighbours_do_not_matter(norm_after: bool) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(dim=16, depth=2, mixers=["mamba2"], direction="both", norm="group", norm_after=norm_after)
    backbone = Backbone(config).double().eval()
    x = torch.randn(1, 21, 16, dtype=torch.float64)
    alone, _ = backbone(x)
    padded = torch.cat([x, torch.full((1, 9, 16), 1e3, dtype=torch.float64)], 1)
    y, _ = backbone(padded, None, Layout(lengths=torch.tensor([21])))
    torch.testing.assert_close(y[:, :21], alone)
    resets = torch.zeros(1, 30, dtype=torch.bool)
    resets[0, 21] = True
    z, _ = backbone(padded, None, Layout(resets=resets))
    torch.testing.assert_close(z[:, :21], alone)


def test_between_stages_too_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(dim=[8, 16], depth=[1, 1], pool=[4], mixers=["mamba2"], direction="both", norm="group")
    backbone = Backbone(config).double().eval()
    assert isinstance(backbone.merges[0].norm, DocumentGroupNorm)
    x = torch.randn(1, 21, 8, dtype=torch.float64)
    padded = torch.cat([x, torch.full((1, 19, 8), 1e3, dtype=torch.float64)], 1)
    y, _ = backbone(padded, None, Layout(lengths=torch.tensor([21])))
    torch.testing.assert_close(y[:, :6], backbone(x)[0])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_causal_backbone_refuses_it(norm: str) -> None:
    with pytest.raises(ValueError, match=rf"norm: {norm} is of many tokens.*alternate or both"):
        Backbone(BackboneConfig(dim=16, norm=norm))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_batch_norm_is_torchs_of_all_tokens_but_padding(batch: int, padded: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = create_norm("batch", 6, 1e-5).double(), torch.nn.BatchNorm1d(6).double()
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = 3 + 2 * torch.randn(batch, 63, 6, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(batch, 63, dtype=torch.bool)
    layout = None
    if padded:
        lengths = torch.tensor([63, 0, 20])[-batch:]
        layout = Layout(lengths=lengths)
        valid = layout.valid(63)
    far = torch.where(valid[..., None], x, torch.nan)
    y = ours(far, layout)
    wanted = theirs(x[valid])
    torch.testing.assert_close(y[valid], wanted)
    assert (y[~valid] == 0).all()
    weight = torch.randn_like(wanted)
    found, expected = (torch.autograd.grad((each * weight).sum(), x)[0] for each in (y[valid], wanted))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x, layout)[valid], theirs.eval()(x[valid]))
    alone = ours(x[:1, :7])
    torch.testing.assert_close(alone, ours(x)[:1, :7], msg="in evaluation a token is alone")


@pytest.mark.parametrize("option", ["reversible", "checkpoint"])
def test_batch_norm_is_not_computed_twice(option: str) -> None:
    with pytest.raises(ValueError, match="count a batch twice"):
        Backbone(BackboneConfig(dim=16, norm="batch", direction="both", **{option: True}))


@pytest.mark.parametrize("name", sorted(NORMS.names()))
def test_timm_is_told_the_width_of_each_block(name: str) -> None:
    from mmlong.timm_models import PixelModel  # timm is imported with it

    backbone = {"dim": 16, "depth": 2, "mixers": ["mamba2"], "norm": name, "direction": "both"}
    image = {"name": "image", "size": [8, 8], "channels": 1}
    model = PixelModel({"modality": image, "backbone": backbone, "head": {"name": "classify", "num_classes": 3}})
    assert [info["num_chs"] for info in model.feature_info] == [16, 16]
