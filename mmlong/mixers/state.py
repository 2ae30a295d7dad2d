"""State: what the past left behind, a pytree of tensors, and the few things one does with it.

A state is ``None`` ("from the beginning"), a tensor, or tuples (named ones too), lists and string-keyed dicts of states. One rule makes everything else
easy: **every tensor in a state has the batch as its first axis**, a position counter included. Nothing in a state is a Python
number, so that it can cross processes, devices and autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = Any
"""``None | Tensor | tuple[State, ...] | list[State] | dict[str, State]``."""


def map_state(fn: Callable[[Tensor], Tensor], state: State) -> State:
    """The same tree with ``fn`` applied to every tensor."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, dict):
        return {key: map_state(fn, value) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        values = [map_state(fn, value) for value in state]
        # A named tuple takes its fields one by one; its type is kept, since the mixer reads it by name.
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    raise TypeError(f"a state holds tensors, tuples, lists, dicts and None; found {type(state).__name__}")


def state_tensors(state: State) -> list[Tensor]:
    """Every tensor of the tree, in a fixed order (dicts by insertion)."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_state(keep, state)
    return found


def rebuild_state(state: State, tensors: Sequence[Tensor]) -> State:
    """The tree of ``state`` with its tensors replaced, in the order of ``state_tensors``."""
    rest = iter(tensors)
    return map_state(lambda _: next(rest), state)


def detach_state(state: State) -> State:
    """The same values, cut from the graph."""
    return map_state(Tensor.detach, state)


def select_rows(state: State, rows: Tensor | slice) -> State:
    """The state of some rows of the batch: an index tensor (beam search), a mask, or a slice."""
    return map_state(lambda t: t[rows], state)


def state_bytes(state: State) -> int:
    """Bytes that the tensors of a state take."""
    return sum(t.numel() * t.element_size() for t in state_tensors(state))


def state_to(state: State, device: torch.device | str, non_blocking: bool = False) -> State:
    """The state on another device."""
    return map_state(lambda t: t.to(device, non_blocking=non_blocking), state)
