"""SpaceByte: the paper's rule on bytes, what it does to vectors, the whole contract, and models that hand their bytes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.spacebyte import spacelike
from mmlong.generation import generate
from mmlong.heads import Sampling
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.models import build_model
from mmlong.testing import check_mixer

PARTS: list[Any] = [{"name": "local", "window": 9}, {"spacebyte": "utf8", "dim": 24, "parts": ["attention"]}, "mamba2"]


def bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))[None]


def test_what_is_spacelike() -> None:
    for code in range(256):
        letter_or_digit = code < 128 and chr(code).isalnum()
        assert bool(spacelike(torch.tensor(code))) == (not letter_or_digit and code >> 6 != 0b10)
    assert bool(spacelike(torch.tensor(-1)))


def begun(text: str, before: str = "") -> list[int]:
    """Where chunks begin, found out from where the inner parts change anything."""
    torch.manual_seed(0)
    made = Backbone(BackboneConfig(dim=8, parts=[{"spacebyte": "utf8", "dim": 8, "parts": ["mamba2"]}])).double()
    codes = bytes_of(before + text)
    x = torch.randn(1, codes.shape[1], 8, dtype=torch.float64)
    y, _ = made.parts()[0](x, None, Layout(codes=codes))
    return (y - x)[0].abs().sum(-1).nonzero().flatten().tolist()


def test_where_chunks_begin() -> None:
    # After the first byte, at the first of several spacelike bytes, and at the byte that leads a character of several.
    assert begun("ab, c.d") == [0, 2, 5]
    assert begun("x = 1\n\n  y") == [0, 1, 5]
    assert begun("né日本") == [0, 1, 3, 6]
    assert begun(" a b") == [0, 2]


def test_is_its_definition() -> None:
    torch.manual_seed(0)
    one: Any = Backbone(
        BackboneConfig(dim=8, parts=[{"spacebyte": "utf8", "dim": 12, "parts": ["attention"]}])
    ).parts()[0]
    one.double()
    codes = bytes_of("To be, or not to be: that is")
    x = torch.randn(1, codes.shape[1], 8, dtype=torch.float64)
    code = [-1, *codes[0, :-1].tolist()]
    places = [
        0,
        *[
            t
            for t in range(2, len(code))
            if spacelike(torch.tensor(code[t])) and not spacelike(torch.tensor(code[t - 1]))
        ],
    ]
    c, _ = one.inner(torch.cat([torch.zeros(1, len(places), 4), x[:, places]], -1))
    want = x.clone()
    want[:, places] += c[..., 4:]
    got, _ = one(x, None, Layout(codes=torch.tensor(code)[None]))
    torch.testing.assert_close(got, want)
    assert [chr(code[t]) for t in places[1:]] == [" ", ",", " ", " ", " ", ":", " "]


class Told(nn.Module):
    """A backbone whose tokens' codes are read off their first channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = Backbone(BackboneConfig(dim=dim, parts=PARTS[1:2], ffn="none"))
        self.causal, self.streaming = self.inner.causal, self.inner.streaming

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
        codes = torch.where(x[..., 0] > 0.4, 32, 97)
        return self.inner(x, state, replace(layout or Layout(), codes=codes))


def test_the_contract() -> None:
    traits = Traits(paper="of the house", state="growing")
    kept = ["manners", "rows", "causality", "pieces", "padding", "resets", "gradients", "segments", "bfloat16"]
    assert check_mixer(Told, traits=traits, dims=(16,), only=kept, probed=31)


