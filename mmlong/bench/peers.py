"""Other people's modules of the same mechanism: which mixer each stands against, which package it is in, and how to build the two sides.

Where the two compute the same function they are given the same weights, and outputs and gradients are compared before anything is timed (``same``). Another peer is one more function under
``@register_peer``; nothing is imported before it is built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.mixers import create_mixer
from mmlong.registry import Registry

Run = Callable[[Tensor], Tensor]


class MissingPackageError(ImportError):
    """A peer's package is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Pair:
    """Two modules, and how to run each on ``x (B, L, D)``."""

    ours: nn.Module
    theirs: nn.Module
    run_ours: Run
    run_theirs: Run


@dataclass(frozen=True)
class Peer:
    """Somebody else's module of a mechanism.

    Attributes:
        mixer: ours that it stands against.
        package: as pip knows it.
        module: what is imported of it.
        title: what it is, for people.
        build: ``(dim, options of ours) -> Pair``.
        options: of ours, under which the two can be compared; others can be set on top.
        direction: what both sides see.
        same: the two compute the same function.
        tolerance: largest relative difference of outputs and input gradients in float32, where they do.
    """

    mixer: str
    package: str
    module: str
    title: str
    build: Callable[[int, dict[str, Any]], Pair]
    options: dict[str, Any]
    direction: str = "causal"
    same: bool = True
    tolerance: float = 1e-3

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.module) is not None

    def pair(self, dim: int, options: dict[str, Any]) -> Pair:
        """Both sides at a width, with ``options`` on top of the peer's own.

        Raises:
            MissingPackageError: its package is not installed.
        """
        require([self])
        return self.build(dim, {**self.options, **options})


PEERS: Registry[Peer] = Registry("peer")


def register_peer(name: str, **fields: Any) -> Callable[[Callable[[int, dict[str, Any]], Pair]], Any]:
    """Decorator of a builder: its name, and the fields of :class:`Peer` but ``build``."""

    def add(build: Callable[[int, dict[str, Any]], Pair]) -> Any:
        PEERS.register(name)(Peer(build=build, **fields))
        return build

    return add


def peers_of(mixer: str) -> list[str]:
    """Names of the peers that stand against a mixer."""
    return [name for name in PEERS.names() if PEERS[name].mixer == mixer]


def require(peers: list[Peer]) -> None:
    """Raise :class:`MissingPackageError` naming every package that is not installed."""
    if missing := sorted({peer.package for peer in peers if not peer.installed}):
        raise MissingPackageError(
            f"{', '.join(missing)}: not installed. pip install {' '.join(missing)}, or all peers: pip install 'mmlong[bench]'"
        )


def _copy(pairs: list[tuple[Any, Any]]) -> None:
    """Second to first."""
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)


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
    _copy(
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
    options={"window": 512, "rope": False, "bias": True},
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
        _copy([(mine.weight, other.weight), (mine.bias, other.bias)])
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


class _Projected(nn.Module):
    """`local-attention` between the projections that ours has too."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        from local_attention import LocalAttention

        self.heads = ours.heads
        self.into = nn.ModuleList(_like(p) for p in _qkv(ours))
        self.out = _like(ours.out_proj)
        self.attend = LocalAttention(
            window_size=ours.window, causal=True, look_backward=1, look_forward=0, exact_windowsize=True, autopad=True,
            use_rotary_pos_emb=False,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``."""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in self.into)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def _like(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, bias=False)


def _qkv(ours: Any) -> tuple[Any, Any, Any]:
    return ours.q_proj, ours.k_proj, ours.v_proj


@register_peer(
    "local-attention",
    mixer="local",
    package="local-attention",
    module="local_attention",
    title="local-attention LocalAttention",
    options={"window": 512, "rope": False},
)
def _local_attention(dim: int, options: dict[str, Any]) -> Pair:
    """``window`` tokens before each, without positions, and projections as ours around it."""
    ours: Any = create_mixer("local", dim, **options)
    theirs = _Projected(ours)
    _copy([(mine.weight, other.weight) for mine, other in zip(theirs.into, _qkv(ours), strict=True)])
    _copy([(theirs.out.weight, ours.out_proj.weight)])
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
