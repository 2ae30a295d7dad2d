"""Experts: feed-forwards of which each token uses one or two, chosen by a router.

Follows the Switch Transformer (Fedus, Zoph & Shazeer 2021, arXiv 2101.03961; one expert) and ST-MoE (Zoph et al. 2022, arXiv 2202.08906; two). With ``p = softmax(W x)`` over the ``E`` experts, in float32, and ``T(x)`` the ``top`` largest,

    y = sum_{e in T(x)} g_e expert_e(x);        g = p of the one (Switch), or p over the sum of both (ST-MoE)

In training an expert takes at most ``capacity`` times its even share of the tokens of a call, in the order of rows and time; what does not find room passes by with ``y = 0`` of that expert, and is counted (:attr:`Experts.dropped`). In evaluation there is no such limit, so a token's result depends on nothing
but itself. Two losses of their own (:mod:`mmlong.mixers.own_loss`), averaged over tokens, keep the router in order:

    balance  E sum_e f_e P_e         f_e the share of tokens whose first choice is e, P_e the mean of p_e
    z        (log sum_e exp(W x)_e)^2

Departures: an expert is the house's SwiGLU; nothing is drawn at random (no jitter, and a second expert is always used). In segments the balance is that of each call, as it is of each batch in the papers; over ranks too,
unless the experts are spread over them (:mod:`mmlong.parallel.experts`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.backbone.feedforward import FFNS, SwiGLU
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked
from mmlong.ops.known import followed


class Experts(nn.Module):
    """A router and its experts.

    Args:
        dim: width D.
        ratio: hidden width of an expert over D.
        experts: E.
        top: experts of a token, 1 or 2.
        capacity: in training, of an expert: times its even share of the tokens; ``None`` for no limit.
        balance, z: weights of the losses.

    Raises:
        ValueError: sizes that make no sense.

    Attributes:
        dropped: int64 ``(2,)``, choices that found no room, and choices, since the module was made; not saved.
        ranks: where the experts are that this process does not have; ``None``: it has all (:mod:`mmlong.parallel.experts`).
    """

    ranks: Any = None
    counted_as = "experts are counted as if each took an even share of the tokens, so that none is dropped"
    """What an estimate supposes of values that it does not know."""

    def __init__(
        self,
        dim: int,
        ratio: float,
        experts: int = 8,
        top: int = 1,
        capacity: float | None = 1.25,
        balance: float = 0.01,
        z: float = 0.0,
    ) -> None:
        super().__init__()
        if top not in (1, 2) or experts < top or (capacity is not None and not capacity > 0):
            raise ValueError(
                f"experts: a token uses 1 or 2 of at least as many, and their capacity is above 0; got top {top} of {experts}, capacity {capacity}"
            )
        if not (balance >= 0 and z >= 0):
            raise ValueError(f"experts: weights of losses are at least 0, got balance {balance} and z {z}")
        self.top, self.capacity, self.balance, self.z = top, capacity, balance, z
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts: Any = nn.ModuleList(SwiGLU(dim, ratio) for _ in range(experts))
        self.register_buffer("dropped", torch.zeros(2, dtype=torch.long), persistent=False)
        self.dropped: Tensor

    @property
    def has_own_loss(self) -> bool:
        """Whether the router is kept in order."""
        return self.balance > 0 or self.z > 0

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``.

        Args:
            x: tokens.
            valid: bool ``(B, L)``; others take no room and count in no loss, and get zeros.
        """
        tokens = x.reshape(-1, x.shape[-1])
        places = None if valid is None else valid.reshape(-1).nonzero()[:, 0]
        if places is not None:
            tokens = tokens[places]
        y = self._used(tokens)
        if places is not None:
            y = y.new_zeros(x.shape[0] * x.shape[1], y.shape[1]).index_copy(0, places, y)
        return y.view(x.shape)

    def _used(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(
                x.to(torch.promote_types(x.dtype, torch.float32)),
                self.router.weight.to(torch.promote_types(x.dtype, torch.float32)),
            )
            p = logits.softmax(-1)
        weights, chosen = p.topk(self.top, -1)
        if self.top > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        taken = self._taken(chosen)
        met = None if self.ranks is None else self.ranks.meet(self, chosen)
        tokens = x.shape[0] if met is None else met.tokens
        self._losses(logits, p, chosen, None if met is None else met.first.to(p.dtype).to(p.device))
        room = tokens
        if self.training and self.capacity is not None:
            room = math.ceil(self.capacity * self.top * tokens / p.shape[1])
        if met is None:
            lost = sum(max(0, token.shape[0] - room) for _, token in taken)
            taken = [(choice[:room], token[:room]) for choice, token in taken]
            # An expert without a token is run on none, and has a gradient of zero and not none.
            found = (expert(x[token]) for expert, (_, token) in zip(self.experts, taken, strict=True))
        else:
            taken, lost = met.cut(taken, room)
            found = met.run(self.experts, [x[token] for _, token in taken])
        y = torch.zeros_like(x)
        for (choice, token), one in zip(taken, found, strict=True):
            y = y.index_add(0, token, (one * weights[token, choice, None].to(one.dtype)).to(y.dtype))
        if self.training:
            self.dropped += torch.tensor([lost, tokens * self.top], device=self.dropped.device)
        return y

    def _taken(self, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each expert, what chose it: number of the choice, and token. In the order of tokens, first choices before second ones, as in the papers' code."""
        n, E = chosen.shape[0], self.router.out_features
        if followed():
            even = [(n * self.top + E - 1 - e) // E for e in range(E)]
            return [(one // n, one % n) for one in chosen.T.flatten().argsort(stable=True).split(even)]
        return [chosen.T.eq(e).nonzero(as_tuple=True) for e in range(E)]  # type: ignore[misc]

    def _losses(self, logits: Tensor, p: Tensor, chosen: Tensor, first: Tensor | None) -> None:
        if not (self.training and self.has_own_loss and own_loss_asked() and p.shape[0]):
            return
        n, E = p.shape
        if first is None:
            first = chosen[:, :1].eq(torch.arange(E, device=p.device)).to(p.dtype).mean(0)
        loss = self.balance * E * (first * p.mean(0)).sum()
        if self.z:
            loss = loss + self.z * logits.logsumexp(-1).square().mean()
        add_own_loss(self, n * loss, n)


@FFNS.register("switch")
class Switch(Experts):
    """One expert a token, weighed by its probability; options as :class:`Experts`."""

    def __init__(self, dim: int, ratio: float, **options: Any) -> None:
        super().__init__(dim, ratio, **{"top": 1, **options})


@FFNS.register("st_moe")
class STMoE(Experts):
    """Two experts a token; options as :class:`Experts`, with the paper's weights of the losses."""

    def __init__(self, dim: int, ratio: float, **options: Any) -> None:
        super().__init__(dim, ratio, **{"top": 2, "z": 0.001, **options})
