"""Recurrent memory and MEGABYTE's parts against code that nobody here wrote, with its weights.

Norms and feed-forwards within the blocks are theirs; attention, and what is done round the blocks, is ours. Where theirs does what the paper does not, it is given weights with which that does nothing: nothing of it is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone.block import Block
from mmlong.backbone.hierarchy import Level, Parts, Within
from mmlong.backbone.recurrent_memory import RecurrentMemory
from mmlong.layout import Layout
from mmlong.mixers import create_mixer


class Inner(nn.Module):
    """Blocks with norms before and behind."""

    causal = streaming = True

    def __init__(self, first: nn.Module, blocks: Sequence[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = first, Parts(blocks), last

    def forward(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> tuple[Tensor, Any]:
        x, state = self.blocks(self.first(x), state, layout)
        return self.last(x), state


def block_of(attention: Any, feed_forward: Any, dim: int, sink: bool) -> Block:
    """The house's block of their layers, which have a norm in front; ``sink``: attention to one key more, whose score and value are zero."""
    mixer: Any = create_mixer("attention", dim, heads=attention.heads, head_dim=4, positions="none", sink=sink)
    mixer.q_proj.weight = attention.to_q.weight
    mixer.k_proj.weight, mixer.v_proj.weight = (nn.Parameter(w) for w in attention.to_kv.weight.detach().chunk(2))
    mixer.out_proj.weight = attention.to_out.weight
    made = Block(mixer, dim, ffn="none")
    made.norm1, made.norm2, made.ffn = attention.norm, feed_forward[0], feed_forward[1:]
    return made.double()


def same(x: Tensor, leaf: Tensor, got: Sequence[Tensor], want: Sequence[Tensor], channels: int) -> None:
    """Results, and the gradient of a random function of them with respect to the first ``channels`` of tokens ``x``, which theirs has in ``leaf``."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    weights = [torch.randn_like(t) for t in want]
    (mine,), (theirs,) = torch.autograd.grad(got, x, weights), torch.autograd.grad(want, leaf, weights)
    torch.testing.assert_close(mine[..., :channels], theirs.view_as(mine)[..., :channels])


@pytest.mark.parametrize("length", [20, 23])
def test_recurrent_memory_against_recurrent_memory_transformer_pytorch(length: int) -> None:
    """Over segments, with the gradient through the memory. One token of memory, since in theirs those of a segment see each other in both directions; the memory that is to be written is the one that was read, as in the paper, which is an option; one layer, as in those behind it the first one's values are mixed in."""
    code = pytest.importorskip("recurrent_memory_transformer_pytorch.recurrent_memory_transformer")
    torch.manual_seed(0)
    B, D, n = 2, 12, 5
    options = {"depth": 1, "num_memory_tokens": 1, "seq_len": n, "dim_head": 4, "heads": 3, "ff_mult": 2}
    as_the_paper = {
        "add_write_to_next_write_mem": True, "next_write_mem_stop_grad": False, "use_xl_memories": False,
        "emb_gradient_frac": 1.0, "num_residual_streams": 1,
    }  # fmt: skip
    # A token of its own at every place, whose vector is the token of ours.
    theirs = code.RecurrentMemoryTransformer(D, num_tokens=B * length, **options, **as_the_paper).double()
    attention, feed_forward = (layer.branch for layer in theirs.layers[0])
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.4)
        # No positions, nothing that tells memory that is read from memory that is to be written, and a key of nothing.
        for p in (theirs.pos_emb.weight, theirs.read_memory_emb, theirs.memory_tokens, attention.null_kv):
            p.zero_()
    inner = Inner(nn.Identity(), [block_of(attention, feed_forward, D, sink=True)], theirs.norm)
    one = RecurrentMemory(inner, 1, D, n).double()
    leaf = theirs.token_emb.weight
    x = leaf.detach().view(B, length, D).clone().requires_grad_()
    run = code.RecurrentMemoryTransformerWrapper(theirs)
    want, memory = run(torch.arange(B * length).view(B, length), memories=one.memory)
    y, state = one(x)
    got = theirs.to_logits(y)
    # Theirs writes behind an open segment, too.
    whole = length % n == 0
    same(x, leaf, (got, state["memory"]) if whole else (got,), (want, memory) if whole else (want,), D)


@pytest.mark.parametrize("length", [24, 22, 3])
def test_levels_and_parts_within_against_megabyte_pytorch(length: int) -> None:
    """MEGABYTE's global model and its local one, of two blocks each. Theirs puts a start vector before the bytes of a patch, and predicts a patch's first byte at the end of the patch before: so a chunk is of the bytes before it (``lag: 1``), and the start is a key of zeros. It moves half of the channels by one token before each layer: those are kept at zero."""
    code = pytest.importorskip("MEGABYTE_pytorch.megabyte")
    torch.manual_seed(0)
    B, k, wide, dim = 2, 4, 16, 12
    theirs = code.MEGABYTE(
        num_tokens=B * length, dim=(wide, dim), depth=(2, 2), max_seq_len=(8, k), dim_head=4, heads=3, ff_mult=2
    ).double()
    outer, local = theirs.transformers
    embed, norm_patch, project, norm_wide = (theirs.token_embs[1][i] for i in (0, 2, 3, 4))
    lengthen = theirs.to_next_transformer_projections[0][1]
    theirs.token_embs[0].weight = leaf = embed.weight
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.4)
        leaf[:, dim // 2 :] = 0
        lengthen.weight.unflatten(0, (k, dim))[:, dim // 2 :] = 0
        lengthen.bias.view(k, dim)[:, dim // 2 :] = 0
        norm_wide.weight[wide // 2 :] = norm_wide.bias[wide // 2 :] = 0
        for model, width in ((outer, wide), (local, dim)):
            for attention, feed_forward in model.layers:
                attention.to_out.weight[width // 2 :] = 0
                feed_forward[-1].weight[width // 2 :] = feed_forward[-1].bias[width // 2 :] = 0
        for _, feed_forward in local.layers:
            feed_forward[1].bias.zero_()
            feed_forward[-1].bias.zero_()
        theirs.start_tokens[1].zero_()
        # What ours makes of no bytes.
        theirs.start_tokens[0].copy_(norm_wide(project(norm_patch(torch.zeros(k * dim, dtype=torch.float64)))))
    inner = Inner(norm_wide, [block_of(*layer, wide, sink=False) for layer in outer.layers], outer.norm)
    level = Level(inner, k, dim, wide, lag=1).double()
    level.shorten, level.lengthen = nn.Sequential(norm_patch, project), lengthen
    within = Within(Inner(nn.Identity(), [block_of(*layer, dim, sink=True) for layer in local.layers], local.norm), k)
    x = leaf.detach().view(B, length, dim).clone().requires_grad_()
    got = theirs.to_logits(within(level(x)[0])[0])
    want = theirs(torch.arange(B * length).view(B, length))
    # Of channels that are moved, it is a zero that is the same.
    same(x, leaf, (got,), (want,), dim // 2)
