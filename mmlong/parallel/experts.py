"""Experts over ranks: each rank has some of them, and tokens travel to their experts and back (expert parallelism).

Follows GShard (Lepikhin et al. 2020, arXiv 2006.16668) and the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961): of ``E`` experts each of ``R`` ranks keeps ``E / R`` neighbours, while routers and all else are on every rank. Ranks hold different tokens, as in data parallelism. In every call they tell each other
how many of their tokens chose which expert; then two all-to-alls bring tokens to experts and results to tokens, and in the backward two more bring the gradients the other way.

    expert_parallel(model)                          # after weights are loaded or drawn alike, before the optimiser is made
    leave_experts_to_their_ranks(model)             # DDP is not to average what ranks have each for themselves
    ddp = DistributedDataParallel(model)
    ddp(x)...backward()
    clip_grad_norm_over_ranks(model, 1.0)           # torch's own would be another norm on every rank
    with whole_experts(model):                      # on every rank; in it the model is that of one process
        if dist.get_rank() == 0: save_model(model, folder)

All of it is what one process computes whose rows are those of rank 0, then of rank 1, and so on:

    capacity    of all ranks' tokens; who finds no room is decided in that order, and :attr:`Experts.dropped` is the whole count, on every rank
    balance     f_e, the share of tokens whose first choice is e, is of all ranks; each rank hands in the part of its own tokens, and the parts over all tokens are the loss of one process. f_e has no gradient, so nothing else need be exchanged
    z           a mean over tokens: each rank's own

Gradients. DDP takes the mean over ranks of what each has. An expert sees the tokens of all ranks, so its gradient is their sum already: with ``reduce="mean"`` it is divided by the number of ranks (inside the graph, so accumulation and segments change nothing), and is what DDP would have; with ``"sum"`` it is not.

Every rank runs every forward and backward, as many times as the others, also where it has no tokens. Ranks of one sequence do not (:func:`mmlong.parallel.sequence_parallel_loss` lets one wait for the other): spread experts over the ranks that hold other sequences (``SequenceMesh.data_group``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmlong.backbone.experts import Experts
from mmlong.parallel.exchange import Chain

Taken = list[tuple[Tensor, Tensor]]


class ExpertRanks:
    """This rank among those that the experts of one module are spread over.

    Args:
        group: the ranks; ``None``: all of them.
        experts: E.
        reduce: of the experts' gradients.

    Raises:
        ValueError: ``E`` is no multiple of the number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, experts: int, reduce: Literal["mean", "sum"]) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if experts % self.size:
            raise ValueError(
                f"{experts} experts cannot be spread over {self.size} ranks: their number must be a multiple of the ranks"
            )
        self.each = experts // self.size
        self.share = self.size if reduce == "mean" else 1

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertRanks:
        # Process groups belong to the process.
        return self

    def of(self, rank: int) -> range:
        """Experts of a rank."""
        return range(rank * self.each, (rank + 1) * self.each)

    def meet(self, experts: Experts, chosen: Tensor) -> Meeting:
        """Hear how many tokens of every rank chose which expert, ``chosen (n, top)`` being this rank's choices."""
        E = experts.router.out_features
        counts = nn.functional.one_hot(chosen, E).sum(0)
        every = Chain(self.group, chosen.device).gather([chosen.shape[0], *counts.flatten().tolist()])
        return Meeting(self, [row[0] for row in every], torch.tensor([row[1:] for row in every]).view(self.size, -1, E))

    def exchange(self, x: Tensor, sends: list[int], receives: list[int], scale: float) -> Tensor:
        """Rows to every rank, and rows from it; ``scale`` times the gradient comes back."""
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _Exchanged.apply(self.group, anchor, x, sends, receives, scale)


