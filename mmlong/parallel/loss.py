"""One sequence over several ranks: each holds a piece, the states travel forward and their gradients back.

The same idea as training in segments (:mod:`mmlong.backbone.segmented`), over ranks instead of over time, and from the same contract: ``y, state = module(x, state, layout)``. A rank receives
the state from the one before it, runs its own piece, and hands the state on; in the backward it receives the gradient of what it handed on, and hands back the gradient of what it received. Nothing is
asked of the module but that it streams, so every streaming mixer, block, backbone and model works. With ``segment`` a rank runs its piece in segments itself, so that it
holds the activations of one; without, the graph of its piece is kept.

A state says nothing before the tokens that made it were seen, so a rank waits for the one before it. What keeps the ranks busy is that the rows of a batch are independent: rank r works on rows i while rank
r + 1 works on the rows before them. Of R ranks and M groups of rows, each rank idles for (R - 1) / (R - 1 + M) of the time, in the forward and in the backward alike (the bubble of
GPipe, Huang et al. 2019, arXiv 1811.06965). One single row gives no speed, only room: R times the memory.

Random numbers. Each rank's draws for a segment are seeded by the call's seed (the first rank's; all ranks take one number from their global generator), the first of its rows and the position of its first token in
the whole sequence. So dropout does not depend on how many ranks there are, as long as the pieces are whole segments; where they are not, the segments, and with them the masks, are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmlong.backbone.replay import refuse_sharded
from mmlong.backbone.segmented import Keep, Step, check_keep, segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import State, detach_state, rebuild_state, require_streaming, select_rows, state_tensors
from mmlong.parallel.exchange import Chain
from mmlong.parallel.experts import refuse_experts_of_one_sequence
from mmlong.parallel.mesh import rows_of

Reduce = Literal["sum", "mean"]


@dataclass
class _Plan:
    """What the autograd function must know beside tensors."""

    module: nn.Module
    step: Step
    chain: Chain
    layout: Layout | None
    inputs: int
    state: State
    state_tensors: int
    segment: int
    keep: Keep
    truncate: bool
    rows: list[tuple[int, int]]
    start: int
    seed: int
    reduce: Reduce


@dataclass
class _Kept:
    """One group of rows between forward and backward: its graph's ends."""

    inputs: list[Tensor]
    before: list[Tensor]
    loss: Tensor | None
    after: list[Tensor]


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, none of which can stand for another (stirred as SplitMix64 does)."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed + number + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9) % 2**64
        mixed ^= mixed >> 27
        mixed = (mixed * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


def _run_rows(plan: _Plan, inputs: Sequence[Tensor], state: State, first: int, last: int) -> tuple[Tensor, State]:
    """This rank's piece of some rows, by segments."""
    seeded = plan.module.training

    def step(pieces: list[Tensor], state: State, layout: Layout | None) -> tuple[Tensor, State]:
        *pieces, where = pieces
        if seeded:
            torch.manual_seed(seed_of(plan.seed, first, int(where[0, 0])))
        return plan.step(pieces, state, layout)

    length = inputs[0].shape[1]
    # The position of each token goes with it, on the CPU, where looking at it waits for nothing.
    where = torch.arange(plan.start, plan.start + length)[None]
    return segmented_loss(
        plan.module, step, [*inputs, where], min(plan.segment, length), state, rows_of(plan.layout, first, last), plan.keep, plan.truncate
    )  # fmt: skip


def _forward(plan: _Plan, inputs: Sequence[Tensor], given: State, graph: bool) -> tuple[Tensor, list[_Kept]]:
    """All rows through this rank's piece; the sum of their losses over all ranks, and the graphs."""
    chain, kept = plan.chain, []
    total = torch.zeros(2, dtype=torch.float64, device=inputs[0].device)
    devices = [inputs[0].device] if inputs[0].is_cuda else []
    with torch.random.fork_rng(devices, enabled=plan.module.training):
        for first, last in plan.rows:
            came = select_rows(given, slice(first, last)) if chain.first else chain.receive()
            here = [t[first:last] for t in inputs]
            before = state_tensors(detach_state(came))
            if graph:
                here = [t.detach().requires_grad_(t.requires_grad) for t in here]
                for t in before:
                    t.requires_grad_(t.is_floating_point() and not plan.truncate)
            if inputs[0].shape[1] == 0:
                # Nothing of these rows lies here: the state goes through.
                loss, after = None, rebuild_state(came, before)
            else:
                with torch.set_grad_enabled(graph):
                    loss, after = _run_rows(plan, here, rebuild_state(came, before), first, last)
                total[0] += loss.detach()
                total[1] += loss.dtype == torch.float64
            if not chain.last:
                chain.send(detach_state(after))
            if graph:
                kept.append(_Kept(here, before, loss, state_tensors(after)))
    chain.finish()
    # Summed in float64 by all ranks, also by those that had nothing and do not know the loss's type.
    chain.reduce(total)
    return total[0].to(torch.float64 if total[1] > 0 else torch.float32), kept


class _SequenceParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        state = rebuild_state(plan.state, tensors[plan.inputs : plan.inputs + plan.state_tensors])
        total, ctx.kept = _forward(plan, tensors[: plan.inputs], state, graph=True)
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        chain, tensors, wanted = plan.chain, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if not ctx.kept:
            raise RuntimeError(
                "the graph of a sequence-parallel loss is let go in its backward: compute the loss again"
            )
        states = slice(plan.inputs, plan.inputs + plan.state_tensors)
        parameters = tensors[states.stop :]
        trained = [p for p, asked in zip(parameters, wanted[states.stop :], strict=True) if asked]
        sums: list[Tensor | None] = [None] * len(trained)
        dinputs = [torch.zeros_like(t) if asked else None for t, asked in zip(tensors, wanted, strict=True)][
            : states.stop
        ]
        while ctx.kept:
            kept = ctx.kept.pop()
            first, last = plan.rows[len(ctx.kept)]
            handed = [t for t in kept.after if t.is_floating_point()]
            pairs = [] if kept.loss is None else [(kept.loss, dloss)]
            if not (chain.last or plan.truncate):
                pairs += zip(handed, chain.receive_back(handed), strict=True)
            pairs = [(value, gradient.to(value.dtype)) for value, gradient in pairs if value.requires_grad]
            asked = [t for t in kept.before if t.requires_grad]
            leaves = [*[t for t in kept.inputs if t.requires_grad], *asked, *trained]
            heads, cotangents = [value for value, _ in pairs], [gradient for _, gradient in pairs]
            found: Any = [None] * len(leaves)
            if heads:
                found = torch.autograd.grad(heads, leaves, cotangents, allow_unused=True)
            at = iter(found)
            for i, t in enumerate(kept.inputs):
                if t.requires_grad and (g := next(at)) is not None:
                    dinputs[i][first:last] = g  # type: ignore[index]
            dbefore = [g if (g := next(at)) is not None else torch.zeros_like(t) for t in asked]
            if not chain.first and not plan.truncate:
                chain.send_back(dbefore)
            elif chain.first:
                for i, g in zip([i for i, t in enumerate(kept.before) if t.requires_grad], dbefore, strict=True):
                    if (whole := dinputs[plan.inputs + i]) is not None:
                        whole[first:last] = g
            for i, g in enumerate(at):
                sums[i] = g if sums[i] is None else sums[i] if g is None else sums[i] + g
        chain.finish()
        gradients = iter(_reduced(plan, trained, sums))
        return (None, *dinputs, *[next(gradients) if asked else None for asked in wanted[states.stop :]])


def _reduced(plan: _Plan, trained: list[Tensor], sums: list[Tensor | None]) -> list[Tensor | None]:
    """The parameters' gradients, over the ranks as ``reduce`` says; ``None`` for what no rank used."""
    chain = plan.chain
    if chain.size == 1:
        return sums
    used = torch.tensor([g is not None for g in sums], dtype=torch.int32, device=chain.device)
    if not used.numel():
        return sums
    found: list[Tensor | None] = []
    for p, g, somewhere in zip(trained, sums, chain.reduce(used, dist.ReduceOp.MAX).tolist(), strict=True):
        if not somewhere:
            found.append(None)
        elif plan.reduce == "mean":
            found.append(torch.zeros_like(p) if g is None else g * chain.size)
        else:
            # A tensor of its own, since what autograd gave may be shared between parameters; and in one memory format on all ranks, since bytes are what is added.
            g = torch.zeros_like(p) if g is None else g
            found.append(chain.reduce(g.clone(memory_format=torch.contiguous_format)))
    return found


def sequence_parallel_loss(
    module: nn.Module,
    step: Step,
    inputs: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    layout: Layout | None = None,
    state: State = None,
    segment: int | None = None,
    keep: Keep = 1,
    truncate: bool = False,
    rows: int = 1,
    reduce: Reduce = "sum",
) -> Tensor:
    """The summed loss of sequences that lie on several ranks, the same on each, with the exact gradient.

    A collective: every rank of the group must call it, and its backward, with the same module and settings.

    Args:
        module: holds every parameter that ``step`` uses, the same on every rank; must be streaming.
        step: ``(pieces, state, layout) -> (loss, state)`` as for :func:`mmlong.backbone.segmented_loss`: the loss a scalar *sum* over the positions.
        inputs: this rank's piece of each input, ``(B, l, ...)``; ``l`` may differ between ranks and be 0. See :func:`mmlong.parallel.take_piece`.
        group: the ranks that share the sequences, in order; ``None``: this process alone, which gives the same numbers.
        layout: of this rank's piece.
        state: of what came before the whole sequence; the first rank's counts.
        segment: positions that a rank runs at a time, with the activations of one such segment; ``None``: its whole piece, with all activations.
        keep: which states between segments are kept; see :func:`mmlong.backbone.segmented_loss`.
        truncate: cut the state's gradient between segments and between ranks.
        rows: how many rows go through the ranks together. Fewer make the bubble smaller, more make the products larger.
        reduce: what the backward does with the parameters' gradients: ``"sum"``: adds them over the group, so that every rank has the whole gradient. ``"mean"``: leaves each
            rank the part of its own piece, times the number of ranks, for a reducer that averages over all ranks, as DDP's does.

    Returns:
        the loss, a scalar in float32 (float64 where the step's is). Gradients go to the parameters, to the inputs of this rank and, on the first, to ``state``. They can be asked for once.

    Raises:
        ValueError: the module does not stream or is sharded by FSDP, a setting makes no sense, or the ranks' pieces differ in their rows.
    """
    require_streaming(module, "sequence parallelism")
    refuse_sharded(module, "sequence parallelism")
    refuse_experts_of_one_sequence(module, group, "sequence parallelism")
    check_keep(keep)
    lengths = {t.shape[1] for t in inputs}
    if len(lengths) != 1 or rows < 1 or (segment is not None and segment < 1) or reduce not in ("sum", "mean"):
        raise ValueError(
            "sequence parallelism needs inputs of one length, segment >= 1, rows >= 1 and reduce 'sum' or 'mean'; "
            f"got {lengths}, {segment}, {rows} and {reduce!r}"
        )
    batch, length = inputs[0].shape[:2]
    chain = Chain(group, inputs[0].device)
    seed = int(torch.randint(2**62, ())) if module.training else 0
    said = chain.gather([batch, rows, seed, length])
    if len({(theirs[0], theirs[1]) for theirs in said}) > 1 or not any(theirs[3] for theirs in said):
        raise ValueError(
            "the ranks of a sequence must hold pieces of the same rows, and not all of them empty; (rows, rows at a time, length) by rank: "
            + ", ".join(f"({theirs[0]}, {theirs[1]}, {theirs[3]})" for theirs in said)
        )
    if truncate or not chain.first:
        state = detach_state(state)
    parameters = [p for p in module.parameters() if p.requires_grad]
    before = state_tensors(state)
    plan = _Plan(
        module, step, chain, layout, len(inputs), detach_state(state), len(before), segment or max(length, 1), keep, truncate,
        [(first, min(first + rows, batch)) for first in range(0, batch, rows)], sum(theirs[3] for theirs in said[: chain.rank]),
        said[0][2], reduce,
    )  # fmt: skip
    if not torch.is_grad_enabled():
        return _forward(plan, inputs, state, graph=False)[0]
    return _SequenceParallel.apply(plan, *inputs, *before, *parameters)
