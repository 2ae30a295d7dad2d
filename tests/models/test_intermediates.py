"""What is given between parts is what the parts gave, on the grid where the pixels are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.models import Model, build_model
from mmlong.models.intermediates import take_indices

IMAGE = {"name": "image", "size": [8, 8], "channels": 3, "order": "morton"}
CLASSES = {"name": "classify", "num_classes": 3}
MODELS: dict[str, dict[str, Any]] = {
    "stages": {
        "modality": IMAGE, "head": CLASSES,
        "backbone": {"dim": [8, 12], "depth": [2, 1], "pool": [4], "mixers": ["s4d"], "direction": "alternate"},
    },
    "parts": {
        "modality": {"name": "text"}, "head": CLASSES,
        "backbone": {"dim": 8, "parts": ["s4d", ["pool 4", ["local x 2"], "up"], "s4d"]},
    },
    "latents": {
        "modality": {"name": "text"}, "head": CLASSES,
        "backbone": {"dim": 8, "parts": ["s4d", {"perceiver": 4, "parts": ["attention"]}], "direction": "both"},
    },
    "next token": {"kind": "autoregressive", "modality": {"name": "text"}, "head": {}, "backbone": {"dim": 8, "depth": 2, "mixers": ["s4d"]}},
    "masked": {
        "kind": "masked", "modality": {"name": "text"}, "head": {},
        "backbone": {"dim": 8, "depth": 2, "mixers": ["s4d"], "direction": "both", "checkpoint": True},
    },
    "strands": {
        "modality": {"name": "genome"}, "head": {"name": "both_strands", "num_classes": 3},
        "backbone": {"dim": 8, "depth": 2, "mixers": ["s4d"], "direction": "both", "reverse_complement": True},
    },
}  # fmt: skip


def make(name: str, **backbone: Any) -> tuple[Model, Tensor, Layout]:
    torch.manual_seed(0)
    config = MODELS[name]
    model = build_model({**config, "backbone": {**config["backbone"], **backbone}}).eval()
    raw = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    lengths = None
    if model.modality.kind != "image":
        raw, lengths = (
            torch.tensor(list(b"ACGTTGCAACGATTGCCGAT"), dtype=torch.uint8).expand(2, -1),
            torch.tensor([20, 13]),
        )
    return model, *model.encode(raw, lengths)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_what_the_parts_gave(name: str) -> None:
    model, tokens, layout = make(name)
    heard: list[Tensor] = []
    handles = [part.register_forward_hook(lambda m, i, out: heard.append(out[0])) for part in model.backbone.parts()]
    features, _ = model.forward_features(tokens, None, layout)
    for handle in handles:
        handle.remove()
    found, between = model.forward_intermediates(tokens, layout)
    assert found.equal(features)
    assert len(between) == len(heard) == len(model.backbone.parts())
    for (x, _), gave in zip(between, heard, strict=True):
        if name == "strands":
            here, there = gave[:2], layout.flip_tokens(gave[2:])
            gave = torch.cat([here, there], -1)
        assert x.equal(gave)
    # The last one, normed, is the features, in the features' layout.
    (last,) = model.forward_intermediates(tokens, layout, indices=1, norm=True, intermediates_only=True)
    assert last.x.equal(features)
    due = model.backbone.layout_out(layout, tokens.shape[1])
    assert (last.layout is None) == (due is None)
    if due is not None:
        assert (last.layout.grid, last.layout.order) == (due.grid, due.order)
        assert due.lengths is None or last.layout.lengths.equal(due.lengths)
    assert not any(part._forward_hooks for part in model.backbone.parts())


def test_they_are_what_the_blocks_make_by_hand() -> None:
    model, tokens, layout = make("stages")
    x, given = model.modality.embed(tokens, layout), layout
    by_hand = []
    for s, stage in enumerate(model.backbone.stages):
        if s:
            merge = model.backbone.merges[s - 1]
            x, given = merge(x, given), merge.layout_out(given, x.shape[1])
        for block in stage:
            x, _ = block(x, None, given)
            by_hand.append((x, given.grid))
    between = model.forward_intermediates(tokens, layout, intermediates_only=True)
    assert [one.layout.grid for one in between] == [grid for _, grid in by_hand] == [(8, 8), (8, 8), (4, 4)]
    assert all(one.x.equal(due) for one, (due, _) in zip(between, by_hand, strict=True))


@pytest.mark.parametrize("order", ["raster", "morton", "random:3"])
def test_pixels_stand_where_they_are(order: str) -> None:
    torch.manual_seed(0)
    model = build_model({
        "modality": {**IMAGE, "size": [4, 6], "order": order}, "head": CLASSES,
        "backbone": {"dim": 8, "depth": 2, "mixers": ["s4d"], "direction": "both"},
    }).eval()  # fmt: skip
    tokens, layout = model.encode(torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8))
    sequences = model.forward_intermediates(tokens, layout, intermediates_only=True)
    pictures = model.forward_intermediates(tokens, layout, output_fmt="NCHW", intermediates_only=True)
    cells = layout.coordinates(24)[0]
    for sequence, picture in zip(sequences, pictures, strict=True):
        assert picture.shape == (2, 8, 4, 6)
        assert picture.is_contiguous()
        for place, (row, column) in enumerate(cells.tolist()):
            assert picture[:, :, row, column].equal(sequence.x[:, place])


def test_gradients_pass_through() -> None:
    model, tokens, layout = make("masked")
    model.train()
    (first,) = model.forward_intermediates(tokens, layout, indices=[0], intermediates_only=True)
    first.x.sum().backward()
    parts = model.backbone.parts()
    assert all(p.grad is not None for p in parts[0].mixer.parameters())
    assert all(p.grad is None for p in parts[1].parameters())


def test_stopping_early_runs_nothing_more() -> None:
    model, tokens, layout = make("parts")
    ran: list[int] = []
    for number, part in enumerate(model.backbone.parts()):
        part.register_forward_hook(lambda m, i, out, number=number: ran.append(number))
    features, between = model.forward_intermediates(tokens, layout, indices=[-2, 0], stop_early=True)
    assert features is None
    assert ran == [0, 1]
    full, same = model.forward_intermediates(tokens, layout, indices=[0, 1])
    assert full is not None
    assert ran[-1] == 2
    assert len(between) == 2
    assert all(a.x.equal(b.x) for a, b in zip(between, same, strict=True))


def test_which_parts_are_meant() -> None:
    assert take_indices(4, None) == [0, 1, 2, 3]
    assert take_indices(4, 2) == [2, 3]
    assert take_indices(4, [-1, 0, 3]) == [0, 3]
    for wrong, said in (
        (5, "the last 5 parts.*it has 4"),
        (0, "last 0"),
        ([4], "part 4.*0 to 3"),
        ([-5], "part -5"),
        ([], "empty"),
    ):
        with pytest.raises(ValueError, match=said):
            take_indices(4, wrong)


def test_what_cannot_be_given() -> None:
    model, tokens, layout = make("stages")
    with pytest.raises(ValueError, match="final norm is 12 wide, and part 0 of the backbone gives 8"):
        model.forward_intermediates(tokens, layout, norm=True)
    with pytest.raises(ValueError, match="'NHWC'; it can be NLC or NCHW"):
        model.forward_intermediates(tokens, layout, output_fmt="NHWC")
    with pytest.raises(ValueError, match="is no grid: take output_fmt NLC, or give the layout"):
        model.forward_intermediates(tokens, None, output_fmt="NCHW", indices=[0])
    text, bytes_, plan = make("parts")
    with pytest.raises(ValueError, match="is no grid: take output_fmt NLC$"):
        text.forward_intermediates(bytes_, plan, output_fmt="NCHW")
    sub = build_model(
        {
            "modality": {**IMAGE, "name": "image_bytes"},
            "head": CLASSES,
            "backbone": {"dim": 8, "depth": 1, "mixers": ["s4d"]},
        }
    )
    codes, cells = sub.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="is a grid of 3 axes"):
        sub.forward_intermediates(codes, cells, output_fmt="NCHW")
    both, codes, plan = make("masked", reversible=True, checkpoint=False)
    with pytest.raises(ValueError, match="reversible backbone keeps nothing"):
        both.forward_intermediates(codes, plan)