def model(parts: list[Any] = PARTS, **options: Any) -> Any:
    torch.manual_seed(0)
    backbone = {"dim": 16, "parts": parts}
    return build_model(
        {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": backbone, **options}
    ).double()


def test_a_model_hands_its_bytes_on() -> None:
    m = model().eval()
    text = "One, two and 3... über; more"
    tokens = torch.cat([bytes_of(text), bytes_of(text)[:, torch.randperm(len(text.encode()))]])
    whole, last = m(tokens)
    L = tokens.shape[1]
    for size in (1, 5):
        state, parts = None, []
        for a in range(0, L, size):
            y, state = m(tokens[:, a : a + size], state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state["code"].tolist() == last["code"].tolist() == tokens[:, -1:].tolist()
    # Documents are models of their own, and padding changes nothing.
    resets = torch.zeros(2, L, dtype=torch.bool)
    resets[0, 7], resets[1, 1] = True, True
    lengths = torch.tensor([L, 20])
    packed, _ = m(tokens, None, Layout(lengths=lengths, resets=resets))
    torch.testing.assert_close(packed[:1, 7:], m(tokens[:1, 7:])[0])
    torch.testing.assert_close(packed[1:, 1:20], m(tokens[1:, 1:20])[0])
    half, state = m(tokens[:, :11], None, Layout(lengths=lengths, resets=resets).slice(0, 11))
    rest, _ = m(tokens[:, 11:], state, Layout(lengths=lengths, resets=resets).slice(11, L))
    torch.testing.assert_close(torch.cat([half, rest], 1)[1, :20], packed[1, :20])


def test_generates_what_it_predicts() -> None:
    m = model()
    with torch.no_grad():
        # Most likely a space or a letter, so that words come.
        m.head.linear.bias[[32, 46, 97, 98]] += 0.5
    tokens = generate(m, 60, bytes_of("be ").expand(2, -1), sampling=Sampling(temperature=0)).clone()
    with torch.no_grad():
        prediction, _ = m.eval()(tokens)
    assert prediction.argmax(-1)[:, 3:].tolist() == tokens[:, 3:].tolist()
    assert m.state_before(tokens, 5)["code"].tolist() == tokens[:, 4:5].tolist()


def test_what_is_refused() -> None:
    backbone = {"dim": 16, "parts": PARTS}
    for modality in ({"name": "genome"}, {"name": "audio", "rate": 8000}):
        with pytest.raises(ValueError, match="reads the codes of text"):
            build_model({"kind": "autoregressive", "modality": modality, "backbone": backbone})
    with pytest.raises(ValueError, match="was not told"):
        Backbone(BackboneConfig(**backbone))(torch.randn(1, 5, 16))
    with pytest.raises(ValueError, match="was not told"):
        model([{"pool": 2, "parts": PARTS}])(bytes_of("some"))
    for options, message in (
        ({"spacebyte": "utf8", "dim": 8}, "at least as wide"),
        ({"spacebyte": "words"}, "rule is utf8, or"),
        ({"spacebyte": []}, "rule is utf8, or"),
    ):
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=16, parts=[{"parts": ["mamba2"], **options}]))
    with pytest.raises(ValueError, match="of causal parts"):
        Backbone(BackboneConfig(dim=16, parts=PARTS, direction="both"))


def test_codes_of_other_modalities() -> None:
    """A list of codes in place of the rule: chunks of a genome begin at every C."""
    m = build_model({
        "kind": "autoregressive", "modality": {"name": "genome"},
        "backbone": {"dim": 16, "parts": [{"spacebyte": [1], "parts": ["mamba2"]}]},
    }).eval()  # fmt: skip
    tokens = torch.randint(0, 4, (2, 31))
    whole, _ = m(tokens)
    first, state = m(tokens[:, :14])
    torch.testing.assert_close(torch.cat([first, m(tokens[:, 14:], state)[0]], 1), whole, rtol=1e-4, atol=1e-5)


def test_a_layout_moves_its_codes() -> None:
    layout = Layout(codes=torch.arange(6)[None].expand(2, -1).contiguous(), lengths=torch.tensor([6, 4]))
    assert layout.slice(1, 3).codes.tolist() == [[1, 2], [1, 2]]
    assert layout.flip(6).codes.tolist() == [[5, 4, 3, 2, 1, 0], [3, 2, 1, 0, 4, 5]]
    assert layout.pool(2, 6).codes is None
    assert replace(layout, lengths=None).permute(torch.tensor([2, 0, 1, 3, 5, 4])).codes[0].tolist() == [
        2,
        0,
        1,
        3,
        5,
        4,
    ]
    with pytest.raises(ValueError, match=r"layout\.codes is"):
        layout.check(2, 5)
    with pytest.raises(ValueError, match="codes must be int64"):
        Layout(codes=torch.zeros(2, 3))
