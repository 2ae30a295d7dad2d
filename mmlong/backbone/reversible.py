"""Reversible blocks: activations of one block, whatever the depth.

Two streams run through the stack, and each branch changes one of them by a function of the other (RevNet, Gomez et al. 2017, arXiv 1707.04585; with attention, Reformer,
Kitaev et al. 2020, arXiv 2001.04451):

    y1 = x1 + mixer(norm(x2))
    y2 = x2 + ffn(norm(y1))

so that x2 and x1 follow from y1 and y2, and nothing of the forward is kept but the last two. The backward goes from the last branch to the first: it computes the branch
once more, for its gradient, and takes its value off the stream. That costs about what activation checkpointing costs; checkpointing keeps one tensor a block, this none. The streams begin as
copies of the input, and what goes out is their mean (Reformer concatenates them instead, at twice the width of what follows).

The gradient is the true one up to rounding: what is recomputed is the input as subtraction gives it back. Random numbers and autocast are replayed. States come out with their gradient, so a causal
stack of them streams and trains in segments like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmlong.backbone.block import Block
from mmlong.backbone.replay import RNG, autocast_as_now, refuse_sharded
from mmlong.layout import Layout
from mmlong.mixers import State, rebuild_state, state_tensors

Branch = Callable[[Tensor, State], tuple[Tensor, State]]


class ReversibleBlock(Block):
    """A block whose branches belong to different streams; it takes and gives both."""

    def forward(  # type: ignore[override]
        self, streams: tuple[Tensor, Tensor], state: State = None, layout: Layout | None = None
    ) -> tuple[tuple[Tensor, Tensor], State]:
        """Two streams ``(B, L, D)`` to two, and the mixer's state."""
        x1, x2 = streams
        y, state = self.mix(x2, state, layout)
        x1, x2 = x2, x1 + y
        if self.ffn is not None:
            x1, x2 = x2, x1 + self.feed(x2, layout)
        return (x1, x2), state

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the mixer and the feed-forward: the stack calls the branches and not the block."""
        self.mixer.compile(*args, **options)
        if self.ffn is not None:
            self.ffn.compile(*args, **options)


@dataclass
class _Part:
    """One branch: what it computes, which of the function's tensors it uses, and what must be known to do it again."""

    run: Branch
    mixes: bool
    state: State
    state_at: range
    parameters_at: range
    out_form: State = None
    out_at: range = field(default_factory=lambda: range(0))
    rng: RNG | None = None


def _parts(
    blocks: Iterable[ReversibleBlock], states: Sequence[State], layout: Layout | None
) -> tuple[list[_Part], list[Tensor]]:
    """The branches in order, and the tensors they use: of each the state's, then the parameters."""
    parts: list[_Part] = []
    tensors: list[Tensor] = []

    def add(run: Branch, mixes: bool, state: State, modules: list[nn.Module | None]) -> None:
        here = len(tensors)
        tensors.extend(state_tensors(state))
        between = len(tensors)
        tensors.extend(p for module in modules if module is not None for p in module.parameters())
        parts.append(_Part(run, mixes, state, range(here, between), range(between, len(tensors))))

    for block, state in zip(blocks, states, strict=True):
        add(lambda x, s, b=block: b.mix(x, s, layout), True, state, [block.norm1, block.mixer, block.scale1])  # type: ignore[misc]
        if block.ffn is not None:
            add(lambda x, s, b=block: (b.feed(x, layout), None), False, None, [block.norm2, block.ffn, block.scale2])  # type: ignore[misc]
    return parts, tensors


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: list[_Part], x1: Tensor, x2: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.autocast = autocast_as_now(x1.device.type)
        finals: list[Tensor] = []
        with ctx.autocast():
            for part in parts:
                part.rng = RNG(x1.device)
                y, state = part.run(x2, rebuild_state(part.state, [tensors[i] for i in part.state_at]))
                x1, x2 = x2, x1 + y
                made = state_tensors(state)
                part.out_form, part.out_at = state, range(len(finals), len(finals) + len(made))
                finals += [t.clone() for t in made]
        ctx.parts = parts
        # With one branch, a stream that came in goes out; autograd wants outputs of its own.
        x1, x2 = x1.clone(), x2.clone()
        ctx.save_for_backward(x1, x2, *tensors)
        ctx.mark_non_differentiable(*[t for t in finals if not t.is_floating_point()])
        return (x1, x2, *finals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor, *dfinals: Tensor | None) -> tuple[Tensor | None, ...]:
        x1, x2, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        gradients: list[Tensor | None] = [None] * len(tensors)
        after = RNG(x1.device)
        for part in reversed(ctx.parts):
            with torch.enable_grad(), ctx.autocast():
                part.rng.restore()
                x = x1.detach().requires_grad_()
                before = [tensors[i].detach().requires_grad_(wanted[i]) for i in part.state_at]
                y, state = part.run(x, rebuild_state(part.state, before))
            heads, cotangents = [y], [d2.to(y.dtype)]
            for value, i in zip(state_tensors(state), part.out_at, strict=True):
                if value.requires_grad and (g := dfinals[i]) is not None:
                    heads.append(value)
                    cotangents.append(g.to(value.dtype))
            used = [i for i in (*part.state_at, *part.parameters_at) if wanted[i]]
            handed = dict(zip(part.state_at, before, strict=True))
            found = torch.autograd.grad(
                heads, [x, *(handed.get(i, tensors[i]) for i in used)], cotangents, allow_unused=True
            )
            for i, g in zip(used, found[1:], strict=True):
                gradients[i] = g
            x1, x2 = x2 - y.detach(), x1
            d1, d2 = d2, d1 if found[0] is None else d1 + found[0]
        after.restore()
        return (None, d1, d2, *gradients)


def reversible_stack(
    blocks: Sequence[ReversibleBlock], x: Tensor, states: Sequence[State], layout: Layout | None = None
) -> tuple[Tensor, list[State]]:
    """Blocks in a row.

    Args:
        blocks: in order.
        x: ``(B, L, D)``.
        states: one a block.
        layout: of ``x``.

    Returns:
        ``(y, states)``: the mean of both streams ``(B, L, D)``, and the states after it.

    Raises:
        ValueError: FSDP has sharded the blocks.
    """
    if not torch.is_grad_enabled():
        streams, after = (x, x), []
        for block, state in zip(blocks, states, strict=True):
            streams, state = block(streams, state, layout)
            after.append(state)
        return (streams[0] + streams[1]) / 2, after
    for block in blocks:
        refuse_sharded(block, "a reversible stack")
    parts, tensors = _parts(blocks, states, layout)
    x1, x2, *finals = _Reversible.apply(parts, x, x, *tensors)
    after = []
    for part in parts:
        if part.mixes:
            after.append(rebuild_state(part.out_form, [finals[i] for i in part.out_at]))
            part.out_form = None  # it would live as long as the graph
    return (x1 + x2) / 2, after
