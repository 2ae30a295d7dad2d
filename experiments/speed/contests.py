"""Who runs against whom: for each name a builder of two modules with the same weights, and what is promised of ours.

Another contest is one more function and one more line in ``CONTESTS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.mixers.local import Local
from mmlong.mixers.mamba2 import Mamba2

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """Two modules with the same weights, and how to run each on ``x (B, L, D)``."""

    ours: nn.Module
    theirs: nn.Module
    run_ours: Run
    run_theirs: Run


@dataclass(frozen=True)
class Contest:
    """One comparison.

    Attributes:
        build: ``dim -> Pair``.
        rival: what theirs is, for the table.
        ratio: how many times faster ours must be at the default size.
        memory: most bytes that ours may take in all at the default size.
        tolerance: largest relative difference of outputs on a short input.
    """

    build: Callable[[int], Pair]
    rival: str
    ratio: float
    memory: int
    tolerance: float = 1e-3


def mamba2(dim: int) -> Pair:
    """The default ``mamba2`` and transformers' torch path (its CUDA kernels are not installed on a CPU)."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    ours = Mamba2(dim)
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
    with torch.no_grad():
        for theirs_, ours_ in (
            (theirs.in_proj.weight, ours.in_proj.weight),
            (theirs.conv1d.weight, ours.conv_weight[:, None]),
            (theirs.conv1d.bias, ours.conv_bias),
            (theirs.dt_bias, ours.dt_bias),
            (theirs.A_log, ours.A_log),
            (theirs.D, ours.D),
            (theirs.norm.weight, ours.norm_weight),
            (theirs.out_proj.weight, ours.out_proj.weight),
        ):
            theirs_.copy_(ours_)
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


def local(dim: int) -> Pair:
    """512 tokens to each side, in transformers' Longformer without global tokens; it has no rotary positions and no last projection."""
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    window = 512
    ours = Local(dim, causal=False, window=window, rope=False, bias=True)
    config = LongformerConfig(
        hidden_size=dim,
        num_attention_heads=ours.heads,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    theirs: Any = LongformerSelfAttention(config, layer_id=0)
    with torch.no_grad():
        for theirs_, ours_ in (
            (theirs.query, ours.q_proj),
            (theirs.key, ours.k_proj),
            (theirs.value, ours.v_proj),
        ):
            theirs_.weight.copy_(ours_.weight)
            theirs_.bias.copy_(ours_.bias)
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


CONTESTS: dict[str, Contest] = {
    "mamba2": Contest(mamba2, "transformers Mamba2Mixer", ratio=4.0, memory=2 << 30),
    # Theirs takes about 22 GB at the default size.
    "local": Contest(local, "transformers LongformerSelfAttention", ratio=6.0, memory=3 << 30),
}