class Meeting:
    """What the ranks know of one call.

    Args:
        ranks: who meets.
        tokens: of every rank.
        counts: int64 ``(R, top, E)``: tokens of a rank whose choice of this number an expert is.

    Attributes:
        tokens: of all ranks.
        first: float64 ``(E,)``, the share of all tokens whose first choice is each.
        kept: tokens of a rank that found room with each expert, by rank and expert; known after :meth:`cut`.
    """

    def __init__(self, ranks: ExpertRanks, tokens: list[int], counts: Tensor) -> None:
        self.ranks, self.tokens, self.counts = ranks, sum(tokens), counts
        self.first = counts[:, 0].sum(0).double() / max(self.tokens, 1)
        self.kept: list[list[int]] = []

    def cut(self, taken: Taken, room: int) -> tuple[Taken, int]:
        """What of this rank finds room, first choices of all ranks before second ones; and how many of all ranks do not."""
        # In the order of one process: by choice, then by rank.
        order = self.counts.transpose(0, 1).flatten(0, 1)
        kept = (room - (order.cumsum(0) - order)).clamp_min(0).minimum(order)
        kept = kept.view(self.counts.shape[1], self.ranks.size, -1).transpose(0, 1)
        own, mine = self.counts[self.ranks.rank].tolist(), kept[self.ranks.rank].tolist()
        found = []
        for e, (choice, token) in enumerate(taken):
            at, places = 0, []
            for c in range(len(own)):
                places.append(torch.arange(at, at + mine[c][e], device=token.device))
                at += own[c][e]
            index = torch.cat(places)
            found.append((choice[index], token[index]))
        self.kept = kept.sum(1).tolist()
        return found, int(self.counts.sum() - kept.sum())

    def run(self, experts: Any, tokens: Sequence[Tensor]) -> Sequence[Tensor]:
        """Results ``(n_e, D)`` for this rank's tokens ``(n_e, D)`` of each of the E experts, wherever those are."""
        ranks, R = self.ranks, self.ranks.size
        mine, own = ranks.of(ranks.rank), self.kept[ranks.rank]
        sends = [sum(own[e] for e in ranks.of(r)) for r in range(R)]
        receives = [sum(self.kept[r][e] for e in mine) for r in range(R)]
        came = ranks.exchange(torch.cat(list(tokens)), sends, receives, ranks.share)
        pieces = came.split([self.kept[r][e] for r in range(R) for e in mine])
        found = []
        for i, e in enumerate(mine):
            y = experts[str(e)](torch.cat(pieces[i :: ranks.each]))
            found.append(y.split([self.kept[r][e] for r in range(R)]))
        back = torch.cat([found[i][r] for r in range(R) for i in range(ranks.each)])
        return ranks.exchange(back, receives, sends, 1 / ranks.share).split(own)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: Any, anchor: Tensor, x: Tensor, sends: list[int], receives: list[int], scale: float
    ) -> Tensor:
        ctx.group, ctx.sends, ctx.receives, ctx.scale = group, sends, receives, scale
        return _all_to_all(group, x, sends, receives)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, _all_to_all(ctx.group, dy, ctx.receives, ctx.sends) * ctx.scale, None, None, None


def _all_to_all(group: Any, x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
    y = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), receives, sends, group=group)
    return y


def _spread(module: nn.Module) -> list[tuple[str, Experts]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Experts) and m.ranks is not None]


def expert_parallel(
    module: nn.Module, group: dist.ProcessGroup | None = None, reduce: Literal["mean", "sum"] = "mean"
) -> nn.Module:
    """Spread all experts in a module over ranks: of each :class:`Experts`, this rank keeps the parameters of its own, under the names that they had.

    Not a collective, but all ranks do it, with the same weights: loaded, or drawn from the same seed.

    Args:
        module: changed in place.
        group: the ranks, which hold different tokens; ``None``: all of them.
        reduce: ``"mean"``: the experts' gradients are what DDP's mean over these ranks would be; ``"sum"``: the sum over all ranks' tokens.

    Returns:
        the module.

    Raises:
        ValueError: no experts, experts spread already, or a number of them that is no multiple of the ranks; then nothing is changed.
    """
    found = [m for m in module.modules() if isinstance(m, Experts)]
    if not found or any(m.ranks is not None for m in found) or reduce not in ("mean", "sum"):
        raise ValueError(
            f"expert parallelism spreads experts (backbone.ffn: switch or st_moe) that are all here, reduce being 'mean' or 'sum'; found {len(found)}, {len(_spread(module))} of them spread, and {reduce!r}"
        )
    made = [ExpertRanks(group, m.router.out_features, reduce) for m in found]
    for m, ranks in zip(found, made, strict=True):
        experts = m.experts
        m.experts = nn.ModuleDict({str(e): experts[e] for e in ranks.of(ranks.rank)})
        m.ranks = ranks
    return module


