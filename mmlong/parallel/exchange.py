"""States from rank to rank: what is sent, and along which chain.

The ranks of a group stand in a chain, the first holding the beginning of every sequence. A state goes to the next rank, its gradient comes back from there. A state is a tree of tensors
(:mod:`mmlong.mixers.state`), and the receiver knows neither its form nor the shapes: a cache grows, and rows differ. So the form goes before the tensors, as JSON, whenever it is another than that of
the state before it on this link; the tensors of one state, of any types, are one message. Nothing that is received is executed: a named tuple's type is looked up
among the modules that the receiver has imported itself.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers.state import State, state_tensors

ALIGN = 16
"""Bytes at whose multiples each tensor of a message begins: enough for a view of any type."""

Spec = tuple[torch.dtype, tuple[int, ...]]


def form_of(state: State) -> Any:
    """What a state is apart from its values, as plain JSON."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return {"tensor": [str(state.dtype).removeprefix("torch."), list(state.shape)]}
    if isinstance(state, dict):
        return {"dict": [[key, form_of(value)] for key, value in state.items()]}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        kind = type(state)
        return {"named": [kind.__module__, kind.__qualname__, [form_of(value) for value in state]]}
    if isinstance(state, (tuple, list)):
        return {"tuple" if isinstance(state, tuple) else "list": [form_of(value) for value in state]}
    raise TypeError(f"a state holds tensors, tuples, lists, dicts and None; found {type(state).__name__}")


def build_state(form: Any, tensors: Iterator[Tensor]) -> State:
    """The state of a form, its tensors in the order of ``state_tensors``.

    Raises:
        ValueError: the form names a type of tuple that this process has not imported.
    """
    if form is None:
        return None
    ((kind, content),) = form.items()
    if kind == "tensor":
        return next(tensors)
    if kind == "dict":
        return {key: build_state(value, tensors) for key, value in content}
    if kind == "named":
        module, name, values = content
        return _named_tuple(module, name)(*(build_state(value, tensors) for value in values))
    found = [build_state(value, tensors) for value in content]
    return tuple(found) if kind == "tuple" else found


def _named_tuple(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise ValueError(
            f"a state was sent as {module}.{name}, which is no named tuple that this rank has imported: build the same model on every rank"
        )
    return found


def specs_of(form: Any) -> list[Spec]:
    """Types and shapes of a form's tensors, in order."""
    if form is None:
        return []
    ((kind, content),) = form.items()
    if kind == "tensor":
        return [(getattr(torch, content[0]), tuple(content[1]))]
    parts = [part for _, part in content] if kind == "dict" else content[2] if kind == "named" else content
    return [spec for part in parts for spec in specs_of(part)]


def _bytes(spec: Spec) -> int:
    size = math.prod(spec[1]) * spec[0].itemsize
    return size + -size % ALIGN


def packed_bytes(specs: Sequence[Spec]) -> int:
    """Length of the message that :func:`pack` makes of such tensors."""
    return sum(map(_bytes, specs))


def pack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The values of tensors of any types as one row of bytes."""
    rows = []
    for t in tensors:
        row = t.detach().contiguous().reshape(-1).view(torch.uint8)
        rows.append(F.pad(row, (0, -len(row) % ALIGN)))
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8, device=device)


def unpack(message: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors of a message, views of it."""
    found, at = [], 0
    for dtype, shape in specs:
        size = math.prod(shape) * dtype.itemsize
        found.append(message[at : at + size].view(dtype).view(shape))
        at += _bytes((dtype, shape))
    return found


class Chain:
    """The links of this rank to the ones before and after it, for one pass over a batch.

    Args:
        group: the ranks of one sequence, in order; ``None``: this process alone.
        device: where messages are, which the group's backend must take.

    Attributes:
        rank, size: which piece of how many.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._sent = self._heard = b""
        self._pending: list[tuple[Any, Tensor]] = []

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    def _send(self, message: Tensor, to: int) -> None:
        if message.numel():
            work = dist.isend(message, group=self.group, group_dst=to)
            # The message must live until it has gone.
            self._pending.append((work, message))

    def _receive(self, count: int, dtype: torch.dtype, source: int) -> Tensor:
        message = torch.empty(count, dtype=dtype, device=self.device)
        if count:
            dist.recv(message, group=self.group, group_src=source)
        return message

    def send(self, state: State) -> None:
        """A state to the next rank. Returns at once; see :meth:`finish`."""
        form = json.dumps(form_of(state)).encode()
        new = form != self._sent
        self._sent = form
        self._send(torch.tensor([len(form) if new else 0], device=self.device), self.rank + 1)
        if new:
            self._send(torch.frombuffer(bytearray(form), dtype=torch.uint8).to(self.device), self.rank + 1)
        self._send(pack(state_tensors(state), self.device), self.rank + 1)

    def receive(self) -> State:
        """The state that the rank before has sent; waits for it."""
        if length := int(self._receive(1, torch.int64, self.rank - 1)):
            self._heard = bytes(self._receive(length, torch.uint8, self.rank - 1).tolist())
        form = json.loads(self._heard)
        specs = specs_of(form)
        message = self._receive(packed_bytes(specs), torch.uint8, self.rank - 1)
        return build_state(form, iter(unpack(message, specs)))

    def send_back(self, gradients: Sequence[Tensor]) -> None:
        """The gradients of the tensors of a received state to the rank before; returns at once."""
        self._send(pack(gradients, self.device), self.rank - 1)

    def receive_back(self, like: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of tensors that were sent, from the next rank; waits for them."""
        specs = [(t.dtype, tuple(t.shape)) for t in like]
        return unpack(self._receive(packed_bytes(specs), torch.uint8, self.rank + 1), specs)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()

    def reduce(self, t: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
        """``t``, reduced over the ranks in place."""
        if self.size > 1:
            dist.all_reduce(t, how, group=self.group)
        return t

    def gather(self, row: Sequence[int]) -> list[list[int]]:
        """The numbers that every rank gives, by rank."""
        own = torch.tensor(list(row), dtype=torch.int64, device=self.device)
        every = [own] if self.size == 1 else [torch.empty_like(own) for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(every, own, group=self.group)
        return [t.tolist() for t in every]
