"""Networks of transformers in a backbone: the same numbers as alone, documents by themselves, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from mmlong.backbone import Backbone, BackboneConfig, segmented_loss
from mmlong.backbone.transformers_stack import TransformersStack
from mmlong.layout import Layout
from mmlong.models import build_model

SMALL: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "gpt2": {"num_attention_heads": 2},
    "bert": {"num_attention_heads": 2, "intermediate_size": 32},
}


def make(name: str, **options: Any) -> TransformersStack:
    torch.manual_seed(0)
    return TransformersStack(name, 16, 2, {**SMALL[name], **options}).eval()


@pytest.mark.parametrize("name", SMALL)
def test_it_is_the_network_on_each_document_by_itself(name: str) -> None:
    stack = make(name)
    x = torch.randn(3, 12, 16)
    resets = torch.zeros(3, 12, dtype=torch.bool)
    resets[0, 5] = resets[1, 0] = resets[1, 3] = resets[1, 11] = True  # the last lies in the padding
    layout = Layout(lengths=torch.tensor([12, 9, 0]), resets=resets)
    y, state = stack(x, None, layout)
    assert state is None
    due = x.clone()
    for row, first, end in ((0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 9)):
        due[row, first:end] = stack.net(inputs_embeds=x[row : row + 1, first:end]).last_hidden_state[0]
    torch.testing.assert_close(y, due, rtol=1e-4, atol=1e-5)
    other = x.clone()
    other[1, 9:] = other[2] = 100.0
    assert stack(other, None, layout)[0][:2, :9].equal(y[:2, :9])
    torch.testing.assert_close(stack(x)[0], stack.net(inputs_embeds=x).last_hidden_state)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_trains_through_ragged_rows(name: str) -> None:
    stack = make(name).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    layout = Layout(lengths=torch.tensor([6, 4]))
    stack(x, None, layout)[0][:, :4].square().sum().backward()
    assert all(p.grad is not None for p in stack.parameters())
    assert x.grad is not None
    assert x.grad[1, :4].abs().sum() > 0
    assert not x.grad[1, 4:].any()


def test_in_a_model_that_is_saved_and_loaded(tmp_path: Any) -> None:
    import mmlong

    parts = ["s4d", {"transformers": "mamba", "layers": 2, "config": {"state_size": 4}}]
    model = build_model({
        "modality": {"name": "text"}, "backbone": {"dim": 16, "parts": parts}, "head": {"name": "classify", "num_classes": 2},
    }).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    tokens, layout = model.encode(torch.randint(256, (2, 9), dtype=torch.uint8), torch.tensor([9, 5]))
    assert mmlong.load(tmp_path)(tokens, None, layout)[0].equal(model(tokens, None, layout)[0])


def test_it_neither_streams_nor_says_that_it_does() -> None:
    backbone = Backbone(BackboneConfig(dim=16, parts=["s4d", {"transformers": "mamba", "config": SMALL["mamba"]}]))
    assert not backbone.causal
    assert not backbone.streaming
    with pytest.raises(ValueError, match="transformers: mamba was given a state but has none: it does not stream"):
        make("mamba")(torch.randn(1, 3, 16), {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="stream"):
        segmented_loss(backbone, lambda pieces, state, layout: (pieces[0].sum(), state), [torch.randn(1, 8, 16)], 4)
    config = {
        "modality": {"name": "text"},
        "backbone": {"dim": 16, "parts": backbone.config.parts},
        "head": {},
        "kind": "autoregressive",
    }
    with pytest.raises(ValueError, match="stream"):
        build_model(config)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("mambba", {}, r"no architecture 'mambba' \(did you mean 'mamba'\?\)"),
        ("mamba", {"state_sise": 4}, r"no setting 'state_sise' in config \(did you mean 'state_size'\?\)"),
        ("mamba", {"hidden_size": 4}, "the backbone's dim and the part's layers say it"),
        ("t5", {}, "does not take a sequence of vectors and give one: it is an encoder with a decoder"),
        ("vit", {"num_attention_heads": 2}, "vit does not take a sequence of vectors and give one"),
    ],
    ids=["architecture", "setting", "width", "decoder", "pictures"],
)
def test_what_there_is_not(name: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TransformersStack(name, 16, 1, config)


def test_more_tokens_than_positions() -> None:
    stack = make("gpt2", max_position_embeddings=8)
    stack(torch.randn(1, 16, 16), None, Layout(resets=(torch.arange(16) % 8 == 0)[None]))
    with pytest.raises(
        ValueError, match=r"has 8 positions, and a document here 9 tokens: set config: \{max_position_embeddings: 9\}"
    ):
        stack(torch.randn(1, 9, 16))
    with pytest.raises(ValueError, match="at least 1 layer"):
        TransformersStack("mamba", 16, 0)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mmlong\[transformers\]'"):
        TransformersStack("mamba", 16)
