"""Directions: how causal mixers come to see both sides.

- ``causal``: every mixer sees the past only.
- ``alternate``: every second block runs its mixer over the reversed sequence (as in Vision Mamba's cheaper variants and bidirectional
  RNN stacks), so two blocks see both sides at the cost of one direction each.
- ``both``: every block runs two mixers, one each way, and adds their outputs.

A mixer that is bidirectional by itself (its traits say so) is simply built with ``causal=False`` under the last two.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import MIXERS, State, create_mixer

Direction = Literal["causal", "alternate", "both"]


class Reversed(nn.Module):
    """A causal mixer run from the end of each row to its beginning."""

    causal = False
    streaming = False

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, no state."""
        layout = layout or Layout()
        y, _ = self.mixer(layout.flip_tokens(x), state, layout.flip(x.shape[1]))
        return layout.flip_tokens(y), None


class BothWays(nn.Module):
    """The sum of one mixer over the sequence and another over its reverse."""

    causal = False
    streaming = False

    def __init__(self, forwards: nn.Module, backwards: nn.Module) -> None:
        super().__init__()
        self.forwards = forwards
        self.backwards = Reversed(backwards)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, no state."""
        return self.forwards(x, state, layout)[0] + self.backwards(x, None, layout)[0], None


def create_directed(spec: str | dict[str, Any], dim: int, direction: Direction, index: int) -> nn.Module:
    """The mixer of block ``index`` under a direction.

    Args:
        spec: a registered name, or ``{"name": ..., **options}``.
        dim: width.
        direction: ``causal``, ``alternate`` or ``both``.
        index: the block's place in depth; odd ones run in reverse under ``alternate``.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name")
    if direction == "causal":
        return create_mixer(name, dim, causal=True, **options)
    if direction not in ("alternate", "both"):
        raise ValueError(f"unknown direction {direction!r}; known: causal, alternate, both")
    if MIXERS[name].traits.bidirectional:
        return create_mixer(name, dim, causal=False, **options)
    if direction == "both":
        return BothWays(
            create_mixer(name, dim, causal=True, **options), create_mixer(name, dim, causal=True, **options)
        )
    mixer = create_mixer(name, dim, causal=True, **options)
    return Reversed(mixer) if index % 2 else mixer
