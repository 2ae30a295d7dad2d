"""Latents: the contract of a part that gives tokens back, what comes out where it does not, and both against transformers' Perceiver with its weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.models import Model
from mmlong.models.masked import MaskedModel
from mmlong.testing import check_mixer

KEPT = ("manners", "rows", "both sides", "padding", "resets", "gradients", "bfloat16", "state_dict")
INNER: dict[str, Any] = {"name": "attention", "heads": 2, "positions": "none", "bias": True}
TRAITS = Traits(paper="of the house", causal=False, bidirectional=True, streaming=False, state="none")

FORMS: dict[str, list[Any]] = {
    "once": [{"perceiver_io": 5, "heads": 2, "parts": ["attention"]}],
    "three reads": [{"perceiver_io": 5, "dim": 24, "reads": 3, "parts": [INNER]}],
    "own widths, learned queries": [
        {
            "perceiver_io": 5,
            "heads": 2,
            "dim": 24,
            "qk_dim": 8,
            "v_dim": 12,
            "queries": 400,
            "residual": False,
            "ask": {"heads": 4, "qk_dim": 16, "v_dim": 20, "ratio": 2.0},
            "parts": [{**INNER, "value_dim": 5}],
        },
    ],
    "between others": [
        INNER,
        {"perceiver_io": 3, "reads": 2, "share": False, "residual": False, "parts": [INNER]},
    ],
}


def build(parts: list[Any], dim: int = 16, **config: Any) -> Backbone:
    torch.manual_seed(0)
    made = Backbone(BackboneConfig(**{"dim": dim, "parts": parts, "direction": "both", **config}))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.double().eval()


@pytest.mark.parametrize("name", ["once", "between others", "own widths, learned queries"])
def test_the_contract(name: str) -> None:
    def make(dim: int) -> nn.Module:
        return Backbone(BackboneConfig(dim=dim, parts=FORMS[name], direction="both", ffn="none"))

    assert check_mixer(make, traits=TRAITS, dims=(16,), only=KEPT, probed=63)


def by_torch(read: Any, q: Tensor, x: Tensor) -> Tensor:
    """``CrossRead`` of one document by torch's own layers."""
    asked, known = read.norm_queries(q), read.norm_source(x)
    found, _ = nn.functional.multi_head_attention_forward(
        asked[:, None], known[:, None], known[:, None], q.shape[1], read.heads, None,
        torch.cat([read.q_proj.bias, read.k_proj.bias, read.v_proj.bias]), None, None, False, 0.0,
        read.out_proj.weight, read.out_proj.bias, use_separate_proj_weight=True, q_proj_weight=read.q_proj.weight,
        k_proj_weight=read.k_proj.weight, v_proj_weight=read.v_proj.weight,
    )  # fmt: skip
    z = found[:, 0] + (q if read.residual else 0)
    return z + read.ffn(read.norm(z))


@pytest.mark.parametrize(("reads", "share", "residual"), [(1, True, True), (3, True, False), (3, False, True)])
def test_each_document_is_its_definition(reads: int, share: bool, residual: bool) -> None:
    """Padded and packed rows, document by document."""
    spec = {"perceiver_io": 5, "dim": 8, "heads": 2, "reads": reads, "share": share, "residual": residual}
    one: Any = build([{**spec, "parts": [INNER]}]).parts()[0]
    assert len(one.read) == (min(reads, 2) if share else reads)
    lengths, cuts = [37, 20, 0], [[0, 10, 11, 37], [0, 19, 20], [0]]
    resets = torch.zeros(3, 37, dtype=torch.bool)
    for row, position in ((0, 10), (0, 11), (1, 19), (1, 25), (2, 4)):
        resets[row, position] = True
    x = torch.randn(3, 37, 16, dtype=torch.float64)
    x[1, 20:], x[2] = torch.nan, torch.inf
    got, state = one(x, None, Layout(lengths=torch.tensor(lengths), resets=resets))
    assert state is None
    assert got.isfinite().all()
    for row, edges in enumerate(cuts):
        for a, b in itertools.pairwise(edges):
            z = one.latents
            for r in range(reads):
                z = by_torch(one.read[min(r, 1) if share else r], z, x[row, a:b])
                z = one.inner(z[None])[0][0]
            torch.testing.assert_close(got[row, a:b], by_torch(one.ask, x[row, a:b], z))


def copied(read: Any, theirs: Any) -> None:
    """The weights of a PerceiverLayer."""
    attention = theirs.attention
    pairs = {
        "norm_queries": attention.self.layernorm1, "norm_source": attention.self.layernorm2, "norm": theirs.layernorm,
        "q_proj": attention.self.query, "k_proj": attention.self.key, "v_proj": attention.self.value,
        "out_proj": attention.output.dense, "ffn.0": theirs.mlp.dense1, "ffn.2": theirs.mlp.dense2,
    }  # fmt: skip
    for name, module in pairs.items():
        read.get_submodule(name).load_state_dict(module.state_dict())


