"""Transformer-LS against its definition, and against long-short-transformer where the two are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes
from mmlong.ops.rotary import rotary_reference


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = create_mixer("long_short", dim, **options).double()
    with torch.no_grad():
        for norm in (m.local_norm, m.global_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    return m


def by_hand(m: Any, x: Tensor) -> Tensor:
    """Token by token, over the keys that it has, one after the other."""
    B, L, _ = x.shape
    H, d, r, w = m.heads, m.head_dim, m.rank, m.window
    raw = [p(x) for p in (m.q_proj, m.k_proj, m.v_proj)]
    scores = (x @ m.score_proj.weight.T).view(B, L, H, r)
    short = [F.layer_norm(t, (H * d,), m.local_norm.weight, m.local_norm.bias, m.local_norm.eps) for t in raw[1:]]
    q, k, v = (t.view(B, L, H, d) for t in (raw[0], *short))
    turned = [rotary_reference(t, torch.arange(L), m.rope_base) if m.rope else t for t in (q, k)]

    def projected(t: Tensor, a: int, b: int) -> list[Tensor]:
        """r keys ``(B, H, d)`` of the tokens a..b-1."""
        found = []
        for n in range(r):
            weights = scores[:, a:b, :, n].softmax(1)[..., None]
            long = (weights * t.view(B, L, H, d)[:, a:b]).sum(1).flatten(1)
            normed = F.layer_norm(long, (H * d,), m.global_norm.weight, m.global_norm.bias, m.local_norm.eps)
            found.append(normed.view(B, H, d))
        return found

    rows = []
    for t in range(L):
        if m.causal:
            near = range(max(0, t - w + 1), t + 1)
            spans = [(s * m.segment, (s + 1) * m.segment) for s in range(t // m.segment)]
        else:
            begin = t // w * w
            near = range(max(0, begin - w // 2), min(L, begin + w + w // 2))
            spans = [(0, L)]
        keys = [(turned[0][:, t], turned[1][:, j], v[:, j]) for j in near]
        for a, b in spans:
            keys += [(q[:, t], key, value) for key, value in zip(*(projected(u, a, b) for u in raw[1:]), strict=True)]
        weights = torch.stack([(a * b).sum(-1) / d**0.5 for a, b, _ in keys], -1).softmax(-1)
        rows.append((weights[..., None] * torch.stack([c for _, _, c in keys], 2)).sum(2).flatten(1))
    return m.out_proj(torch.stack(rows, 1))


CASES = [
    (37, {"causal": True, "window": 5, "segment": 4, "rank": 2, "rope": False}),
    (37, {"causal": True, "window": 1, "segment": 3}),
    (16, {"causal": True, "window": 40, "segment": 8}),
    (37, {"causal": False, "window": 6, "rank": 3}),
    (20, {"causal": False, "window": 5, "rank": 1, "rope": False, "bias": True}),
]


@pytest.mark.parametrize(("length", "options"), CASES)
@pytest.mark.oracle("definition: token by token", "long_short")
def test_against_the_definition(same_as: Any, length: int, options: dict[str, Any]) -> None:
    m = build(12, heads=2, **options)
    x = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_hand(m, x), None))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [16, 31])
@pytest.mark.oracle("long-short-transformer: LongShortAttention, one head, one window", "long_short")
def test_against_long_short_transformer(held: Any, causal: bool, length: int) -> None:
    """Its keys are its values, its norms and projections are a head's, and its causal window is a block; causal, the last token of a segment sees its own segment's long keys, which ours and the paper's does not."""
    package = pytest.importorskip("long_short_transformer.long_short_transformer")
    dim, segment, rank = 8, 4, 1 if causal else 3  # its causal mask knows one key a segment
    m = build(dim, causal=causal, heads=1, window=32, segment=segment, rank=rank, rope=False)
    theirs = package.LongShortAttention(
        dim=dim, heads=1, dim_head=dim, causal=causal, window_size=32, segment_size=segment, r=rank
    ).double()
    theirs.pos_emb = None
    with torch.no_grad():
        m.v_proj.weight.copy_(m.k_proj.weight)
        theirs.to_q.weight.copy_(m.q_proj.weight)
        theirs.to_kv.weight.copy_(m.k_proj.weight)
        m.score_proj.weight.copy_(theirs.to_dynamic_proj.weight @ m.k_proj.weight)
        theirs.local_norm.load_state_dict(m.local_norm.state_dict())
        theirs.global_norm.load_state_dict(m.global_norm.state_dict())
        theirs.to_out.weight.copy_(m.out_proj.weight)
        theirs.to_out.bias.zero_()
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    # What its padding makes of a causal sequence is not what is compared.
    whole = F.pad(x, (0, 0, 0, 32 - length)) if causal else x
    got, want = m(x)[0], theirs(whole)[:, :length]
    same = torch.ones(length, dtype=torch.bool)
    if causal:
        same[segment - 1 :: segment] = False
        assert float((got - want)[:, ~same].detach().abs().max()) > 1e-3
    held(x, (got[:, same], None), (want[:, same], None))
    torch.testing.assert_close(got[:, same], want[:, same])
    slope = torch.randn_like(got) * same[:, None]
    a, b = (torch.autograd.grad(t, x, slope)[0] for t in (got, want))
    torch.testing.assert_close(a, b)


def test_state_bytes() -> None:
    m = create_mixer("long_short", 16, heads=2, window=6, segment=4, rank=2)
    for length in (1, 5, 8, 103):
        _, state = m(torch.randn(1, length, 16))
        assert state_bytes(state) == m.state_bytes(length)
    assert create_mixer("long_short", 16, causal=False).state_bytes(100) == 0


def test_ranks_that_are_not_given() -> None:
    assert create_mixer("long_short", 16).rank == 1
    assert create_mixer("long_short", 16, causal=False).rank == 32


def test_impossible_options() -> None:
    for option in ("window", "segment", "rank"):
        with pytest.raises(ValueError, match=f"LongShort: {option} must be at least 1, got 0"):
            create_mixer("long_short", 16, **{option: 0})
    with pytest.raises(ValueError, match="LongShort: rank 16 must be below segment 16"):
        create_mixer("long_short", 16, rank=16)
