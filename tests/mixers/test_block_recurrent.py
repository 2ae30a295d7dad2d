"""Block-recurrent attention against its definition, token by token, and an implementation of others; and what its states carry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import BlockRecurrent
from mmlong.ops.rotary import rotary_reference


def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query ``(H, d)`` over keys ``(n, H, d)``."""
    weights = (torch.einsum("hd,nhd->hn", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, v).flatten()


def by_definition(m: BlockRecurrent, x: Tensor) -> tuple[Tensor, Tensor]:
    """One document ``(T, D)``: results, and the states at its end."""
    H, d, W = m.heads, m.head_dim, m.window

    def heads(proj: Any, t: Tensor) -> Tensor:
        return proj(t).view(-1, H, d)

    q, k, v, asks = heads(m.q_proj, x), heads(m.k_proj, x), heads(m.v_proj, x), heads(m.q_states, x)
    places = torch.arange(x.shape[0])
    turned_q, turned_k = (rotary_reference(t, places, m.rope_base) for t in (q, k)) if m.rope else (q, k)
    C, rows = m.first, []
    for i in range(x.shape[0]):
        known = m.norm(C) + m.ids
        ks, vs = heads(m.k_states, known), heads(m.v_states, known)
        low = max(0, i - W)
        near = read(turned_q[i], turned_k[low : i + 1], v[low : i + 1])
        rows.append(torch.cat([near, read(asks[i], ks, vs)]))
        if (i + 1) % W == 0:
            block = slice(i + 1 - W, i + 1)
            qs, qt = heads(m.q_across, known), heads(m.q_tokens, known)
            h = torch.stack(
                [torch.cat([read(qs[n], ks, vs), read(qt[n], k[block], v[block])]) for n in range(C.shape[0])]
            )
            if m.gate == "fixed":
                g = torch.sigmoid(m.decay)
                C = g * C + (1 - g) * m.across(h)
            else:
                f, w, z = m.across(h).chunk(3, -1)
                C = torch.sigmoid(f + 1) * C + torch.sigmoid(w - 1) * torch.tanh(z)
    return m.out_proj(torch.stack(rows)), C


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
@pytest.mark.parametrize(("length", "rope"), [(5, True), (23, True), (20, False)])
@pytest.mark.oracle("definition: token by token", "block_recurrent")
def test_is_its_definition(same_as: Any, length: int, rope: bool, gate: str) -> None:
    torch.manual_seed(0)
    m = BlockRecurrent(8, window=5, states=3, heads=2, gate=gate, rope=rope).double()
    with torch.no_grad():
        m.first.normal_()
        m.ids.normal_()
    x = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    y, state = m(x)
    want, memory = by_definition(m, x[0])
    same_as(m, x, (y, state["memory"]), (want[None], memory[None]))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.oracle("block-recurrent-transformer-pytorch: AttentionBlock, fixed gate", "block_recurrent")
def test_against_block_recurrent_transformer_pytorch(held: Any, rope: bool) -> None:
    """Block by block, states and keys handed on with their gradient. Its window is the whole block before, ours slides, as the paper's: so the block is run once for every place in it, each time with the keys of the ``W`` tokens before that place."""
    code = pytest.importorskip("block_recurrent_transformer_pytorch.block_recurrent_transformer_pytorch")
    torch.manual_seed(0)
    D, H, d, W, C = 12, 2, 4, 5, 3
    theirs = code.AttentionBlock(D, block_width=W, dim_head=d, heads=H, num_state_vectors=C).double()
    kept = theirs.state_container
    m = BlockRecurrent(D, window=W, states=C, heads=H, head_dim=d, rope=rope).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.5)
        # Its heads share keys and values.
        for to_kv, projs in ((theirs.to_kv, (m.k_proj, m.v_proj)), (kept.state_to_kv, (m.k_states, m.v_states))):
            for proj, weight in zip(projs, to_kv.weight.chunk(2), strict=True):
                proj.weight.copy_(weight.repeat(H, 1))
        for mine, its in (
            (m.q_proj, theirs.to_q),
            (m.out_proj, theirs.to_out),
            (m.q_states, kept.q_to_state),
            (m.q_tokens, kept.q_from_state),
            (m.q_across, kept.state_to_q),
        ):
            mine.weight.copy_(its.weight)
        m.norm.weight.copy_(kept.state_norm.gamma)
        m.norm.bias.zero_()
        m.first.copy_(kept.init_state)
        m.ids.copy_(kept.state_pos_ids)
        # Two projections one after the other; of each head what it has of states, and then of tokens.
        out = kept.to_state_out.weight.view(D, H, 2, d).transpose(1, 2).flatten(1)
        m.across.weight.copy_(kept.state_out_to_gate.weight @ out)
        m.across.bias.copy_(kept.state_out_to_gate.bias)
        # Theirs is the share of what is new.
        m.decay.copy_(-kept.learned_ema_beta)
    mask = torch.ones(W, W, dtype=torch.bool).tril()
    # Without xPos, which is not the paper's.
    angles = torch.outer(torch.arange(2.0 * W), m.rope_base ** (-torch.arange(0, d, 2).double() / d)).repeat(1, 2)
    places = {"rotary_pos_emb": angles, "xpos_scale": torch.ones(1, dtype=torch.float64).expand(2 * W, 1)}
    x = torch.randn(2, 4 * W, D, dtype=torch.float64, requires_grad=True)
    rows, states, before = [], None, None
    for block in x.split(W, 1):
        for i in range(W):
            kept.set_next_read_state(states)
            seen = None if before is None else before[:, :, i:]
            y, memories, after = theirs(block, attn_mask=mask, xl_memories=seen, **(places if rope else {}))
            rows.append(y[:, i : i + 1])
        before, states = memories, after
    y, state = m(theirs.norm(x))
    got, want = (y, state["memory"]), (torch.cat(rows, 1), states)
    held(x, got, want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    weights = [torch.randn_like(t) for t in want]
    for a, b in zip(*(torch.autograd.grad(ys, x, weights) for ys in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_states_carry_what_windows_cannot() -> None:
    torch.manual_seed(0)
    m = BlockRecurrent(8, window=4, states=3, heads=1)
    x = torch.randn(1, 41, 8, requires_grad=True)
    (g,) = torch.autograd.grad(m(x)[0][0, 40].sum(), x)
    assert bool((g[0].abs().sum(-1) > 0).all())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="window and states must be at least 1, got 0 and 256"):
        BlockRecurrent(8, window=0)
    with pytest.raises(ValueError, match="gate is one of fixed, lstm, got 'gru'"):
        BlockRecurrent(8, gate="gru")
