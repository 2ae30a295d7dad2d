"""Masked joint models: what is hidden plays no part and all else does, one modality is a masked model, rows are apart, and what is saved comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmlong.models import JointMaskedModel, Spans, build_model, load_model, save_model

SIZE = [3, 5]
PIXELS = 15
BACKBONE = {"dim": 16, "depth": 2, "mixers": ["mamba2"], "direction": "alternate"}
CONFIG: dict[str, Any] = {
    "kind": "joint_masked",
    "modalities": {
        "picture": {"name": "image", "size": SIZE, "channels": 3, "order": "raster"},
        "words": {"name": "text"},
    },
    "backbone": BACKBONE,
    "orders": [["picture", "words"], ["words", "picture"]],
}


def model(**changes: Any) -> JointMaskedModel:
    torch.manual_seed(0)
    built = build_model({**CONFIG, **changes})
    assert isinstance(built, JointMaskedModel)
    with torch.no_grad():  # trained vectors are not small: an error must not hide
        for voice in built.voices.values():
            voice.mask.mul_(30)
            voice.mark.mul_(30)
    return built.eval().double()


def rows(module: JointMaskedModel, seed: int = 0) -> tuple[Spans, Any]:
    draw = torch.Generator().manual_seed(seed)
    raw = {
        "picture": torch.randint(256, (3, 3, *SIZE), dtype=torch.uint8, generator=draw),
        "words": torch.randint(256, (3, 7), dtype=torch.uint8, generator=draw),
    }
    orders = [module.orders[1], module.orders[0], module.orders[1]]
    return module.encode(raw, {"words": torch.tensor([7, 1, 4])}, orders)


@torch.no_grad()
def predicted(module: JointMaskedModel, spans: Spans, layout: Any, hidden: torch.Tensor | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    return module(spans, None, layout, hidden)[0]


def test_what_is_hidden_plays_no_part_and_all_else_does() -> None:
    module = model()
    spans, layout = rows(module)
    other, _ = rows(module, seed=1)
    hidden = (torch.rand(spans.kind.shape, generator=torch.Generator().manual_seed(2)) < 0.4) & (spans.kind >= 0)
    mixed = {}
    for name, tokens in spans.tokens.items():
        where = hidden if tokens.ndim == 2 else hidden[..., None]
        mixed[name] = torch.where(where, other.tokens[name], tokens)
    changed = Spans(spans.kind, spans.index, mixed)
    one, two = predicted(module, spans, layout, hidden), predicted(module, changed, layout, hidden)
    for name in module.names:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    shown = predicted(module, changed, layout)
    plain = predicted(module, spans, layout)
    assert not torch.allclose(shown["words"], plain["words"])
    nothing = predicted(module, spans, layout, torch.zeros_like(hidden))
    torch.testing.assert_close(nothing["picture"], plain["picture"], rtol=0, atol=0)


@pytest.mark.parametrize(("row", "words_first"), [(0, True), (1, False)])
def test_each_modality_sees_the_other_on_either_side(row: int, words_first: bool) -> None:
    """The picture from words before it and behind it, and the words from the picture."""
    module = model()
    spans, layout = rows(module)
    tokens = spans.tokens["words"].clone()
    at = 0 if words_first else PIXELS
    assert int(spans.kind[row, at]) == module.names.index("words")
    tokens[row, at] = (tokens[row, at] + 1) % 256
    changed = Spans(spans.kind, spans.index, {**spans.tokens, "words": tokens})
    one, two = predicted(module, spans, layout), predicted(module, changed, layout)
    mine = spans.where("picture")[0] == row
    assert (one["picture"][0, mine] - two["picture"][0, mine]).abs().max() > 1e-6
    torch.testing.assert_close(one["picture"][0, ~mine], two["picture"][0, ~mine], rtol=0, atol=0)


def test_rows_are_as_they_are_alone() -> None:
    """Padding and neighbours change nothing."""
    module = model()
    spans, layout = rows(module)
    together = predicted(module, spans, layout)
    for row, length in enumerate(layout.lengths.tolist()):
        one = Spans.of([t[row : row + 1, :length] for t in spans.tensors()], module.names)
        alone = predicted(module, one, None)
        for name in module.names:
            mine = spans.where(name)[0] == row
            torch.testing.assert_close(together[name][0, mine], alone[name][0])


def test_one_modality_is_a_masked_model() -> None:
    module = model(modalities={"words": {"name": "text"}}, orders=None)
    other: Any = build_model({"kind": "masked", "modality": {"name": "text"}, "backbone": BACKBONE})
    other = other.double().eval()
    with torch.no_grad():
        module.voices["words"].mark.zero_()
    mine = {key.removeprefix("voices.words."): value for key, value in module.state_dict().items()}
    del mine["mark"]
    other.load_state_dict(mine)
    words = torch.randint(256, (3, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([7, 3, 5])
    hidden = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    spans, layout = module.encode({"words": words}, {"words": lengths})
    tokens, plain = other.encode(words, lengths)
    with torch.no_grad():
        wanted, _ = other(tokens, None, plain, hidden)
    torch.testing.assert_close(predicted(module, spans, layout, hidden)["words"][0], wanted[plain.valid(7)])


def test_the_mark_tells_modalities_apart() -> None:
    """Two modalities of the same codes at the same places differ only by it."""
    twice = {"a": {"name": "text"}, "b": {"name": "text"}}
    module = model(modalities=twice, orders=[["a"], ["b"]])
    with torch.no_grad():
        for part in ("modality", "head"):
            getattr(module.voices["b"], part).load_state_dict(getattr(module.voices["a"], part).state_dict())
        module.voices["b"].mask.copy_(module.voices["a"].mask)
    raw = torch.arange(5, dtype=torch.uint8)[None]
    one = predicted(module, *module.encode({"a": raw}, None, [["a"]]))["a"]
    two = predicted(module, *module.encode({"b": raw}, None, [["b"]]))["b"]
    assert not torch.allclose(one, two)
    with torch.no_grad():
        module.voices["b"].mark.copy_(module.voices["a"].mark)
    torch.testing.assert_close(predicted(module, *module.encode({"b": raw}, None, [["b"]]))["b"], one)


def test_a_batch_of_one_modality_gives_every_parameter_a_gradient() -> None:
    """DDP waits for all of them; those of a modality that is not there are zero."""
    module = model().train()
    spans, layout = module.encode({"words": torch.randint(256, (2, 5), dtype=torch.uint8)})
    hidden = torch.arange(5) % 2 == 0
    prediction, _ = module(spans, None, layout, hidden.expand(2, -1))
    sum(p.square().sum() for p in prediction.values()).backward()  # type: ignore[union-attr]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not name.startswith("voices.picture") or not parameter.grad.any(), name
    assert module.voices["words"].mask.grad.any()


def test_saved_and_loaded(tmp_path: Path) -> None:
    module = model().float()
    save_model(module, tmp_path)
    again = load_model(tmp_path).eval()
    assert isinstance(again, JointMaskedModel)
    assert again.config == module.config
    assert again.config["heads"]["picture"]["name"] == "regress_tokens"
    spans, layout = rows(module)
    for name, found in predicted(again, spans, layout, spans.kind == 1).items():
        assert torch.equal(found, predicted(module, spans, layout, spans.kind == 1)[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"dim": 16, "depth": 1}}, "sees the past only"),
        ({"backbone": {"dim": [8, 8], "depth": [1, 1], "pool": [4], "direction": "both"}}, "predicts every token"),
        ({"modalities": {}}, "at least one modality"),
        ({"orders": [["picture", "word"]]}, "orders has 'word'"),
        ({"heads": {"words": {"name": "classify", "num_classes": 3}}}, "predicts one thing a sequence"),
        ({"linear_prediction": {"picture": [1]}}, "has no part 'linear_prediction'"),
        ({"backbone": {**BACKBONE, "mixers": ["image_local_2d"]}}, "reads a grid"),
    ],
    ids=["causal", "pool", "none", "order", "head", "part", "grid"],
)
def test_what_cannot_be_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build_model({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("kind", "direction"), [("joint", "causal"), ("joint_masked", "alternate"), ("towers", "both")]
)
def test_a_stem_is_a_stem_whatever_its_name(kind: str, direction: str) -> None:
    """Layer decay goes from stem to head, and a name may have a hyphen."""
    from timm.models import group_parameters

    named = {"left-ear": {"name": "text"}, "word": {"name": "text"}}
    built = build_model({"kind": kind, "modalities": named, "backbone": {**BACKBONE, "direction": direction}})
    layers = group_parameters(built, built.group_matcher(), reverse=True)
    depth = {name: layer for name, layer in layers.items() if ".modality." in name}
    assert {name.split(".")[1] for name in depth} == set(named)
    assert set(depth.values()) == {0}
