"""Mixture of depths: a router chooses the tokens that go through parts; the others pass by.

Follows Raposo et al. 2024 (arXiv 2404.02258). With a router's score ``r_t = w . x_t + b``, and ``C`` the tokens chosen,

    y_t = x_t + sigmoid(r_t) (inner(x_C)_t - x_t)    for t in C;        y_t = x_t    else

where ``inner`` sees the tokens of ``C`` alone, as a sequence of their own. Two-sided, ``C`` is the paper's expert choice: of each document of ``n`` tokens the ``ceil(share n)`` with the highest scores, so the work is known beforehand.

DEPARTURE, where parts are causal. Whether a token is among the highest of its document depends on later ones, so the paper's training looks ahead, and it samples with something else than it trained. Here causal parts leak nothing, so

    C = {t : r_t > 0}

in training as in generation, and the paper's auxiliary loss (its first method) makes that the share: the binary cross-entropy of ``r`` with whether a token is among the ``ceil(share n)`` highest of its document, which centres ``sigmoid(r)`` on 1/2 between those and the others. It is a loss of its own
(:mod:`mmlong.mixers.own_loss`), ``weight`` times its mean over tokens; it looks ahead, no output does. In segments and over ranks the highest are those of each call. So the work of a causal part is a share that is learned and not a budget, and before it is learned any share may be chosen.

Other departures: the score is put through a sigmoid in both forms (the paper multiplies by ``r`` itself); what is weighed is what the parts add, so that their own residual does not double ``x``; positions of the inner mixers count chosen tokens.

The state is what the inner parts left behind, and whether a document has begun of which no token was chosen yet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.part import Part, register_part
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked
from mmlong.ops.chunks import picked_at
from mmlong.ops.top_share import check_share, top_share


@register_part("mixture_of_depths")
class MixtureOfDepths(Part):
    """Parts for a share of the tokens.

    Args:
        inner: the parts.
        share: of tokens that go through them: exactly, two-sided; aimed at, causal.
        dim: width D.
        weight: of the auxiliary loss, of causal parts.

    Raises:
        ValueError: a share outside (0, 1], or a negative weight.
    """

    def __init__(self, inner: nn.Module, share: float, dim: int, weight: float = 0.01) -> None:
        super().__init__(inner)
        check_share(share, "a mixture of depths")
        if not weight >= 0:
            raise ValueError(f"a mixture of depths: the weight of a loss is at least 0, got {weight}")
        self.share, self.weight = float(share), weight
        self.router = nn.Linear(dim, 1)

    counted_as = "a mixture of depths is counted at the share of tokens aimed at, the same in every row"

    @property
    def has_own_loss(self) -> bool:
        """Whether the share is aimed at by a loss."""
        return self.causal and self.weight > 0

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        before, waiting = (None, None) if state is None else (state["inner"], state["waiting"])
        r = self.scores(x)
        chosen = r > 0 if self.causal else top_share(r, self.share, layout)
        valid = None if layout is None else layout.valid(x.shape[1])
        chosen = chosen if valid is None else chosen & valid
        self._own_loss(r, layout, valid)
        chunks, waiting = picked_at(chosen, layout, waiting, self.share)
        inner, y = before, x
        if chunks.count:
            taken = chunks.take(x)
            found, inner = self.inner(taken, before, chunks.layout)
            added = (found - taken) * torch.sigmoid(chunks.take(r[..., None])).to(found.dtype)
            given = chunks.give(added, torch.zeros_like(added[:, 0]))
            y = x + torch.where(chosen[..., None], given, 0).to(x.dtype)
        elif torch.is_grad_enabled() and (trained := [p for p in self.parameters() if p.requires_grad]):
            # A gradient of zero and not none: other ranks chose something, and wait for all.
            y = x + 0 * torch.stack([p.sum() for p in trained]).sum().to(x.dtype)
        if not self.streaming:
            return y, None
        if waiting is None:
            waiting = x.new_zeros(x.shape[0], dtype=torch.bool)
        return y, {"inner": inner, "waiting": waiting}

    def scores(self, x: Tensor) -> Tensor:
        """``r (B, L)`` in at least float32: the same choice under autocast in a piece as in the whole."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.router.weight.to(dtype), self.router.bias.to(dtype))[..., 0]

    def _own_loss(self, r: Tensor, layout: Layout | None, valid: Tensor | None) -> None:
        if not (self.has_own_loss and self.training and own_loss_asked()):
            return
        best = top_share(r.detach(), self.share, layout).to(r.dtype)
        loss = F.binary_cross_entropy_with_logits(r, best, reduction="none")
        loss = loss if valid is None else torch.where(valid, loss, 0)
        tokens = loss.numel() if valid is None else valid.sum()
        add_own_loss(self, self.weight * loss.sum(), tokens)
