"""Positions, sinks, softcaps and gates of attention: against other people's code with the same weights, definitions where nobody's runs, and what the options promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import Attention, SoftmaxAttention
from mmlong.mixers.local import Local
from mmlong.mixers.positions import POSITIONS, alibi_slopes, t5_buckets
from mmlong.ops.rotary import rotary_reference
from mmlong.testing import check_mixer

DIM, HEADS = 32, 4
TILES = {
    "mmlong.ops.attention_backends.MASK_ELEMENTS": 64,
    "mmlong.ops.tiled_attention.TILE_ELEMENTS": 1 << 12,
    "mmlong.ops.tiled_attention.MAX_KEYS": 32,
}


def tokens(B: int, L: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, DIM, generator=torch.Generator().manual_seed(L), dtype=dtype).requires_grad_()


@pytest.fixture(params=["dense", "tiles"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that terms are computed on a CPU."""
    monkeypatch.setattr("mmlong.ops.attention_backends.MASK_ELEMENTS", 1 << 30 if request.param == "dense" else 0)


def hidden(L: int) -> Tensor:
    return torch.full((L, L), -math.inf, dtype=torch.float64).triu(1)


def in_pieces(m: nn.Module, x: Tensor, sizes: list[int]) -> Tensor:
    state, parts = None, []
    for piece in x.split(sizes, 1):
        y, state = m(piece, state)
        parts.append(y)
    return torch.cat(parts, 1)


def compare(m: nn.Module, x: Tensor, want: Tensor, held: Any, tolerance: float = 1e-9) -> None:
    """Whole and in pieces, with the gradient of the input."""
    whole, pieces = m(x)[0], in_pieces(m, x, [1, 5, x.shape[1] - 6]) if m.causal else None
    held(x, (whole, None), (want, None))
    dy = torch.randn_like(want)
    for got in (whole, pieces):
        if got is not None:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            found, true = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in (got, want))
            torch.testing.assert_close(found, true, rtol=tolerance, atol=10 * tolerance)


def positions_of(m: SoftmaxAttention) -> Any:
    """The part, of whatever class."""
    return m.positions


def copy(ours: SoftmaxAttention, **theirs: nn.Linear) -> None:
    with torch.no_grad():
        for name, linear in theirs.items():
            getattr(ours, name).weight.copy_(linear.weight)
            if linear.bias is not None:
                getattr(ours, name).bias.copy_(linear.bias)


@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.oracle("transformers: MptAttention, its ALiBi", "attention")
def test_alibi_against_mpt(way: None, held: Any, heads: int) -> None:
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    torch.manual_seed(0)
    L = 63
    theirs = mpt.MptAttention(mpt.MptConfig(d_model=DIM, n_heads=heads, max_seq_len=L), layer_idx=0).double().eval()
    ours = Attention(DIM, heads=heads, positions="alibi").double()
    with torch.no_grad():
        for name, part in zip(("q_proj", "k_proj", "v_proj"), theirs.Wqkv.weight.chunk(3), strict=True):
            getattr(ours, name).weight.copy_(part)
    copy(ours, out_proj=theirs.out_proj)
    x = tokens(2, L)
    bias = mpt.build_mpt_alibi_tensor(heads, L).double()
    want = theirs(x, bias, attention_mask=hidden(L).bool()[None, None])[0]
    compare(ours, x, want, held, 1e-5)  # its softmax is of float32


