"""Learned tokens, soft blocks and pooled queries: the contract of parts that see both sides, and each written out document by document."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.layout import Layout
from mmlong.mixers import Traits
from mmlong.ops.rotary import rotary_reference
from mmlong.testing import check_mixer

KEPT = ("manners", "rows", "both sides", "padding", "resets", "gradients", "bfloat16", "state_dict")
TRAITS = Traits(paper="of the house", causal=False, bidirectional=True, streaming=False, state="none")
INNER: dict[str, Any] = {"name": "attention", "heads": 2}

FORMS: dict[str, dict[str, Any]] = {
    "token_learner": {"token_learner": 3, "hidden": 6, "parts": [INNER]},
    "charformer": {"charformer": 3, "blocks": 4, "dim": 24, "parts": [INNER]},
    "charformer, consensus": {
        "charformer": 2,
        "blocks": 3,
        "consensus": True,
        "conv": 0,
        "residual": False,
        "parts": [INNER],
    },
    "funnel": {"funnel": 2, "heads": 2, "parts": [INNER]},
    "funnels": {"funnel": 2, "heads": 2, "parts": [{"funnel": 3, "heads": 2, "residual": False, "parts": [INNER]}]},
}


def build(name: str, dim: int = 16) -> Any:
    torch.manual_seed(0)
    made = Backbone(BackboneConfig(dim=dim, parts=[FORMS[name]], direction="both"))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.double().eval().parts()[0]


# The others are made of the same, and written out below.
@pytest.mark.parametrize("name", ["token_learner", "charformer, consensus", "funnel"])
def test_the_contract(name: str) -> None:
    def make(dim: int) -> nn.Module:
        return Backbone(BackboneConfig(dim=dim, parts=[FORMS[name]], direction="both", ffn="none"))

    assert check_mixer(make, traits=TRAITS, dims=(16,), only=KEPT, probed=63)


def norm(x: Tensor, p: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + p.eps).sqrt() * p.weight + p.bias


def shares(m: Any, x: Tensor) -> Tensor:
    h = norm(x, m[0]) @ m[1].weight.T + m[1].bias
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return h @ m[3].weight.T + m[3].bias


def learned(one: Any, x: Tensor) -> Tensor:
    a = shares(one.learn, x)
    z = torch.stack([sum(a[:, s].softmax(0)[t] * x[t] for t in range(len(x))) for s in range(a.shape[1])])
    z = norm(one.inner(z[None])[0][0], one.norm_learned)
    mixed = torch.stack(
        [sum(one.mix.weight[s, r] * z[r] for r in range(len(z))) + one.mix.bias[s] for s in range(len(z))]
    )
    return x + torch.sigmoid(shares(one.fuse, x)) @ norm(mixed, one.norm_mixed)


def soft_blocks(one: Any, x: Tensor) -> Tensor:
    T, h = len(x), x
    if one.conv is not None:
        w = one.conv.weight
        reach = w.shape[2] // 2
        h = torch.stack([
            one.conv.bias + sum(w[:, :, n] @ x[t + n - reach] for n in range(w.shape[2]) if 0 <= t + n - reach < T)
            for t in range(T)
        ])  # fmt: skip
    block = [[h[t // b * b : t // b * b + b].mean(0) for t in range(T)] for b in range(1, one.blocks + 1)]
    p = torch.stack([torch.cat([one.score(block[b][t]) for b in range(one.blocks)]).softmax(0) for t in range(T)])
    if one.consensus:
        p = (p @ p.T).softmax(-1) @ p
    mixed = torch.stack([sum(p[t, b] * block[b][t] for b in range(one.blocks)) for t in range(T)])
    d = one.ratio
    c = torch.stack([mixed[g : g + d].mean(0) for g in range(0, T, d)])
    z = one.lengthen(one.inner(one.shorten(c)[None])[0][0])
    y = torch.stack([z[t // d] for t in range(T)])
    return x + y if one.residual else y


def funnelled(one: Any, x: Tensor) -> Tensor:
    T, k, read = len(x), one.k, one.read
    pooled = torch.stack([x[g : g + k].mean(0) for g in range(0, T, k)])
    asked, known = norm(pooled, read.norm_queries), norm(x, read.norm_source)
    q, keys, v = (
        p(t).view(len(t), read.heads, -1) for p, t in ((read.q_proj, asked), (read.k_proj, known), (read.v_proj, known))
    )
    q = rotary_reference(q[None], torch.arange(0, T, k))[0]
    keys = rotary_reference(keys[None], torch.arange(T))[0]
    weights = (torch.einsum("ihd,jhd->hij", q, keys) / q.shape[-1] ** 0.5).softmax(-1)
    h = pooled + read.out_proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    z = one.inner((h + read.ffn(norm(h, read.norm)))[None])[0][0]
    y = torch.stack([z[t // k] for t in range(T)])
    return x + y if one.residual else y


@pytest.mark.parametrize("name", FORMS)
def test_each_document_is_its_definition(name: str) -> None:
    one = build(name)
    definition = {"token": learned, "char": soft_blocks, "funne": funnelled}
    written = next(f for key, f in definition.items() if name.startswith(key))
    resets = torch.zeros(3, 37, dtype=torch.bool)
    for row, position in ((0, 10), (0, 11), (1, 19), (1, 25), (2, 4)):
        resets[row, position] = True
    x = torch.randn(3, 37, 16, dtype=torch.float64)
    x[1, 20:], x[2] = torch.nan, torch.inf
    got, state = one(x, None, Layout(lengths=torch.tensor([37, 20, 0]), resets=resets))
    assert state is None
    assert got.isfinite().all()
    for row, edges in enumerate([[0, 10, 11, 37], [0, 19, 20]]):
        for a, b in itertools.pairwise(edges):
            torch.testing.assert_close(got[row, a:b], written(one, x[row, a:b]))
    # Padding alone, and full rows.
    padded = one(x, None, Layout(lengths=torch.tensor([37, 20, 0])))[0]
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[1, :20], written(one, x[1, :20]))
    torch.testing.assert_close(one(x[:1])[0][0], written(one, x[0]))


@pytest.mark.parametrize("consensus", [False, True])
def test_soft_blocks_are_those_of_charformer_pytorch(consensus: bool) -> None:
    """Without its convolution, which pads to one side, and at a length that all its blocks divide, as it needs."""
    code = pytest.importorskip("charformer_pytorch")
    torch.manual_seed(0)
    theirs = code.GBST(
        num_tokens=50, dim=16, max_block_size=4, downsample_factor=3, score_consensus_attn=consensus
    ).double()
    theirs.pos_conv = nn.Identity()
    spec = {"charformer": 3, "blocks": 4, "conv": 0, "consensus": consensus, "parts": [INNER]}
    one: Any = Backbone(BackboneConfig(dim=16, parts=[spec], direction="both")).double().parts()[0]
    one.score.load_state_dict(theirs.score_fn[0].state_dict())
    tokens, valid = torch.randint(50, (2, 48)), torch.arange(48) < torch.tensor([48, 17])[:, None]
    x = theirs.token_emb(tokens)
    torch.testing.assert_close(one.mixed(x, None), theirs(tokens)[0])
    got, (want, there) = one.mixed(torch.where(valid[..., None], x, 0), valid), theirs(tokens, mask=valid)
    torch.testing.assert_close(got[there], want[there])


def test_two_funnels_are_up_sampled_as_in_the_paper() -> None:
    """Tokens get what the shortest stage has, six of them the same, and the residual of the longest alone."""
    one = build("funnels")
    x = torch.randn(1, 25, 16, dtype=torch.float64)
    added = (one(x)[0] - x)[0]
    for t in range(25):
        torch.testing.assert_close(added[t], added[t // 6 * 6])


def test_what_they_do_not_go_with() -> None:
    for name, options, direction, message in (
        ("token_learner", {}, "causal", "TokenLearner shows every token both sides"),
        ("charformer", {}, "causal", "Charformer shows every token both sides"),
        ("funnel", {}, "causal", "Funnel shows every token both sides"),
        ("token_learner", {"token_learner": 0}, "both", "at least 1 token"),
        ("charformer", {"conv": 4}, "both", "odd number"),
        ("charformer", {"blocks": 0}, "both", "blocks of at least 1"),
        ("funnel", {"funnel": 1}, "both", "at least 2 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Backbone(BackboneConfig(dim=16, parts=[{**FORMS[name], **options}], direction=direction))
