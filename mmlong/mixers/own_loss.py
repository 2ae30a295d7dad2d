"""Losses of a mixer's own, beside the task's: what trains an indexer, or keeps spans short.

A mixer that has one computes it while a training step asks for it, and only then::

    with own_losses() as found:         # the task's step
        y, state = model(x, state, layout)
    loss = loss + mean_own_loss(found)

    if own_loss_asked():                # the mixer
        add_own_loss(self, total, tokens)     # a sum over so many tokens, weighed by the mixer's option, in nats

Asked for inside a step, the terms are part of what the step returns, so segments, ranks, accumulation and clipping treat them as they treat the loss; activation checkpointing asks again when it computes again. A mixer says with
:attr:`mmlong.mixers.Mixer.has_own_loss` that it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn

Found = list[tuple[nn.Module, Tensor, Tensor | int]]

_FOUND: ContextVar[Found | None] = ContextVar("mmlong_own_losses", default=None)


@contextmanager
def own_losses() -> Iterator[Found]:
    """Ask for them: a list that fills, while this is entered, with who had a loss, its sum, and the number of tokens that is over; one may come in several parts."""
    found: Found = []
    before = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(before)


def own_loss_asked() -> bool:
    """Whether a mixer is to compute its own."""
    return _FOUND.get() is not None


def add_own_loss(module: nn.Module, total: Tensor, tokens: Tensor | int) -> None:
    """Hand one in: a module's, a scalar sum over so many tokens. Nothing if nobody asked."""
    found = _FOUND.get()
    if found is not None:
        found.append((module, total, tokens))


def mean_own_loss(found: Found) -> Tensor | None:
    """Each module's mean over its tokens, added up over the modules; ``None`` if there is none."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for module, total, tokens in found:
        count = torch.as_tensor(tokens, device=total.device)
        before = sums.get(id(module))
        sums[id(module)] = (total, count) if before is None else (before[0] + total, before[1] + count)
    means = [total / count.clamp_min(1) for total, count in sums.values()]
    return torch.stack(means).sum() if means else None


def sum_own_loss(found: Found) -> Tensor | None:
    """The sums, for a step that itself is a sum over tokens."""
    return torch.stack([total for _, total, _ in found]).sum() if found else None


def asked_again() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """What activation checkpointing puts around a block, and around it when it is computed again."""
    return nullcontext(), own_losses() if own_loss_asked() else nullcontext()