def test_alibi_slopes_are_those_of_bloom() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in range(1, 40):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20)])
@pytest.mark.oracle("transformers: T5Attention", "attention")
def test_t5(way: None, held: Any, causal: bool, buckets: int, most: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch.manual_seed(0)
    L, width = 150, DIM // HEADS
    config = t5.T5Config(
        d_model=DIM, num_heads=HEADS, d_kv=width, is_decoder=causal, dropout_rate=0.0,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=most,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    options = {"buckets": buckets, "max_distance": most}
    ours = Attention(DIM, causal=causal, heads=HEADS, positions="t5", position_options=options).double()
    copy(ours, q_proj=theirs.q, k_proj=theirs.k, v_proj=theirs.v, out_proj=theirs.o)
    with torch.no_grad():
        ours.q_proj.weight.mul_(math.sqrt(width))  # T5 does not scale its scores
        positions_of(ours).table.copy_(theirs.relative_attention_bias.weight.T)
    x = tokens(2, L)
    want = theirs(x, mask=hidden(L)[None, None] if causal else None)[0]
    compare(ours, x, want, held)
    got = ours(x)[0]
    leaf, other = positions_of(ours).table, theirs.relative_attention_bias.weight
    a, b = torch.autograd.grad(got.square().sum(), leaf)[0], torch.autograd.grad(want.square().sum(), other)[0]
    torch.testing.assert_close(a, b.T, rtol=1e-8, atol=1e-8)


def test_t5_buckets_are_those_of_t5() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    for buckets, most in ((32, 128), (16, 128), (8, 20), (64, 4096), (32, 1000)):
        d = torch.arange(3000)
        theirs = t5.T5Attention._relative_position_bucket(-d, False, buckets, most)
        ours = torch.tensor(t5_buckets(buckets, most))[d.clamp_max(most)]
        assert torch.equal(ours, theirs), (buckets, most)


@pytest.mark.oracle("rotary-embedding-torch: RotaryEmbedding(use_xpos=True)", "attention")
def test_xpos(way: None, held: Any) -> None:
    rotary = pytest.importorskip("rotary_embedding_torch")
    torch.manual_seed(0)
    L, width = 300, DIM // HEADS
    ours = Attention(DIM, heads=HEADS, positions="xpos", position_options={"scale_base": 20.0}).double()
    theirs = rotary.RotaryEmbedding(width, use_xpos=True, xpos_scale_base=20, cache_if_possible=False).double()
    x = tokens(2, L)
    q, k, v = (w(x).unflatten(-1, (HEADS, width)).transpose(1, 2) for w in (ours.q_proj, ours.k_proj, ours.v_proj))
    # There, the two coordinates of a point are neighbours.
    q, k = (torch.stack(t.chunk(2, -1), -1).flatten(-2) for t in (q, k))
    q, k = theirs.rotate_queries_and_keys(q, k)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width) + hidden(L)
    want = ours.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    compare(ours, x, want, held, 1e-5)  # its frequencies and scales are of float32


def test_xpos_fades_over_65536_tokens_without_overflow(way: None) -> None:
    """As far as any token can be: a key 60,000 tokens back weighs as its product with the query has faded, to nothing, and nothing is infinite."""
    torch.manual_seed(0)
    m = Attention(4, heads=1, positions="xpos")
    keys = torch.randn(1, 1, 66_000, 4)
    q, terms = m.terms(torch.randn(1, 1, 1, 4), 66_000)
    y = m.attend(q, keys, keys, m_visible(), terms)
    assert torch.isfinite(y).all()


def m_visible() -> Any:
    from mmlong.ops.visible import Visible

    return Visible(None, 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.oracle("transformers: XLNetRelativeAttention.rel_attn_core", "attention")
def test_transformer_xl_against_xlnet(way: None, held: Any, causal: bool) -> None:
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    torch.manual_seed(0)
    L = 70
    kind = "uni" if causal else "bi"
    config = xlnet.XLNetConfig(
        d_model=DIM, n_head=HEADS, attn_type=kind, dropout=0.0, n_layer=1, d_inner=8, vocab_size=9
    )
    model = xlnet.XLNetModel(config).double().eval()
    theirs = model.layer[0].rel_attn
    ours = Attention(DIM, causal=causal, heads=HEADS, positions="transformer_xl").double()
    with torch.no_grad():
        for p in (theirs.q, theirs.k, theirs.v, theirs.r, theirs.r_w_bias, theirs.r_r_bias):
            p.normal_(std=0.3)
        for mine, their in ((ours.q_proj, theirs.q), (ours.k_proj, theirs.k), (ours.v_proj, theirs.v)):
            mine.weight.copy_(their.flatten(1).T)
        part = positions_of(ours)
        part.proj.weight.copy_(theirs.r.flatten(1).T)
        part.content_bias.copy_(theirs.r_w_bias)
        part.place_bias.copy_(theirs.r_r_bias)
        ours.out_proj.weight.copy_(torch.eye(DIM))
    x = tokens(2, L)
    h = x.transpose(0, 1)
    q, k, v = (torch.einsum("ibh,hnd->ibnd", h, w) for w in (theirs.q, theirs.k, theirs.v))
    waves = model.relative_positional_encoding(L, L, bsz=2).double()
    r = torch.einsum("ibh,hnd->ibnd", waves, theirs.r)
    mask = torch.ones(L, L, dtype=torch.float64).triu(1)[..., None, None] if causal else None
    want = theirs.rel_attn_core(q, k, v, r, attn_mask=mask).transpose(0, 1).flatten(2)
    compare(ours, x, want, held, 1e-5)  # its waves are of float32


@pytest.mark.oracle("definition: explicit distances", "attention")
def test_transformer_xl_against_explicit_distances(way: None, held: Any) -> None:
    torch.manual_seed(0)
    L, width = 63, DIM // HEADS
    ours = Attention(DIM, heads=HEADS, kv_heads=2, positions="transformer_xl").double()
    x = tokens(2, L)
    q = ours.q_proj(x).unflatten(-1, (HEADS, width))
    k, v = (w(x).unflatten(-1, (2, width)).repeat_interleave(2, 2) for w in (ours.k_proj, ours.v_proj))
    d = (torch.arange(L)[:, None] - torch.arange(L)).double()
    angle = d[..., None] * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
    part = positions_of(ours)
    r = part.proj(torch.cat([angle.sin(), angle.cos()], -1)).unflatten(-1, (HEADS, width))
    scores = torch.einsum("bihd,bjhd->bhij", q + part.content_bias, k)
    scores = scores + torch.einsum("bihd,ijhd->bhij", q + part.place_bias, r)
    weights = (scores / math.sqrt(width) + hidden(L)).softmax(-1)
    compare(ours, x, ours.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)), held)


