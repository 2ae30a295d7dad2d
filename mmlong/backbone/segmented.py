"""Exact training at any length in bounded memory.

A streaming model gives the same result in pieces with the state carried. So run the pieces forward without a graph, keeping only the states between
them; then go from the last piece to the first, recompute each with a graph, and hand the gradient with respect to the incoming state to the piece
before. The sum is the full gradient, not truncated back-propagation: activations of one segment, plus the states.

The loss is part of the segment, so no full-length embedding, feature or logit exists. It is one autograd function whose inputs are the parameters, so
``loss.backward()``, accumulation, clipping and DDP's hooks see nothing unusual. Random numbers are replayed: each segment's recomputation starts from the
generator state that its forward started from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import State, detach_state, rebuild_state, require_streaming, state_tensors

Step = Callable[[list[Tensor], State, Layout | None], tuple[Tensor, State]]


@dataclass
class _Plan:
    """What the autograd function must know beside tensors."""

    step: Step
    bounds: list[tuple[int, int]]
    layout: Layout | None
    inputs: int
    state: State
    state_tensors: int
    out_state: State = None


class _RNG:
    """The generators' states of the CPU and of the device in use, to be put back for a replay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


def _autocast_as_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


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
        states, rngs, total = [], [], None
        for k in range(len(plan.bounds)):
            states.append(state)
            rngs.append(_RNG(device))
            piece, layout = _piece(plan, inputs, k)
            loss, state = plan.step(piece, state, layout)
            total = loss if total is None else total + loss
        assert total is not None
        ctx.plan, ctx.states, ctx.rngs = plan, states, rngs
        ctx.autocast = _autocast_as_now(device.type)
        ctx.save_for_backward(*tensors)
        plan.out_state = state
        finals = state_tensors(state)
        ctx.mark_non_differentiable(*[t for t in finals if not t.is_floating_point()])
        # Views would tie the outputs to buffers of the step; autograd wants tensors of their own.
        return (total.clone(), *[t.clone() for t in finals])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *dfinals: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        tensors = ctx.saved_tensors
        inputs, parameters = tensors[: plan.inputs], tensors[plan.inputs + plan.state_tensors :]
        wanted = ctx.needs_input_grad[1:]
        dinputs = [torch.zeros_like(t) if wanted[i] else None for i, t in enumerate(inputs)]
        trained = [i for i, p in enumerate(parameters) if wanted[plan.inputs + plan.state_tensors + i]]
        dparameters: list[Tensor | None] = [None] * len(parameters)
        dstate: list[Tensor | None] = list(dfinals)
        after = _RNG(inputs[0].device)
        for k in reversed(range(len(plan.bounds))):
            with torch.enable_grad(), ExitStack() as stack:
                stack.enter_context(ctx.autocast())
                ctx.rngs[k].restore()
                piece, layout = _piece(plan, inputs, k)
                piece = [t.detach().requires_grad_(bool(wanted[i])) for i, t in enumerate(piece)]
                before = [t.detach().requires_grad_(t.is_floating_point()) for t in state_tensors(ctx.states[k])]
                loss, state = plan.step(piece, rebuild_state(ctx.states[k], before), layout)
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
                if (g := next(found)) is not None:
                    dparameters[i] = g if dparameters[i] is None else dparameters[i] + g  # type: ignore[operator]
            ctx.states[k] = None
        after.restore()
        return (None, *dinputs, *dstate, *dparameters)


def segmented_loss(
    module: nn.Module,
    step: Step,
    inputs: Sequence[Tensor],
    segment: int,
    state: State = None,
    layout: Layout | None = None,
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

    Returns:
        ``(loss, state)``: the sum over all segments, and the final state; gradients flow through both, and into ``state`` and the inputs.

    Raises:
        ValueError: the module does not stream, ``segment < 1``, or the inputs differ in length.
    """
    require_streaming(module, "training in segments")
    lengths = {t.shape[1] for t in inputs}
    if segment < 1 or len(lengths) != 1:
        raise ValueError(f"training in segments needs segment >= 1 and inputs of one length; got {segment}, {lengths}")
    length = lengths.pop()
    bounds = [(i, min(i + segment, length)) for i in range(0, length, segment)]
    if len(bounds) == 1 or not torch.is_grad_enabled():
        total = None
        for start, stop in bounds:
            piece = None if layout is None else layout.slice(start, stop)
            loss, state = step([t[:, start:stop] for t in inputs], state, piece)
            total = loss if total is None else total + loss
        assert total is not None
        return total, state
    parameters = [p for p in module.parameters() if p.requires_grad]
    before = state_tensors(state)
    plan = _Plan(step, bounds, layout, len(inputs), detach_state(state), len(before))
    loss, *finals = _Segmented.apply(plan, *inputs, *before, *parameters)
    return loss, rebuild_state(plan.out_state, finals)
