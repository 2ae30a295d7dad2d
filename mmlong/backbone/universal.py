"""Depth recurrence: the same parts again and again, for as many steps as each token asks for.

Follows the Universal Transformer, Dehghani et al. 2018 (arXiv 1807.03819), with adaptive computation time (Graves 2016, arXiv 1603.08983). With ``T`` steps at most, the parts' output of step ``t`` at a token being ``h_t = inner(h_{t-1} + e_t)``, ``e_t`` learned:

    p_t = sigmoid(w . h_t + b);       a token halts at the first N with  p_1 + .. + p_N >= 1 - eps,  or at T
    y = sum_{t < N} p_t h_t + R h_N,       R = 1 - sum_{t < N} p_t

A token that has halted keeps its last ``h`` for those that still look at it. A loss of its own (:mod:`mmlong.mixers.own_loss`), ``ponder (N + R)`` a token, is what makes steps cost something; ``halting=False`` takes all ``T`` steps and gives the last.

Departure: positions are the inner mixers' own, where the paper adds sines at every step. The state is the inner parts' state of every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.backbone.part import Part, register_part
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked

EPSILON = 0.01
"""What the probabilities may lack of 1 where a token halts."""


@register_part("universal")
class Universal(Part):
    """Parts that run up to ``steps`` times.

    Args:
        inner: the parts.
        steps: T.
        dim: width D.
        halting: tokens decide when to stop.
        ponder: what a step costs in the loss, in nats a token.

    Raises:
        ValueError: no steps, or a negative cost.
    """

    def __init__(self, inner: nn.Module, steps: int, dim: int, halting: bool = True, ponder: float = 0.001) -> None:
        super().__init__(inner)
        if steps < 1 or not ponder >= 0:
            raise ValueError(
                f"depth recurrence needs at least 1 step and a cost of at least 0, got {steps} and {ponder}"
            )
        self.ponder = ponder
        self.step_embed = nn.Parameter(0.02 * torch.randn(steps, dim))
        self.halt = nn.Linear(dim, 1) if halting else None
        if self.halt is not None:
            # As in the authors' code: at first a token would go on for long.
            nn.init.ones_(self.halt.bias)

    @property
    def has_own_loss(self) -> bool:
        """Whether steps cost something."""
        return self.halt is not None and self.ponder > 0

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and a tuple of states, one a step."""
        T = self.step_embed.shape[0]
        states = [None] * T if state is None else state
        after: list[State] = []
        h, y = x, torch.zeros_like(x)
        # Summed probabilities, steps taken, and what was left at the last.
        total = x.new_zeros(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
        steps, rest, going = torch.zeros_like(total), torch.zeros_like(total), torch.ones_like(total, dtype=torch.bool)
        for t in range(T):
            found, left = self.inner(h + self.step_embed[t].to(h.dtype), states[t], layout)
            after.append(left)
            if self.halt is None:
                h = y = found
                continue
            h = torch.where(going[..., None], found, h)
            p = torch.sigmoid(self.halt(h)[..., 0].to(total.dtype))
            stops = going & ((total + p >= 1 - EPSILON) | (t == T - 1))
            weight = torch.where(stops, 1 - total, p) * going
            y = y + weight[..., None].to(y.dtype) * h
            steps, rest = steps + going, rest + torch.where(stops, 1 - total, 0)
            total, going = total + torch.where(going & ~stops, p, 0), going & ~stops
        if self.has_own_loss and self.training and own_loss_asked():
            valid = None if layout is None else layout.valid(x.shape[1])
            cost = steps + rest if valid is None else torch.where(valid, steps + rest, 0)
            tokens = cost.numel() if valid is None else valid.sum()
            add_own_loss(self, self.ponder * cost.sum(), tokens)
        return y, tuple(after) if self.streaming else None