def own_expert_names(module: nn.Module) -> list[str]:
    """Names of the parameters that are this rank's alone."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, m in _spread(module)
        for name, _ in m.named_parameters()
        if name.startswith("experts.")
    ]


def leave_experts_to_their_ranks(module: nn.Module) -> None:
    """Have DDP neither average nor broadcast what ranks have each for themselves. ``module`` is what DDP (or Lightning: the task) will wrap."""
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, own_expert_names(module))


@contextmanager
def whole_experts(module: nn.Module) -> Iterator[None]:
    """Within it every rank has all experts, as one process has: to save, export, load (``load_state_dict``) or run alone. A collective on entering; what an optimiser holds stays what it is.

    Weights of this rank's own experts that are changed in it stay changed; those of others are copies.
    """
    held = []
    for _, m in _spread(module):
        ranks, own = m.ranks, m.experts
        every: list[nn.Module] = []
        for e in range(m.router.out_features):
            owner, here = divmod(e, ranks.each)
            if owner == ranks.rank:
                one = own[str(e)]
            else:
                one = copy.deepcopy(own[str(ranks.of(ranks.rank)[here])])
                one.zero_grad()
            for p in one.parameters():
                message = p.detach().clone(memory_format=torch.contiguous_format)
                dist.broadcast(message, group=ranks.group, group_src=owner)
                p.data.copy_(message)
            every.append(one)
        held.append((m, ranks, own))
        m.experts, m.ranks = nn.ModuleList(every), None
    try:
        yield
    finally:
        for m, ranks, own in held:
            m.experts, m.ranks = own, ranks


def clip_grad_norm_over_ranks(module: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients to a norm that is that of one process: of what all ranks have alike once, and of all ranks' experts. A collective; returns the norm before.

    Raises:
        ValueError: experts are spread over different groups, or none is.
    """
    spread = _spread(module)
    groups = {m.ranks.group for _, m in spread}
    if len(groups) != 1:
        raise ValueError(f"a norm over ranks is over one group of them, and experts are spread over {len(groups)}")
    own = set(own_expert_names(module))
    named = [(name in own, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    device = next(module.parameters()).device
    dtype = torch.promote_types(next(module.parameters()).dtype, torch.float32)

    def squares(of_experts: bool) -> Tensor:
        found = [g.to(dtype).square().sum() for theirs, g in named if theirs == of_experts]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=dtype, device=device)

    alone = squares(True)
    dist.all_reduce(alone, group=groups.pop())
    norm = (squares(False) + alone).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp_max(1)
    for _, g in named:
        g.mul_(factor.to(g.dtype))
    return norm


def refuse_experts_of_one_sequence(module: nn.Module, group: dist.ProcessGroup | None, power: str) -> None:
    """Raise ``ValueError`` naming ``power`` where experts are spread over ranks that wait for each other's states."""
    if group is None:
        return
    here = set(dist.get_process_group_ranks(group))
    for _, m in _spread(module):
        if len(here & set(dist.get_process_group_ranks(m.ranks.group))) > 1:
            raise ValueError(
                f"{power}: experts are spread over ranks of one sequence, which wait for each other's states and would never meet: spread them over ranks that hold other sequences (SequenceMesh.data_group)"
            )