@pytest.mark.parametrize("padded", [False, True])
def test_against_transformers(padded: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.models.perceiver import PerceiverConfig
    from transformers.models.perceiver.modeling_perceiver import PerceiverLayer, PerceiverModel

    torch.manual_seed(0)
    config = PerceiverConfig(
        num_latents=5, d_latents=24, d_model=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=3,
        num_cross_attention_heads=2, cross_attention_shape_for_attention="q", attention_probs_dropout_prob=0.0,
        cross_attention_widening_factor=2, self_attention_widening_factor=2,
    )  # fmt: skip
    theirs = PerceiverModel(config).double().eval()
    decoder = PerceiverLayer(
        config, is_cross_attention=True, qk_channels=16, v_channels=16, num_heads=2, q_dim=16, kv_dim=24,
        widening_factor=2, use_query_residual=True,
    ).double()  # fmt: skip
    options = {"dim": 24, "heads": 2, "ratio": 2.0, "reads": 1}
    latent = {"name": "attention", "heads": 3, "positions": "none", "bias": True, "repeat": 2}
    made = [
        build([{name: 5, **options, "parts": [latent]}], ffn="mlp", ffn_ratio=2.0)
        for name in ("perceiver", "perceiver_io")
    ]
    for backbone in made:
        one: Any = backbone.parts()[0]
        one.latents.data = theirs.embeddings.latents.data
        copied(one.read[0], theirs.encoder.cross_attention)
        for block, layer in zip(one.inner.parts, theirs.encoder.self_attends, strict=True):
            own = layer.attention.self
            pairs = (
                (block.norm1, own.layernorm1), (block.norm2, layer.layernorm), (block.mixer.q_proj, own.query),
                (block.mixer.k_proj, own.key), (block.mixer.v_proj, own.value),
                (block.mixer.out_proj, layer.attention.output.dense), (block.ffn[0], layer.mlp.dense1),
                (block.ffn[2], layer.mlp.dense2),
            )  # fmt: skip
            for mine, module in pairs:
                mine.load_state_dict(module.state_dict())
    last: Any = made[1].parts()[0]
    last.ask = type(last.ask)(16, 24, 2, 2.0).double()
    copied(last.ask, decoder)
    x = torch.randn(3, 63, 16, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([63, 20, 1]) if padded else torch.tensor([63, 63, 63])
    valid = torch.arange(63) < lengths[:, None]
    want = theirs(inputs=x, attention_mask=valid.double()).last_hidden_state
    layout = Layout(lengths=lengths) if padded else None
    got = made[0].parts()[0](x, None, layout)[0]
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    slopes = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*slopes)
    want = decoder(x, inputs=theirs(inputs=x, attention_mask=valid.double()).last_hidden_state)[0]
    torch.testing.assert_close(last(x, None, layout)[0][valid], want[valid])


def test_latents_come_out_and_a_head_pools_them() -> None:
    parts = ["attention", {"perceiver": 6, "dim": 24, "reads": 3, "parts": ["attention"]}]
    config = {
        "modality": {"name": "text"},
        "backbone": {"dim": 16, "parts": parts, "direction": "both"},
        "head": {"name": "classify", "num_classes": 3},
    }
    torch.manual_seed(0)
    model = Model(config).double().eval()
    assert (model.backbone.tokens_out, model.num_features, model.backbone.per_token) == (6, 24, False)
    tokens = torch.randint(256, (2, 41))
    features, state = model.forward_features(tokens)
    assert state is None
    assert features.shape == (2, 6, 24)
    padded = Layout(lengths=torch.tensor([41, 17]))
    scores = model(tokens, None, padded)[0]
    torch.testing.assert_close(scores[1:], model(tokens[1:, :17])[0])
    torch.testing.assert_close(scores[:1], model.head.linear(features[:1].mean(1)))
    with pytest.raises(ValueError, match="one document a row"):
        model(tokens, None, Layout(resets=torch.zeros(2, 41, dtype=torch.bool)))
    with pytest.raises(ValueError, match="predicts every token, and this backbone makes 6 of them all"):
        MaskedModel({**config, "head": {"name": "categorical"}})
    # A head that reads every position knows how many latents there are, whatever the length.
    readout = Model({**config, "head": {"name": "readout", "num_classes": 3}}).double()
    assert readout.head.tokens == 6
    assert readout(tokens)[0].shape == (2, 3)


def test_what_it_does_not_go_with() -> None:
    inner: dict[str, Any] = {"parts": ["attention"]}
    for parts, direction, message in (
        ([{"perceiver_io": 4, **inner}], "causal", "PerceiverIO shows every token both sides.*direction to both"),
        ([{"perceiver": 4, **inner}], "causal", "Perceiver shows every token both sides"),
        ([{"perceiver_io": 0, **inner}], "both", "at least 1 latent"),
        ([{"perceiver_io": 4, "reads": 0, **inner}], "both", "1 read, got 4 and 0"),
        ([{"perceiver_io": 4, "heads": 5, **inner}], "both", "does not divide into 5 heads"),
        (
            [{"perceiver_io": 4, "heads": 2, "v_dim": 7, **inner}],
            "both",
            "values of 7 channels do not divide into 2 heads",
        ),
        ([{"perceiver_io": 4, "queries": 0, **inner}], "both", "queries must be at least 1"),
        ([{"perceiver_io": 4, "ask": {"qkdim": 4}, **inner}], "both", r"no option 'qkdim' \(did you mean 'qk_dim'\?\)"),
        ([{"perceiver": 4, **inner}, "attention"], "both", "stands last"),
        ([{"within": 4, "parts": [{"perceiver": 4, **inner}]}], "both", "stands last in a backbone, not in a part"),
    ):
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=16, parts=parts, direction=direction))
    with pytest.raises(ValueError, match="has none"):
        build([{"perceiver_io": 4, **inner}]).parts()[0](torch.zeros(1, 3, 16), ())
    with pytest.raises(ValueError, match="has learned 3 queries, and a document has 4 tokens"):
        build([{"perceiver_io": 4, "queries": 3, **inner}]).parts()[0](torch.zeros(1, 4, 16, dtype=torch.float64))