@pytest.mark.parametrize("softcap", [0.2, 50.0])
@pytest.mark.oracle("transformers: Gemma2Attention, its softcap", "attention")
def test_softcap_against_gemma2(way: None, held: Any, softcap: float) -> None:
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    torch.manual_seed(0)
    L, width = 63, DIM // HEADS
    config = gemma.Gemma2Config(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=width,
        query_pre_attn_scalar=width, attn_logit_softcapping=softcap,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = gemma.Gemma2Attention(config, layer_idx=0).double().eval()
    ours = Attention(DIM, heads=HEADS, kv_heads=2, softcap=softcap).double()
    copy(ours, q_proj=theirs.q_proj, k_proj=theirs.k_proj, v_proj=theirs.v_proj, out_proj=theirs.o_proj)
    x = tokens(2, L)
    table = gemma.Gemma2RotaryEmbedding(config)(x, torch.arange(L)[None])
    want = theirs(x, position_embeddings=table, attention_mask=hidden(L)[None, None])[0]
    # Its softmax is of float32.
    compare(ours, x, want, held, 1e-5)


@pytest.mark.oracle("transformers: GptOssAttention, its sinks", "attention")
def test_sink_against_gpt_oss(way: None, held: Any) -> None:
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    torch.manual_seed(0)
    L, width = 63, DIM // HEADS
    config = oss.GptOssConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=width, attention_bias=True,
        layer_types=["full_attention"], num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = oss.GptOssAttention(config, layer_idx=0).double().eval()
    ours = Attention(DIM, heads=HEADS, kv_heads=2, sink=True, bias=True).double()
    copy(ours, q_proj=theirs.q_proj, k_proj=theirs.k_proj, v_proj=theirs.v_proj, out_proj=theirs.o_proj)
    assert ours.sinks is not None
    with torch.no_grad():
        ours.sinks.copy_(theirs.sinks.normal_())
    x = tokens(2, L)
    angle = torch.arange(L).double()[:, None] * 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))
    table = (angle.cos()[None], angle.sin()[None])
    want = theirs(x, position_embeddings=table, attention_mask=hidden(L)[None, None])[0]
    compare(ours, x, want, held)
    a, b = (torch.autograd.grad(y.square().sum(), p)[0] for y, p in ((ours(x)[0], ours.sinks), (want, theirs.sinks)))
    torch.testing.assert_close(a, b)


@pytest.mark.oracle("transformers: Qwen3NextAttention, its output gate", "attention")
def test_gate_against_qwen3_next(way: None, held: Any) -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(0)
    L, width = 63, DIM // HEADS
    config = qwen.Qwen3NextConfig(hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=width)
    config._attn_implementation = "eager"
    theirs = qwen.Qwen3NextAttention(config, layer_idx=0).double().eval()
    theirs.q_norm = theirs.k_norm = nn.Identity()
    ours = Attention(DIM, heads=HEADS, kv_heads=2, gate=True).double()
    copy(ours, k_proj=theirs.k_proj, v_proj=theirs.v_proj, out_proj=theirs.o_proj)
    assert ours.gate_proj is not None
    with torch.no_grad():
        q, gate = theirs.q_proj.weight.unflatten(0, (HEADS, 2, width)).unbind(1)
        ours.q_proj.weight.copy_(q.flatten(0, 1))
        ours.gate_proj.weight.copy_(gate.flatten(0, 1))
    x = tokens(2, L)
    angle = torch.arange(L).double()[:, None] * 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))
    table = tuple(torch.cat([t, t], -1)[None] for t in (angle.cos(), angle.sin()))
    want = theirs(x, position_embeddings=table, attention_mask=hidden(L)[None, None])[0]
    compare(ours, x, want, held, 1e-5)  # its softmax is of float32


