"""What a peer is: somebody else's module of one of our mechanisms, and how the two sides of a comparison are built.

Where the two compute the same function they are given the same weights, and outputs and gradients are compared before anything is timed (``same``). Nothing is imported before it is built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def copy_weights(pairs: list[tuple[Any, Any]]) -> None:
    """Second to first."""
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)


def like(linear: nn.Linear) -> nn.Linear:
    """Another of the same shape."""
    return nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)


def projections(ours: Any) -> tuple[Any, Any, Any]:
    """Of queries, keys and values."""
    return ours.q_proj, ours.k_proj, ours.v_proj


class Projected(nn.Module):
    """Another package's ``attend(q, k, v)``, ``(B, H, L, d)`` each, between the projections that ours has too, with the same weights."""

    def __init__(self, ours: Any, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = ours.heads
        self.into = nn.ModuleList(like(p) for p in projections(ours))
        self.out = like(ours.out_proj)
        self.attend = attend
        for mine, other in zip((*self.into, self.out), (*projections(ours), ours.out_proj), strict=True):
            copy_weights(list(zip(mine.parameters(), other.parameters(), strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``."""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in self.into)
        y: Tensor = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return y
