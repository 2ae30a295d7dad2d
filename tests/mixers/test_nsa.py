"""Native Sparse Attention: against its definition, flash-linear-attention's parts, and another's compression of blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers import create_mixer
from mmlong.mixers.nsa import NSA, Compression
from mmlong.ops.rotary import rotary_reference

SMALL: dict[str, Any] = {"compress": 4, "stride": 2, "block": 8, "blocks": 5, "window": 12, "hidden": 10}


def tokens(B: int, L: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=dtype)


def parts(m: NSA, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Queries plain and turned ``(B, L, H, D)``, and the six keys and values ``(B, L, G, D)``, those of the last two branches turned."""
    plain = m.q_proj(x).unflatten(-1, (m.heads, -1))
    kv = [proj(x).unflatten(-1, (m.kv_heads, -1)) for proj in m.kv_proj.values()]
    if not m.rope:
        return plain, plain, kv
    place = torch.arange(x.shape[1])
    kv[2], kv[4] = (rotary_reference(t, place, m.rope_base) for t in (kv[2], kv[4]))
    return plain, rotary_reference(plain, place, m.rope_base), kv


def by_definition(m: NSA, x: Tensor) -> tuple[Tensor, list[set[int]]]:
    """Query by query; and the blocks that each has selected, of the last row and group."""
    B, L, _ = x.shape
    plain, turned, (kc, vc, ks, vs, kw, vw) = parts(m, x)
    gates = torch.sigmoid(m.gate_proj(x)).unflatten(-1, (m.heads, 3))
    scale, r, taken = m.head_dim**-0.5, m.heads // m.kv_heads, []

    def compress(phi: Compression, t: Tensor, g: int) -> Tensor:
        return phi.second(F.gelu(phi.first((t + phi.positions[g]).flatten())))

    rows = []
    for b in range(B):
        heads: list[list[Tensor]] = [[] for _ in range(L)]
        for g in range(m.kv_heads):
            starts = range(0, L - m.compress + 1, m.stride)
            made = [[compress(phi, t[b, s : s + m.compress, g], g) for s in starts]
                    for phi, t in ((m.k_compress, kc), (m.v_compress, vc))]  # fmt: skip
            for t in range(L):
                n = sum(s + m.compress <= t + 1 for s in starts)
                group = range(g * r, (g + 1) * r)
                worth: dict[int, float] = {}
                coarse = []
                for h in group:
                    if not n:
                        coarse.append(torch.zeros_like(plain[b, t, h]))
                        continue
                    p = (torch.stack(made[0][:n]) @ plain[b, t, h] * scale).softmax(0)
                    coarse.append(p @ torch.stack(made[1][:n]))
                    for i in range(n):
                        # Stretches of d tokens that the blocks i and J have in common.
                        for stretch in range(i, i + m.compress // m.stride):
                            J = stretch * m.stride // m.block
                            worth[J] = worth.get(J, 0.0) + float(p[i].detach())
                own = t // m.block
                forced = {0, own, max(own - 1, 0)}
                free = sorted(set(range(own)) - forced, key=lambda J: (-worth[J], J))
                chosen = forced | set(free[: m.blocks - 3])
                taken.append(chosen)
                keys = [j for j in range(t + 1) if j // m.block in chosen]
                near = slice(max(0, t + 1 - m.window), t + 1)
                for h, o1 in zip(group, coarse, strict=True):
                    o2 = (ks[b, keys, g] @ turned[b, t, h] * scale).softmax(0) @ vs[b, keys, g]
                    o3 = (kw[b, near, g] @ turned[b, t, h] * scale).softmax(0) @ vw[b, near, g]
                    heads[t].append(gates[b, t, h] @ torch.stack([o1, o2, o3]))
        rows.append(torch.stack([torch.cat(one) for one in heads]))
    return m.out_proj(torch.stack(rows)), taken[-L:]


@pytest.mark.parametrize(
    ("B", "L", "options"),
    [
        (1, 85, {"heads": 4, "kv_heads": 2, **SMALL, "bias": True}),
        (2, 45, {"heads": 3, **SMALL, "compress": 8, "blocks": 4, "window": 2}),
        (1, 50, {"heads": 2, "kv_heads": 2, **SMALL, "blocks": 3, "rope": False}),
        (1, 3, {"heads": 2, **SMALL}),
    ],
    ids=str,
)
@pytest.mark.oracle("definition: query by query", "nsa")
def test_against_the_definition(same_as: Any, B: int, L: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    m = NSA(12, **options).double()
    x = tokens(B, L, 12).requires_grad_()
    want, taken = by_definition(m, x)
    if L > 80:
        assert any(chosen != {0, i // m.block, i // m.block - 1, 1, 2} for i, chosen in enumerate(taken) if i > 60)
    got, _ = m(x)
    # What is added to all compressed keys alike changes no softmax: a gradient of rounding only.
    nothing = m.k_compress.second.bias
    assert nothing is not None
    if m.compress <= L:
        assert float(torch.autograd.grad(got.sum(), nothing, retain_graph=True)[0].abs().max()) < 1e-12
    slopes = torch.autograd.grad(want.sum(), list(m.parameters()), retain_graph=True, allow_unused=True)
    used = [p for p, g in zip(m.parameters(), slopes, strict=True) if g is not None and p is not nothing]
    same_as(_Only(used), x, (got, None), (want, None))


class _Only(nn.Module):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters)


class _Mean(nn.Module):
    """In place of the learned compression, what flash-linear-attention has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, t: Tensor) -> Tensor:
        n = t.shape[2] // self.size
        return t[:, :, : n * self.size].unflatten(2, (n, self.size)).mean(3)


@pytest.mark.parametrize(("L", "blocks"), [(77, 5), (61, 4), (30, 16)])
@pytest.mark.oracle("fla: naive_nsa_topk, _selection and _compression", "nsa")
def test_against_fla(held: Any, L: int, blocks: int) -> None:
    """Blocks of one size for compression and selection, and means in place of the MLP; keys and values of each branch its own."""
    fla = pytest.importorskip("fla.ops.nsa.naive")
    torch.manual_seed(0)
    m = NSA(32, heads=4, kv_heads=2, compress=8, stride=8, block=8, blocks=blocks, window=12)
    m.k_compress, m.v_compress = _Mean(8), _Mean(8)
    x = tokens(2, L, 32, torch.float32).requires_grad_()
    plain, turned, (kc, vc, ks, vs, kw, vw) = parts(m, x)
    scale = m.head_dim**-0.5
    # The block that has only begun is among theirs, seen by nobody.
    means = [torch.stack([b.mean(1) for b in t.split(8, 1)], 1) for t in (kc, vc)]
    index = fla.naive_nsa_topk(plain.detach(), means[0].detach(), blocks, 8, scale)
    o1, _ = fla.naive_nsa_compression(plain, *means, 8, scale)
    # It makes its output like v, so that both have as many heads.
    o2 = fla.naive_nsa_selection(turned, ks, vs, index, 8, scale)
    apart = torch.arange(L)[:, None] - torch.arange(L)
    k, v = (t.transpose(1, 2).repeat_interleave(2, 1) for t in (kw, vw))
    near = (apart >= 0) & (apart < m.window)
    o3 = F.scaled_dot_product_attention(turned.transpose(1, 2), k, v, near).transpose(1, 2)
    gates = torch.sigmoid(m.gate_proj(x)).unflatten(-1, (4, 3))
    want = m.out_proj(sum(gates[..., i, None] * o for i, o in enumerate((o1, o2, o3))).flatten(2))
    got, _ = m(x)
    held(x, (got, None), (want, None))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    leaves = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("compress", "stride"), [(8, 4), (6, 2), (4, 4)])
@pytest.mark.oracle("native-sparse-attention-pytorch: the compression of blocks", "nsa")
def test_compression_against_another(held: Any, compress: int, stride: int) -> None:
    theirs_of = pytest.importorskip("native_sparse_attention_pytorch")
    torch.manual_seed(0)
    G, D, L = 2, 6, 41
    phi = nn.Sequential(nn.Flatten(3), nn.Linear(compress * D, 20), nn.GELU(), nn.Linear(20, D))
    theirs = theirs_of.SparseAttention(
        dim=24, dim_head=D, heads=4, kv_heads=G, sliding_window_size=8, compress_block_size=compress,
        compress_block_sliding_stride=stride, selection_block_size=12, num_selected_blocks=2, causal=True, compress_mlp=phi,
    )  # fmt: skip
    nn.init.normal_(theirs.k_intrablock_positions)
    ours = Compression(G, D, compress, stride, 20)
    ours.positions.data = theirs.k_intrablock_positions.data
    layers = [t for t in theirs.k_compress if isinstance(t, nn.Linear)]
    for mine, layer in zip((ours.first, ours.second), layers, strict=True):
        mine.load_state_dict(layer.state_dict())
    t = torch.randn(2, G, L, D, requires_grad=True)
    windows = theirs.split_compress_window(t[:, :, : L // stride * stride]) + theirs.k_intrablock_positions[:, None]
    # They begin with blocks that reach before the first token, filled with zeros.
    want = theirs.k_compress(windows)[:, :, compress // stride - 1 :]
    got = ours(t)
    held(t, (got, None), (want, None))
    torch.testing.assert_close(got, want)


def test_scores_of_a_block_are_the_papers_equation_9() -> None:
    """``p_slc[j] = sum_m sum_n p_cmp[(l'/d) j - m - n]``, counted from 1."""
    torch.manual_seed(0)
    m = NSA(8, heads=1, compress=8, stride=2, block=8, blocks=4, window=4).double()
    L = 120
    q, k = torch.randn(1, 1, L, 8).double(), torch.randn(1, 1, m.compressed(L), 8).double()
    chosen = m.choose(q, k, 0)[0, 0]
    for t in range(3 * 8, L):
        n = m.compressed(t + 1)
        p = (k[0, 0, :n] @ q[0, 0, t] / math.sqrt(8)).softmax(0)
        one = {i + 1: float(p[i]) for i in range(n)}
        worth = {
            J: sum(one.get(4 * (J + 1) - a - e, 0.0) for a in range(4) for e in range(4)) for J in range(1, t // 8 - 1)
        }
        assert chosen[t].tolist() == [0, max(worth, key=lambda J: worth[J])]


@pytest.mark.parametrize("asks", [True, False])
def test_the_best_are_found_where_their_worth_is_no_number(asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores so far apart that of all softmaxes but one in a group nothing is left: what is worth more is still known."""
    if not asks:  # as on a device, where no value is looked at
        monkeypatch.setattr("mmlong.mixers.nsa.can_ask", lambda t: False)
    torch.manual_seed(0)
    m = NSA(16, heads=2, kv_heads=1, compress=8, stride=4, block=8, blocks=5, window=4)
    L = 200
    q, k = torch.randn(1, 2, L, 8), torch.randn(1, 1, m.compressed(L), 8)
    for size in (1.0, 1e4):
        chosen = m.choose(size * q, k, 0)[0, 0]
        for t in range(3 * 8, L, 7):
            n = m.compressed(t + 1)
            logs = (size * q[0, :, t].double() @ k[0, 0, :n].double().T / math.sqrt(8)).log_softmax(-1).logsumexp(0)
            # A block has two stretches, and of compressed blocks the one that ends in it, the one that is it, and the one that begins in it.
            worth = {
                J: float(torch.stack([logs[2 * J - 1], logs[2 * J], logs[2 * J], logs[2 * J + 1]]).logsumexp(0))
                for J in range(1, t // 8 - 1)
            }
            best = sorted(worth, key=lambda J: -worth[J])[:2]
            assert {0, *best} == set(chosen[t].tolist()) - {-1}


def test_a_query_without_a_compressed_block_has_none() -> None:
    torch.manual_seed(0)
    m = NSA(8, heads=2, **SMALL).double()
    x = tokens(1, 3, 8)
    y, state = m(x)
    assert state["k_cmp"].shape[2] == 0
    with torch.no_grad():
        m.gate_proj.bias.view(2, 3)[:, 0] = 50.0
    torch.testing.assert_close(m(x)[0], y)


def test_heads_share_keys_sixteen_by_sixteen() -> None:
    assert create_mixer("nsa", 256).kv_heads == 1
    assert create_mixer("nsa", 128, heads=32).kv_heads == 2
    assert create_mixer("nsa", 72, heads=24).kv_heads == 2
    assert create_mixer("nsa", 64, heads=8, kv_heads=4).kv_heads == 4
    m = create_mixer("nsa", 256)
    assert (m.compress, m.stride, m.block, m.blocks, m.window) == (32, 16, 64, 16, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be at least 1"),
        ({"blocks": 2}, "blocks must be at least 3"),
        ({"window": 0}, "window must be at least 1"),
        ({"stride": 12}, "stride 12 must divide compress 32"),
        ({"block": 16}, "block be at least compress"),
        ({"block": 40}, "stride 16 must divide compress 32 and block 40"),
        ({"heads": 4, "kv_heads": 3}, "do not divide into 3 groups"),
        ({"causal": False}, "causal only"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("nsa", 64, **options)
