"""Features of documents: what the head pools, the same whole or piece by piece, of each token where it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.embedding import embed, embed_tokens, features
from mmlong.models import Model, build_model

CLASSES = {"name": "classify", "num_classes": 3}


def make(modality: dict[str, Any], head: dict[str, Any], kind: str = "plain", **backbone: Any) -> Model:
    torch.manual_seed(0)
    config = {"modality": modality, "backbone": {"dim": 8, "depth": 2, "mixers": ["mamba2"], **backbone}, "head": head}
    return build_model(config if kind == "plain" else {**config, "kind": kind})


def text(length: int = 101) -> Tensor:
    return torch.randint(256, (1, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["mean", "attention", {"name": "pma", "seeds": 2}], ids=["mean", "attention", "pma"])
def test_it_is_what_the_head_s_last_layer_sees(pool: Any) -> None:
    model = make({"name": "text"}, {**CLASSES, "pool": pool})
    vector = embed(model, text().split(17, -1))
    model.eval()
    tokens, layout = model.encode(text())
    torch.testing.assert_close(model.get_classifier()(vector)[None], model(tokens, None, layout)[0])
    assert not vector.requires_grad


@pytest.mark.parametrize("kind", ["plain", "autoregressive"])
def test_piece_by_piece_is_the_whole(kind: str) -> None:
    model = make({"name": "text"}, {} if kind == "autoregressive" else CLASSES, kind)
    assert model.streaming
    whole, _ = features(model, [text()])
    seen: list[int] = []
    model.backbone.register_forward_hook(lambda module, given, output: seen.append(given[0].shape[1]))
    pieces, layout = features(model, text().split(10, -1), segment=33)
    assert seen == [33, 33, 33, 2]
    assert layout is not None
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    assert model.training, "left as it was"


def test_poolings_without_weights() -> None:
    model = make({"name": "text"}, {}, "autoregressive")
    x, _ = features(model, [text()])
    for pool, due in (("mean", x[0].mean(0)), ("last", x[0, -1]), ("max", x[0].amax(0))):
        torch.testing.assert_close(embed(model, [text()], pool), due)
    torch.testing.assert_close(embed_tokens(model, [text()]), x[0])


def test_tokens_of_a_picture_stand_where_its_pixels_do() -> None:
    model = make(
        {"name": "image", "size": [4, 8], "order": "morton"}, CLASSES, direction="both", dim=[8, 12], depth=1, pool=[4]
    ).eval()
    picture = torch.randint(256, (1, 1, 4, 8), dtype=torch.uint8)
    tokens, layout = model.encode(picture)
    x, _ = model.forward_features(tokens, None, layout)
    out = model.backbone.layout_out(layout, 32)
    assert out is not None
    found = embed_tokens(model, [picture])
    assert found.shape == (2, 4, 12)
    for place, (row, column) in enumerate(out.coordinates(8)[0].tolist()):
        torch.testing.assert_close(found[row, column], x[0, place])


def test_what_it_refuses() -> None:
    model = make({"name": "text"}, {}, "autoregressive")
    with pytest.raises(
        ValueError,
        match=r"head 'categorical' predicts every token and pools nothing: choose a pool \(mean, last, max\)",
    ):
        embed(model, [text()])
    with pytest.raises(ValueError, match="pool is 'sum'; it can be mean, last, max"):
        embed(model, [text()], "sum")
    for empty in ([], [text(0)]):
        with pytest.raises(ValueError, match="the document is empty"):
            embed(model, empty, "mean")
    with pytest.raises(ValueError, match="segment is at least 1"):
        embed(model, [text()], "mean", 0)
