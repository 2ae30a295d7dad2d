"""f(rc(x)) = rc(f(x)): the wrapper over one mixer of each kind of state and all that have only a two-sided form, whole backbones, whole models, and the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.backbone import (
    Backbone,
    BackboneConfig,
    ReverseComplement,
    create_directed,
    reverse_complement_features,
)
from mmlong.backbone.reverse_complement import join_strands, split_strands
from mmlong.layout import Layout
from mmlong.mixers import MIXERS, list_mixers
from mmlong.modalities.genome import reverse_complement
from mmlong.models import Model
from mmlong.testing.kinds import MORE_KINDS

F64 = torch.float64


def layouts(length: int) -> dict[str, Layout | None]:
    """The kinds of rows that there are, three of each."""
    resets = torch.zeros(3, length, dtype=torch.bool)
    resets[0, 5] = resets[1, length - 1] = True
    return {
        "full": None,
        "padded": Layout(lengths=torch.tensor([length, 1, length - 4])),
        "packed": Layout(lengths=torch.tensor([length, length, length - 2]), resets=resets),
    }


def reference(x: Tensor, lengths: list[int]) -> Tensor:
    """RC of features by its definition, an element at a time."""
    y = torch.empty_like(x)
    half = x.shape[2] // 2
    for row, length in enumerate(lengths):
        for place in range(x.shape[1]):
            there = length - 1 - place if place < length else place
            for channel in range(x.shape[2]):
                y[row, place, channel] = x[row, there, (channel + half) % (2 * half)]
    return y


def rows_of(layout: Layout | None, batch: int, length: int) -> list[int]:
    return [length] * batch if layout is None or layout.lengths is None else layout.lengths.tolist()


def assert_valid_equal(a: Tensor, b: Tensor, lengths: list[int]) -> None:
    for row, length in enumerate(lengths):
        torch.testing.assert_close(a[row, :length], b[row, :length], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("direction", ["both", "alternate"])
@pytest.mark.parametrize("name", [*MORE_KINDS, *list_mixers(causal=False)])
def test_mixers_are_equivariant(name: str, direction: str, kind: str) -> None:
    traits = MIXERS[name].traits
    if (kind != "full" and not traits.padding) or (kind == "packed" and not traits.resets):
        pytest.skip(f"{name} takes full rows of one document")
    torch.manual_seed(0)
    length, layout = 21, layouts(21)[kind]
    module = create_directed(name, 8, direction, index=1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))  # some mechanisms begin with an output of zero
    wrapped = ReverseComplement(module).to(F64).eval()
    x = torch.randn(3, length, 16, dtype=F64)
    rows = rows_of(layout, 3, length)
    there = None if layout is None else layout.flip(length)
    y, state = wrapped(x, None, layout)
    assert state is None
    assert_valid_equal(wrapped(reference(x, rows), None, there)[0], reference(y, rows), rows)
    assert (y[0] - reference(y, rows)[0]).abs().max() > 1e-3, "equal for a reason that has nothing to do with strands"


@pytest.mark.parametrize("kind", ["full", "padded"])
def test_wrapper_is_its_definition(kind: str) -> None:
    torch.manual_seed(1)
    module = create_directed("mamba2", 8, "both", 0).to(F64).eval()
    x, layout = torch.randn(3, 13, 16, dtype=F64), layouts(13)[kind]
    y = ReverseComplement(module)(x, None, layout)[0]
    for row, length in enumerate(rows_of(layout, 3, 13)):
        one = x[row : row + 1, :length]
        expected = torch.cat([module(one[..., :8])[0], module(one[..., 8:].flip(1))[0].flip(1)], -1)
        torch.testing.assert_close(y[row : row + 1, :length], expected, rtol=1e-9, atol=1e-10)


def test_reverse_complement_of_features() -> None:
    x, layout = torch.randn(3, 9, 6), layouts(9)["padded"]
    assert layout is not None
    torch.testing.assert_close(reverse_complement_features(x, layout), reference(x, layout.lengths.tolist()))
    torch.testing.assert_close(reverse_complement_features(reverse_complement_features(x, layout), layout), x)
    rows, both = split_strands(x, layout)
    both.check(6, 9)
    torch.testing.assert_close(join_strands(rows, layout), x)
    for lengths in (None, layout.lengths):  # coordinates go with their tokens
        placed = Layout(lengths=lengths, positions=torch.arange(9.0).view(1, 9, 1))
        _, both = split_strands(x, placed)
        both.check(6, 9)
        assert both.positions is not None
        for row, length in enumerate(rows_of(placed, 3, 9)):
            assert both.positions[row, :length, 0].tolist() == list(range(length))
            assert both.positions[3 + row, :length, 0].tolist() == list(range(length))[::-1]


BACKBONES: dict[str, dict[str, Any]] = {
    "mamba2": {"dim": 16, "depth": 2, "mixers": ["mamba2"], "direction": "alternate"},
    "hybrid": {"dim": 16, "depth": 3, "mixers": ["hyena", "local", "s4d"], "direction": "both", "layer_scale": 0.5},
    "pyramid": {"dim": [16, 24], "depth": [1, 2], "pool": [4], "mixers": ["mamba2"], "direction": "both"},
}


@pytest.mark.parametrize("kind", ["full", "padded"])
@pytest.mark.parametrize("length", [1, 16, 21])
@pytest.mark.parametrize("which", BACKBONES)
def test_whole_backbone_is_equivariant(which: str, length: int, kind: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(**BACKBONES[which], reverse_complement=True)).to(F64).eval()
    layout = None if kind == "full" else Layout(lengths=torch.tensor([length, 1, max(1, length - 5)]))
    x = torch.randn(3, length, backbone.dim_in, dtype=F64)
    y = backbone(x, None, layout)[0]
    out = backbone.layout_out(layout, length)
    rows_in, rows_out = rows_of(layout, 3, length), rows_of(out, 3, y.shape[1])
    assert y.shape == (3, -(-length // backbone.stride), backbone.num_features)
    assert_valid_equal(backbone(reference(x, rows_in), None, layout)[0], reference(y, rows_out), rows_out)


def test_weights_are_shared_by_the_strands() -> None:
    config = BACKBONES["hybrid"]
    both = Backbone(BackboneConfig(**config, reverse_complement=True))
    one = Backbone(BackboneConfig(**{**config, "dim": 8}))
    assert {k: v.shape for k, v in both.state_dict().items()} == {k: v.shape for k, v in one.state_dict().items()}


def build(**options: Any) -> Model:
    torch.manual_seed(0)
    config = {
        "modality": {"name": "genome"},
        "backbone": {**BACKBONES["mamba2"], "reverse_complement": True},
        "head": {"name": "both_strands", "of": "classify", "num_classes": 3},
    }
    return Model({**config, **options}).to(F64).eval()


@pytest.mark.parametrize("pool", ["mean", "max", "attention"])
def test_a_model_says_the_same_of_both_strands(pool: str) -> None:
    model = build(head={"name": "both_strands", "of": "classify", "num_classes": 3, "pool": pool})
    assert model.config["modality"]["reverse_complement"]
    raw = torch.tensor(list(b"ACGTNACGTTTGCATACCAGTACCA"), dtype=torch.uint8)[torch.randint(25, (3, 37))]
    lengths = torch.tensor([37, 20, 1])
    codes, layout = model.encode(raw, lengths)
    other = reverse_complement(codes, lengths)
    a, b = model(codes, None, layout)[0], model(other, None, layout)[0]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    plain = build(head={"name": "classify", "num_classes": 3})
    assert (plain(codes, None, layout)[0] - plain(other, None, layout)[0]).abs().max() > 1e-4
    assert model.get_classifier().out_features == 3
    assert model.forward_head(model.forward_features(codes, None, layout)[0], layout, pre_logits=True).shape == (3, 8)
    model.reset_classifier(5)
    assert model(codes, None, layout)[0].shape == (3, 5)


def test_a_per_token_head_is_equivariant() -> None:
    model = build(head={"name": "both_strands", "of": "categorical", "num_classes": 2})
    codes = torch.randint(5, (2, 15))
    torch.testing.assert_close(model(reverse_complement(codes))[0], model(codes)[0].flip(1), rtol=1e-9, atol=1e-10)
    assert model.head.per_token


def test_it_trains() -> None:
    model = build().train()
    codes = torch.randint(5, (2, 15))
    loss, _ = model.head.loss(model(codes)[0], torch.tensor([0, 2]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_sees_both_sides_whatever_it_is_made_of() -> None:
    backbone = Backbone(BackboneConfig(dim=16, depth=1, direction="alternate", reverse_complement=True))
    assert not backbone.causal
    assert not backbone.streaming
    assert backbone(torch.randn(1, 4, 16))[1] is None


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="use direction alternate or both"):
        Backbone(BackboneConfig(dim=16, reverse_complement=True))
    with pytest.raises(ValueError, match="must be even with reverse_complement; got 15"):
        Backbone(BackboneConfig(dim=15, direction="both", reverse_complement=True))
    wrapped = ReverseComplement(create_directed("mamba2", 8, "both", 0))
    with pytest.raises(ValueError, match="must be even; got 15"):
        wrapped(torch.randn(1, 4, 15))
    with pytest.raises(ValueError, match="not of a grid"):
        wrapped(torch.randn(1, 4, 16), None, Layout(grid=(2, 2)))
    with pytest.raises(ValueError, match="given a state but has none"):
        wrapped(torch.randn(1, 4, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="image has no strands"):
        build(modality={"name": "image", "size": [4, 4]})
    for head in ({"of": "classify", "pool": "last"}, {"of": "readout", "tokens": 4}):
        with pytest.raises(ValueError, match="reads positions by their order"):
            build(head={"name": "both_strands", "num_classes": 2, **head})
