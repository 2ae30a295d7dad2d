"""Other people's modules of sparse patterns of attention.

They are the modules that the tests hold ours against, as wide as a benchmark wants them, weights copied across. See :mod:`mmlong.bench.peer`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.bench.peer import Pair, copy_weights, register_peer
from mmlong.mixers import create_mixer
from mmlong.mixers.bigbird import random_blocks


def _without_the_last_projection(ours: Any) -> None:
    """Theirs has none; with the unit matrix ours does the product too, and it changes nothing."""
    with torch.no_grad():
        ours.out_proj.weight.copy_(torch.eye(ours.dim))
        ours.out_proj.bias.zero_()


def _copy_projections(theirs: Any, ours: Any) -> None:
    for mine, other in ((theirs.query, ours.q_proj), (theirs.key, ours.k_proj), (theirs.value, ours.v_proj)):
        copy_weights([(mine.weight, other.weight), (mine.bias, other.bias)])


@register_peer(
    "longformer-globals",
    mixer="longformer",
    package="transformers",
    module="transformers",
    title="transformers LongformerSelfAttention, global tokens",
    options={"window": 512, "globals": 1, "rope": False, "bias": True},
    direction="both",
)
def _longformer(dim: int, options: dict[str, Any]) -> Pair:
    """``window`` tokens to each side, and the first tokens global."""
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    ours: Any = create_mixer("longformer", dim, causal=False, **options)
    config = LongformerConfig(
        hidden_size=dim,
        num_attention_heads=ours.heads,
        attention_window=[2 * ours.window],
        attention_probs_dropout_prob=0.0,
    )
    theirs: Any = LongformerSelfAttention(config, layer_id=0)
    _copy_projections(theirs, ours)
    _without_the_last_projection(ours)
    if ours.globals:
        copy_weights(
            [
                (theirs.query_global.weight, ours.q_global.weight),
                (theirs.query_global.bias, ours.q_global.bias),
                (theirs.key_global.weight, ours.k_global.weight),
                (theirs.value_global.weight, ours.v_global.weight),
                (theirs.value_global.bias, ours.v_global.bias),
            ]
        )

    def run_theirs(x: Tensor) -> Tensor:
        B, L, _ = x.shape
        # Its blocks take whole windows only; what is filled up is padding, which it is told of.
        short = -L % (2 * ours.window)
        x = nn.functional.pad(x, (0, 0, 0, short))
        place = torch.arange(L + short, device=x.device).expand(B, -1)
        hidden, is_global = place >= L, place < ours.globals
        scores = torch.zeros(B, L + short, dtype=x.dtype, device=x.device)
        y: Tensor = theirs(
            x,
            attention_mask=scores.masked_fill(hidden, -10000.0).masked_fill(is_global, 10000.0),
            is_index_masked=hidden,
            is_index_global_attn=is_global,
            is_global_attn=bool(ours.globals),
        )[0]
        return y[:, :L]

    return Pair(ours, theirs, lambda x: ours(x)[0], run_theirs)


@register_peer(
    "bigbird-transformers",
    mixer="bigbird",
    package="transformers",
    module="transformers",
    title="transformers BigBirdBlockSparseAttention",
    options={"rope": False, "bias": True},
    direction="both",
)
def _bigbird(dim: int, options: dict[str, Any]) -> Pair:
    """The same random blocks; it draws its own in training and has none in eval, so it is handed them."""
    from transformers.models.big_bird import modeling_big_bird as code

    ours: Any = create_mixer("bigbird", dim, causal=False, **options)
    b = ours.block
    config = code.BigBirdConfig(
        hidden_size=dim, num_attention_heads=ours.heads, block_size=b, num_random_blocks=ours.random, use_bias=True
    )
    theirs: Any = code.BigBirdBlockSparseAttention(config)
    _copy_projections(theirs, ours)
    _without_the_last_projection(ours)

    def run_theirs(x: Tensor) -> Tensor:
        B, L, _ = x.shape
        n = -(-L // b)
        drawn = list(random_blocks(ours.heads, n, ours.window, ours.random, ours.seed))
        head = itertools.cycle(drawn)
        theirs._bigbird_block_rand_mask_with_head = lambda **_: drawn
        # What it asks, head by head, at the lengths of its paper.
        theirs._bigbird_block_rand_mask = lambda *_, **__: next(head)
        valid = (torch.arange(n * b, device=x.device) < L).to(x.dtype).expand(B, -1)
        blocked, band, rows, columns = code.BigBirdModel.create_masks_for_block_sparse_attn(valid, b)
        y: Tensor = theirs(
            nn.functional.pad(x, (0, 0, 0, n * b - L)),
            band_mask=band,
            from_mask=rows,
            to_mask=columns,
            from_blocked_mask=blocked,
            to_blocked_mask=blocked,
        )[0]
        return y[:, :L]

    return Pair(ours, theirs, lambda x: ours(x)[0], run_theirs)
