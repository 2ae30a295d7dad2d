"""Exact training at any length in bounded memory.

A streaming model gives the same result in pieces with the state carried. So run the pieces forward without a graph, keeping only the states between
them; then go from the last piece to the first, recompute each with a graph, and hand the gradient with respect to the incoming state to the piece
before. The sum is the full gradient, not truncated back-propagation: activations of one segment, plus the states.

The loss is part of the segment, so no full-length embedding, feature or logit exists. It is one autograd function whose inputs are the parameters, so
``loss.backward()``, accumulation, clipping and DDP's hooks see nothing unusual. Random numbers are replayed: each segment's recomputation starts from the
generator state that its forward started from.

What the states cost is said by each mixer, ``Mixer.state_bytes(length)``, a row in float32. A matrix or diagonal state, a window or a convolution's tail (``mamba2``,
``s4d``, ``local``) has one size at any length, so n segments cost n times that. A dense cache of keys and values (``attention``) or of past inputs (``hyena``) grows, and the states between n segments
together are n / 2 times the last one. Where that is too much, ``keep`` keeps every k-th state (``"sqrt"``: about the root of the number of segments) and the backward computes those between again,
k of them at a time, at the price of one more forward: two-level checkpointing (Chen et al. 2016, arXiv 1604.06174).

Truncated back-propagation is the same with the state's gradient cut between segments (``truncate``), and carrying the state on from batch to batch of one stream (Transformer-XL,
Dai et al. 2019) is giving the detached state that one call returns to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmlong.backbone.replay import RNG, autocast_as_now, refuse_sharded
from mmlong.layout import Layout
from mmlong.mixers import State, detach_state, rebuild_state, require_streaming, state_tensors

Step = Callable[[list[Tensor], State, Layout | None], tuple[Tensor, State]]
Keep = int | Literal["sqrt"]


@dataclass
class _Plan:
    """What the autograd function must know beside tensors."""

    step: Step
    bounds: list[tuple[int, int]]
    layout: Layout | None
    inputs: int
    state: State
    state_tensors: int
    keep: int
    truncate: bool
    out_state: State = None


def _piece(plan: _Plan, inputs: Sequence[Tensor], k: int) -> tuple[list[Tensor], Layout | None]:
    start, stop = plan.bounds[k]
    layout = None if plan.layout is None else plan.layout.slice(start, stop)
    return [t[:, start:stop] for t in inputs], layout


class _Segmented(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[: plan.inputs]
        state = rebuild_state(plan.state, tensors[plan.inputs : plan.inputs + plan.state_tensors])
        device = inputs[0].device
        ctx.autocast = autocast_as_now(device.type)
        ctx.kept, total = {}, None
        with ctx.autocast():
            for k in range(len(plan.bounds)):
                if k % plan.keep == 0:
                    ctx.kept[k] = state, RNG(device)
                piece, layout = _piece(plan, inputs, k)
                loss, state = plan.step(piece, state, layout)
                total = loss if total is None else total + loss
        assert total is not None
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        plan.out_state = state
        finals = state_tensors(state)
        ctx.mark_non_differentiable(*[t for t in finals if not t.is_floating_point()])
        # Views would tie the outputs to buffers of the step; autograd wants tensors of their own.
        return (total.clone(), *[t.clone() for t in finals])

    @staticmethod
    def before(ctx: Any, first: int, inputs: Sequence[Tensor]) -> list[tuple[State, RNG]]:
        """State and generator before each segment from the kept one at ``first`` to the next kept one; those between are computed again."""
        plan: _Plan = ctx.plan
        found = [ctx.kept.pop(first)]
        last = min(first + plan.keep, len(plan.bounds)) - 1
        with torch.no_grad(), ctx.autocast():
            for k in range(first, last):
                state, rng = found[-1]
                if k == first:
                    rng.restore()
                piece, layout = _piece(plan, inputs, k)
                found.append((plan.step(piece, state, layout)[1], RNG(inputs[0].device)))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *dfinals: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        tensors = ctx.saved_tensors
        if not ctx.kept:
            raise RuntimeError("the states of a segmented loss are let go in its backward: compute the loss again")
        inputs, parameters = tensors[: plan.inputs], tensors[plan.inputs + plan.state_tensors :]
        wanted = ctx.needs_input_grad[1:]
        dinputs = [torch.zeros_like(t) if wanted[i] else None for i, t in enumerate(inputs)]
        trained = [i for i in range(len(parameters)) if wanted[plan.inputs + plan.state_tensors + i]]
        dparameters: list[Tensor | None] = [None] * len(parameters)
        owned = [False] * len(parameters)
        dstate: list[Tensor | None] = list(dfinals)
        after = RNG(inputs[0].device)
        befores: list[tuple[State, RNG]] = []
        for k in reversed(range(len(plan.bounds))):
            if not befores:
                befores = _Segmented.before(ctx, k - k % plan.keep, inputs)
            kept, rng = befores.pop()
            with torch.enable_grad(), ExitStack() as stack:
                stack.enter_context(ctx.autocast())
                rng.restore()
                piece, layout = _piece(plan, inputs, k)
                piece = [t.detach().requires_grad_(bool(wanted[i])) for i, t in enumerate(piece)]
                before = [
                    t.detach().requires_grad_(t.is_floating_point() and not plan.truncate) for t in state_tensors(kept)
                ]
                loss, state = plan.step(piece, rebuild_state(kept, before), layout)
            heads, cotangents = [], []
            for value, gradient in zip([loss, *state_tensors(state)], [dloss, *dstate], strict=True):
                if gradient is not None and value.requires_grad:
                    heads.append(value)
                    cotangents.append(gradient.to(value.dtype))
            asked = [t for t in piece if t.requires_grad] + [t for t in before if t.requires_grad]
            leaves = asked + [parameters[i] for i in trained]
            found = iter(
                torch.autograd.grad(heads, leaves, cotangents, allow_unused=True) if heads else [None] * len(leaves)
            )
            start, stop = plan.bounds[k]
            for i, t in enumerate(piece):
                if t.requires_grad and (g := next(found)) is not None:
                    dinputs[i][:, start:stop] = g  # type: ignore[index]
            dstate = [next(found) if t.requires_grad else None for t in before]
            for i in trained:
                if (g := next(found)) is None:
                    continue
                total = dparameters[i]
                if total is None:
                    dparameters[i] = g
                elif owned[i]:
                    total += g
                else:
                    # What autograd gave may be shared between parameters; only a sum of our own is added to in place.
                    dparameters[i], owned[i] = total + g, True
        after.restore()
        return (None, *dinputs, *dstate, *dparameters)


def check_keep(keep: Any, what: str = "keep") -> None:
    """Raise ``ValueError`` unless ``keep`` is a number of segments or ``"sqrt"``."""
    if keep != "sqrt" and (isinstance(keep, bool | str) or keep < 1):
        raise ValueError(
            f"{what} is {keep!r}; it is a number of segments of at least 1 (every k-th state is kept) or 'sqrt'"
        )


def segmented_loss(
    module: nn.Module,
    step: Step,
    inputs: Sequence[Tensor],
    segment: int,
    state: State = None,
    layout: Layout | None = None,
    keep: Keep = 1,
    truncate: bool = False,
) -> tuple[Tensor, State]:
    """The summed loss of a sequence, with the exact gradient and the activations of one segment.

    Args:
        module: holds every parameter that ``step`` uses; must be streaming.
        step: ``(pieces, state, layout) -> (loss, state)`` for one segment: ``pieces`` are the inputs' slices ``(B, l, ...)`` in order, the loss a scalar
            *sum* over the segment's positions (divide by the count afterwards), the state what the module returned.
        inputs: tensors ``(B, L, ...)``, e.g. tokens and targets.
        segment: positions in a segment; the last may be shorter.
        state: of what came before, or ``None``.
        layout: of the whole sequence.
        keep: keep every ``keep``-th state between segments and compute those between again in the backward; ``"sqrt"``: about as many as there are then between two.
        truncate: cut the state's gradient between segments, and between ``state`` and the first.

    Returns:
        ``(loss, state)``: the sum over all segments, and the final state; gradients flow through both, and into ``state`` and the inputs. They can be asked for once.

    Raises:
        ValueError: the module does not stream or is sharded by FSDP, ``segment < 1``, ``keep`` makes no sense, or the inputs differ in length.
    """
    require_streaming(module, "training in segments")
    check_keep(keep)
    lengths = {t.shape[1] for t in inputs}
    if segment < 1 or len(lengths) != 1:
        raise ValueError(f"training in segments needs segment >= 1 and inputs of one length; got {segment}, {lengths}")
    length = lengths.pop()
    bounds = [(i, min(i + segment, length)) for i in range(0, length, segment)]
    if truncate:
        state = detach_state(state)
    if len(bounds) == 1 or not torch.is_grad_enabled():
        total = None
        for start, stop in bounds:
            piece = None if layout is None else layout.slice(start, stop)
            loss, state = step([t[:, start:stop] for t in inputs], state, piece)
            total = loss if total is None else total + loss
        assert total is not None
        return total, state
    refuse_sharded(module, "training in segments")
    parameters = [p for p in module.parameters() if p.requires_grad]
    before = state_tensors(state)
    every = math.ceil(math.sqrt(len(bounds))) if keep == "sqrt" else keep
    plan = _Plan(step, bounds, layout, len(inputs), detach_state(state), len(before), every, truncate)
    loss, *finals = _Segmented.apply(plan, *inputs, *before, *parameters)
    # The plan lives as long as the graph, and the last state need not live in it too.
    form, plan.out_state = plan.out_state, None
    return loss, rebuild_state(form, finals)
