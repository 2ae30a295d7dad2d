"""Other people's modules of the same mechanism: which mixer each stands against, which package it is in, and how to build the two sides.

Here those of the mixers that everything began with; those of the recurrent families are in :mod:`mmlong.bench.state_peers`. Another peer is one more function under
``@register_peer``; nothing is imported before it is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mmlong.bench.hierarchy_peers
import mmlong.bench.low_rank_peers
import mmlong.bench.selected_peers
import mmlong.bench.sparse_peers
import mmlong.bench.state_peers  # noqa: F401  registers them
from mmlong.bench.peer import (
    PEERS,
    MissingPackageError,
    Pair,
    Peer,
    Projected,
    Run,
    copy_weights,
    peers_of,
    register_peer,
    require,
)
from mmlong.mixers import create_mixer

__all__ = ["PEERS", "MissingPackageError", "Pair", "Peer", "Run", "peers_of", "register_peer", "require"]


@register_peer(
    "mamba2-transformers",
    mixer="mamba2",
    package="transformers",
    module="transformers",
    title="transformers Mamba2Mixer",
    options={},
)
def _mamba2(dim: int, options: dict[str, Any]) -> Pair:
    """Its torch path (its CUDA kernels are not installed on a CPU)."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    ours: Any = create_mixer("mamba2", dim, **options)
    config = Mamba2Config(
        hidden_size=dim,
        num_heads=ours.heads,
        head_dim=ours.headdim,
        state_size=ours.d_state,
        n_groups=ours.ngroups,
        conv_kernel=ours.d_conv,
        expand=ours.inner // dim,
        layer_norm_epsilon=ours.norm_eps,
        num_hidden_layers=1,
    )
    theirs: Any = Mamba2Mixer(config, layer_idx=0)
    copy_weights(
        [
            (theirs.in_proj.weight, ours.in_proj.weight),
            (theirs.conv1d.weight, ours.conv_weight[:, None]),
            (theirs.conv1d.bias, ours.conv_bias),
            (theirs.dt_bias, ours.dt_bias),
            (theirs.A_log, ours.A_log),
            (theirs.D, ours.D),
            (theirs.norm.weight, ours.norm_weight),
            (theirs.out_proj.weight, ours.out_proj.weight),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer(
    "longformer",
    mixer="local",
    package="transformers",
    module="transformers",
    title="transformers LongformerSelfAttention",
    options={"window": 512, "positions": "none", "bias": True},
    direction="both",
)
def _longformer(dim: int, options: dict[str, Any]) -> Pair:
    """``window`` tokens to each side, without global tokens; it has no rotary positions and no last projection."""
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    ours: Any = create_mixer("local", dim, causal=False, **options)
    window = ours.window
    config = LongformerConfig(
        hidden_size=dim,
        num_attention_heads=ours.heads,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    theirs: Any = LongformerSelfAttention(config, layer_id=0)
    for mine, other in ((theirs.query, ours.q_proj), (theirs.key, ours.k_proj), (theirs.value, ours.v_proj)):
        copy_weights([(mine.weight, other.weight), (mine.bias, other.bias)])
    with torch.no_grad():
        # Ours does this product too; with the unit matrix it changes nothing.
        ours.out_proj.weight.copy_(torch.eye(dim))
        ours.out_proj.bias.zero_()

    def run_theirs(x: Tensor) -> Tensor:
        B, L, _ = x.shape
        # Its blocks take whole windows only; what is filled up is padding, which it is told of.
        short = -L % (2 * window)
        x = nn.functional.pad(x, (0, 0, 0, short))
        hidden = torch.zeros(B, L + short, dtype=torch.bool, device=x.device)
        hidden[:, L:] = True
        scores = torch.zeros(B, L + short, dtype=x.dtype, device=x.device).masked_fill(hidden, -10000.0)
        y: Tensor = theirs(
            x,
            attention_mask=scores,
            is_index_masked=hidden,
            is_index_global_attn=torch.zeros_like(hidden),
            is_global_attn=False,
        )[0]
        return y[:, :L]

    return Pair(ours, theirs, lambda x: ours(x)[0], run_theirs)


@register_peer(
    "local-attention",
    mixer="local",
    package="local-attention",
    module="local_attention",
    title="local-attention LocalAttention",
    options={"window": 512, "positions": "none"},
)
def _local_attention(dim: int, options: dict[str, Any]) -> Pair:
    """``window`` tokens before each, without positions, and projections as ours around it."""
    from local_attention import LocalAttention

    ours: Any = create_mixer("local", dim, **options)
    attend = LocalAttention(
        window_size=ours.window, causal=True, look_backward=1, look_forward=0, exact_windowsize=True, autopad=True,
        use_rotary_pos_emb=False,
    )  # fmt: skip
    theirs = Projected(ours, attend)
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer(
    "s5",
    mixer="s4d",
    package="s5-pytorch",
    module="s5",
    title="s5-pytorch S5",
    options={},
    same=False,
)
def _s5(dim: int, options: dict[str, Any]) -> Pair:
    """Another diagonal recurrence: one state for all channels, as wide as they are (its default), by an associative scan, and no layer after it, which ours has."""
    from s5 import S5

    ours: Any = create_mixer("s4d", dim, **options)
    theirs: Any = S5(dim)
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer(
    "sdpa",
    mixer="attention",
    package="torch",
    module="torch",
    title="torch scaled_dot_product_attention",
    options={"positions": "none"},
)
def _sdpa(dim: int, options: dict[str, Any]) -> Pair:
    """Torch's own kernel between the same projections: what the mixer's care for states, layouts and backends costs."""
    ours: Any = create_mixer("attention", dim, **options)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    theirs = Projected(ours, attend)
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)