OPTIONS: dict[str, dict[str, Any]] = {
    "xpos": {"positions": "xpos", "position_options": {"scale_base": 30.0}},
    "alibi": {"positions": "alibi"},
    "t5": {"positions": "t5", "position_options": {"buckets": 8, "max_distance": 40}},
    "transformer_xl": {"positions": "transformer_xl"},
    "all": {"positions": "transformer_xl", "softcap": 2.0, "sink": True, "gate": True, "kv_heads": 1},
}
PROPERTIES = ("causality", "pieces", "padding", "resets", "gradients", "bfloat16", "stress")
"""What a term of scores could break; the rest is that of the mixer around it."""
IN_A_WINDOW = ("alibi", "all")


def parts() -> list[tuple[str, bool, str]]:
    """(mixer, causal, what): every part causal in `attention`, two of them two-sided and in a window too."""
    found = [("attention", True, what) for what in OPTIONS] + [("attention", False, what) for what in ("t5", "all")]
    return found + [("local", True, what) for what in IN_A_WINDOW]


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "causal", "what"), parts())
@pytest.mark.parametrize("prop", PROPERTIES)
def test_every_part_keeps_the_contract(
    mixer: str, causal: bool, what: str, prop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prop in ("causality", "pieces") and not causal:
        pytest.skip("it sees both sides")
    for place, value in TILES.items():
        monkeypatch.setattr(place, value)
    options = {"causal": causal, "heads": 2, **OPTIONS[what], **({"window": 10} if mixer == "local" else {})}
    check_mixer(mixer, options=options, only=prop, dims=(16,), probed=127)


@pytest.mark.slow
@pytest.mark.parametrize("prop", ["cost", "compile", "export"])
@pytest.mark.parametrize("what", ["xpos", "all", "t5"])
def test_cost_and_compilers(what: str, prop: str) -> None:
    check_mixer("attention", options={"causal": True, "heads": 2, **OPTIONS[what]}, only=prop, dims=(16,))


def test_none_knows_no_order_two_sided() -> None:
    torch.manual_seed(0)
    m = Attention(DIM, causal=False, positions="none").double()
    x = tokens(1, 30)
    order = torch.randperm(30)
    torch.testing.assert_close(m(x[:, order])[0], m(x)[0][:, order])


@pytest.mark.parametrize("name", [n for n in POSITIONS if n not in ("none", "rope")])
def test_a_distance_counts_alike_everywhere(name: str, way: None) -> None:
    """Tokens behind a reset, or behind padding in the state, are as at the beginning; in a window too."""
    torch.manual_seed(0)
    for m in (Attention(DIM, heads=HEADS, positions=name), Local(DIM, window=9, heads=HEADS, positions=name)):
        m = m.double()
        x = tokens(2, 80)
        resets = torch.zeros(2, 80, dtype=torch.bool)
        resets[0, 33] = True
        y, state = m(x, layout=Layout(lengths=torch.tensor([80, 40]), resets=resets))
        torch.testing.assert_close(y[:1, 33:], m(x[:1, 33:])[0])
        after, _ = m(x[:, :7], state)
        torch.testing.assert_close(after[1:], m(torch.cat([x[1:, :40], x[1:, :7]], 1))[0][:, 40:])


def test_options_are_checked() -> None:
    for options, message in (
        ({"positions": "ropes"}, "unknown positions 'ropes'; use one of rope, xpos, alibi"),
        ({"positions": "xpos", "causal": False}, "positions 'xpos' have no two-sided form"),
        ({"positions": "t5", "position_options": {"bucket": 3}}, "position_options of 't5'.*'bucket'"),
        ({"positions": "t5", "position_options": {"buckets": 1}}, "buckets must be at least 2"),
        ({"positions": "t5", "position_options": {"max_distance": 16}}, "max_distance 16 must be more than 16"),
        ({"softcap": 0.0}, "softcap must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Attention(DIM, **options)
    with pytest.raises(ValueError, match="dim must be even"):
        Attention(33, heads=3, positions="transformer_xl")


def test_a_fraction_of_the_channels_is_turned() -> None:
    """As in GPT-NeoX: the first ones, with wavelengths of their own number; the output projection may have a bias alone."""
    torch.manual_seed(0)
    m = Attention(DIM, heads=2, position_options={"fraction": 0.5}, out_bias=True).double()
    assert [p.bias is None for p in (m.q_proj, m.k_proj, m.v_proj, m.out_proj)] == [True, True, True, False]
    x = tokens(2, 11)
    q, k, v = (p(x).unflatten(-1, (2, 16)) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = (torch.cat([rotary_reference(t[..., :8], torch.arange(11)), t[..., 8:]], -1) for t in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4 + hidden(11)
    want = m.out_proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))
    torch.testing.assert_close(m(x)[0], want)
    with pytest.raises(ValueError, match="fraction must be above 0"):
        Attention(DIM, heads=2, position_options={"fraction": 0})
