"""The state that one training batch hands to the next: training on a stream longer than any batch (Transformer-XL, Dai et al. 2019, arXiv 1901.02860).

Place b of a batch goes on where place b of the batch before ended, and the batch says where that is so (``continues``). The state goes over without its gradient. A row that does not go on
begins with a reset, across which nothing comes. It is saved with a checkpoint, for all ranks, so that a resumed run goes on to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import Mixer, State, detach_state, rebuild_state, state_tensors

FAR = 1 << 40
"""Tokens after which a state that has a bound has reached it."""


def check_bounded(backbone: nn.Module) -> None:
    """Raise ``ValueError`` when the state of one of the mixers grows for ever."""
    for name, mixer in backbone.named_modules():
        if isinstance(mixer, Mixer) and mixer.streaming and mixer.state_bytes(FAR) != mixer.state_bytes(2 * FAR):
            raise ValueError(
                f"model.carry: the state of {type(mixer).__name__} (backbone.{name}) grows with every token, and a stream has no end: "
                "take a mixer whose state has a bound (`mmlong mixers`), e.g. local, or leave carry out"
            )


class CarriedState:
    """What the batch before left, on this rank."""

    def __init__(self) -> None:
        self._state: State = None
        self._counted: Tensor | None = None
        self._restored: list[Tensor] | None = None

    def drop(self) -> None:
        """Begin anew."""
        self._state, self._counted, self._restored = None, None, None

    def before(
        self, model: nn.Module, tokens: Tensor, layout: Layout, continues: Tensor | None
    ) -> tuple[State, Layout]:
        """The state that a batch begins with, and its layout, with a reset before the first token of each row that does not go on.

        Raises:
            ValueError: the batch does not say which rows go on, or has another number of them than the one before.
        """
        if continues is None:
            raise ValueError(
                "model.carry: the batches do not say which rows go on: set data.windows: stream and data.carry: true"
            )
        if self._counted is None:
            return None, layout
        if len(continues) != len(self._counted):
            raise ValueError(f"the batch has {len(continues)} rows, the state carried is of {len(self._counted)}")
        self._take_form(model, tokens)
        goes_on = continues & self._counted
        if not bool(goes_on.any()):
            return None, layout
        if bool(goes_on.all()):
            return self._state, layout
        shape = tokens.shape[:2]
        resets = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
        if layout.resets is not None:
            resets |= layout.resets
        resets[:, 0] |= ~goes_on
        return self._state, replace(layout, resets=resets)

    def after(self, state: State, counted: Tensor) -> None:
        """Keep what a batch left. Rows that were skipped (not ``counted``) left a gap, over which nothing is carried."""
        self._state, self._counted = detach_state(state), counted

    def saved(self) -> list[list[Tensor]] | None:
        """The tensors of each rank. A collective: every rank must call it."""
        own = None if self._counted is None else [self._counted, *(self._restored or state_tensors(self._state))]
        own = None if own is None else [t.detach().cpu() for t in own]
        every: list[Any] = [own]
        if dist.is_available() and dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, own)
        return None if any(tensors is None for tensors in every) else every

    def restore(self, every: list[list[Tensor]], rank: int, world: int) -> None:
        """Take what :meth:`saved` gave. The ranks may be others, as long as the global batch is the same.

        Raises:
            ValueError: the rows cannot be shared out among so many ranks.
        """
        own = every[rank] if len(every) == world else _shared(every, rank, world)
        self._counted, self._restored = own[0], own[1:]

    def _take_form(self, model: nn.Module, tokens: Tensor) -> None:
        """Build the state of restored tensors. A checkpoint holds no types, so its form is that of another state, which costs one token."""
        if self._restored is None:
            return
        assert self._counted is not None
        training = model.training
        with torch.no_grad(), torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            model.eval()
            _, form = model(tokens[:, :1], None, None)
            model.train(training)
        if len(state_tensors(form)) != len(self._restored):
            raise ValueError("the state carried in the checkpoint is of another model: begin at another checkpoint")
        self._state = rebuild_state(form, [t.to(tokens.device) for t in self._restored])
        self._counted = self._counted.to(tokens.device)
        self._restored = None


def _shared(every: list[list[Tensor]], rank: int, world: int) -> list[Tensor]:
    shapes = [[t.shape[1:] for t in tensors] for tensors in every]
    rows = sum(len(tensors[0]) for tensors in every)
    if rows % world or any(each != shapes[0] for each in shapes):
        raise ValueError(
            f"the checkpoint carries states of {rows} rows of {len(every)} ranks, which {world} ranks cannot share: go on with {len(every)}"
        )
    share = rows // world
    return [torch.cat(parts)[rank * share : (rank + 1) * share].clone() for parts in zip(*every, strict=True)]
