"""Reverse-complement equivariance: a model that says the same of a stretch of DNA whichever strand it is given.

After Caduceus (Schiff et al. 2024, arXiv 2403.03234). The channels are two halves, one a strand: ``x = [x_a, x_b]``. The reverse complement of features
exchanges the halves and reverses the positions, ``RC [x_a, x_b] = [R x_b, R x_a]`` with ``R`` the reversal within each row's length. Any module ``m`` with
the mixer's signature, at half the width, becomes equivariant::

    f(x) = [m(x_a), R m(R x_b)]          so          f(RC x) = [m(R x_b), R m(x_a)] = RC f(x)

whatever ``m`` is: a mixer, a block, or a whole backbone with its norms, feed-forwards and pooling, all of them shared by both strands. Here ``m`` sees the
strands as rows of one batch of twice the size.

Departures: Caduceus also reverses the order of the channels of the second half, which only renames them; it wraps each mixer, norm and feed-forward by
itself, which computes the same, since nothing in it mixes the strands before the head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import State


def reverse_complement_features(x: Tensor, layout: Layout | None = None) -> Tensor:
    """Features of the other strand: ``(B, L, D)`` with halves exchanged and positions reversed within each row's length; its own inverse."""
    return (layout or Layout()).flip_tokens(x.roll(x.shape[-1] // 2, -1))


def split_strands(x: Tensor, layout: Layout | None = None) -> tuple[Tensor, Layout]:
    """Two strands in the channels to twice as many rows.

    Args:
        x: ``(B, L, D)``, D even.
        layout: of ``x``.

    Returns:
        ``(2 B, L, D / 2)``, first the rows as they are, then those of the other strand in its own direction, and their layout.

    Raises:
        ValueError: odd D, or a grid: a strand has one axis.
    """
    layout = layout or Layout()
    if x.shape[-1] % 2:
        raise ValueError(f"each strand takes half of the channels, so their number must be even; got {x.shape[-1]}")
    if layout.grid is not None:
        raise ValueError(f"a reverse complement is of sequences along one axis, not of a grid {layout.grid}")
    here, there = x.chunk(2, dim=-1)
    other = layout.flip(x.shape[1])

    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        return torch.cat([a.expand(x.shape[0], *a.shape[1:]), b.expand(x.shape[0], *b.shape[1:])])

    rows = replace(
        layout,
        lengths=both(layout.lengths, layout.lengths),
        resets=both(layout.resets, other.resets),
        positions=both(layout.positions, other.positions),
    )
    return torch.cat([here, layout.flip_tokens(there)]), rows


def join_strands(y: Tensor, layout: Layout | None = None) -> Tensor:
    """The inverse of :func:`split_strands`: ``(2 B, L, d)`` to ``(B, L, 2 d)``; ``layout`` is that of the ``B`` rows."""
    rows = y.shape[0] // 2
    here, there = (
        y[:rows],
        y[rows:],
    )  # not chunk: an exported program cannot split a number of rows that it does not know
    return torch.cat([here, (layout or Layout()).flip_tokens(there)], dim=-1)


class ReverseComplement(nn.Module):
    """A module made equivariant: ``f(RC x) = RC f(x)``.

    Args:
        module: anything with the mixer's signature that keeps the length, of half the width. It should see both sides: a causal one gives each half of the
            channels one side only.
    """

    causal = False
    streaming = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, no state.

        Raises:
            ValueError: a state, odd D, or a grid.
        """
        if state is not None:
            raise ValueError("ReverseComplement was given a state but has none: it sees both sides")
        rows, both = split_strands(x, layout)
        y: Any = self.module(rows, None, both)[0]
        return join_strands(y, layout), None
