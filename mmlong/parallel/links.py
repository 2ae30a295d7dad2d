"""What one layer can ask of its neighbours on other ranks, with gradients: the state from before, the last tokens from before, a prefix scan.

Each of these is an autograd function whose backward sends the other way. What comes out goes back into the layer's graph, also on a rank that makes no use of it, and each asks for a gradient itself
(an anchor), also where nothing before it is trained: so every rank runs every backward and none waits in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout
from mmlong.mixers import State, detach_state, rebuild_state, state_tensors
from mmlong.parallel.exchange import Chain, pack, packed_bytes, unpack


class Links(Chain):
    """This rank among those that hold pieces of the same sequences, for layers that run at once on all of them.

    Args:
        group, device: see :class:`mmlong.parallel.exchange.Chain`.
        length: positions of this rank's piece.

    Attributes:
        lengths: positions of every rank's piece, by rank.
        start: positions of the pieces before this rank's.
        shortest: positions of the shortest piece but the last rank's, which hands nothing on.

    Raises:
        ValueError: a rank has no positions.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, length: int) -> None:
        super().__init__(group, device)
        self.lengths = [theirs for (theirs,) in self.gather([length])]
        if min(self.lengths) < 1:
            raise ValueError(
                f"layers over ranks need a token on every rank, got pieces of {self.lengths}: take fewer ranks a sequence"
            )
        self.start = sum(self.lengths[: self.rank])
        self.shortest = min(self.lengths[:-1], default=length)

    def anchor(self) -> Tensor:
        """What makes a function ask for a gradient of its own accord."""
        return torch.zeros((), device=self.device, requires_grad=True)

    def hand(self, tensors: Sequence[Tensor], to: int) -> None:
        """Send tensors to a rank, which knows their types and shapes. Returns at once; see :meth:`finish`."""
        self._send(pack(tensors, self.device), to)

    def take(self, like: Sequence[Tensor], source: int) -> list[Tensor]:
        """Tensors of these types and shapes that a rank has handed to this one; waits for them."""
        specs = [(t.dtype, tuple(t.shape)) for t in like]
        return unpack(self._receive(packed_bytes(specs), torch.uint8, source), specs)

    def swap(self, tensors: Sequence[Tensor], to: int, source: int) -> list[Tensor] | None:
        """Send tensors to one rank and take others of the same types and shapes from another; either may not exist. ``None`` where nothing came."""
        if 0 <= to < self.size:
            self.hand(tensors, to)
        came = self.take(tensors, source) if 0 <= source < self.size else None
        self.finish()
        return came

    def before(self, x: Tensor, count: int, resets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The last ``count`` tokens of the piece before.

        Args:
            x: ``(B, L, D)``, ``count <= L``.
            count: how many.
            resets: bool ``(B, L)``.

        Returns:
            ``(x, tokens (B, count, D), their resets)``; zeros on the first rank. Use this ``x`` from here on: it brings back the gradient of what was sent.
        """
        came = None if resets is None else self.swap([resets[:, -count:]], self.rank + 1, self.rank - 1)
        marks = None if resets is None else torch.zeros_like(resets[:, :count]) if came is None else came[0]
        x, tokens = _Before.apply(self, self.anchor(), x, count)
        return x, tokens, marks

    def began(self, layout: Layout | None, rows: int, length: int) -> Tensor:
        """Where the document began that goes on in this piece: int64 ``(B,)``, positions of the whole row."""
        latest = self._starts(layout, rows, length).amax(1)
        every = [torch.zeros_like(latest) for _ in range(self.size)]
        dist.all_gather(every, latest, group=self.group)
        return torch.stack([torch.zeros_like(latest), *every[: self.rank]]).amax(0)

    def begins(self, layout: Layout | None, rows: int, length: int) -> Tensor:
        """Where each token's document begins: int64 ``(B, L)``, positions of the whole row."""
        return torch.maximum(self._starts(layout, rows, length), self.began(layout, rows, length)[:, None])

    def _starts(self, layout: Layout | None, rows: int, length: int) -> Tensor:
        starts = None if layout is None else layout.starts()
        if starts is None:
            return torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        return torch.where(starts >= 0, starts + self.start, 0)

    def past(self, x: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """The tokens of the pieces before: ``x (B, L, D)`` to ``(x, (B, min(reach, start), D))``, the latest last. Use this ``x`` from here on, as with :meth:`before`."""
        return _Past.apply(self, self.anchor(), x, reach)

    def reached(self, reach: int) -> tuple[list[int], list[int]]:
        """Ranks that this one's tokens are within reach of, and ranks before whose tokens are within its reach."""
        starts = [sum(self.lengths[:rank]) for rank in range(self.size)]
        ends = [start + length for start, length in zip(starts, self.lengths, strict=True)]
        return (
            [rank for rank in range(self.rank + 1, self.size) if starts[rank] - ends[self.rank] < reach],
            [rank for rank in range(self.rank) if self.start - ends[rank] < reach],
        )

    def scan(self, decay: Tensor, added: Tensor) -> Tensor:
        """Combine ``s_{r+1} = decay_r s_r + added_r``, with ``s_0 = 0``, over the ranks r in log steps.

        Args:
            decay: real or complex, of the shape of ``added`` or with ones where it is the same for many.
            added: what this rank's piece adds.

        Returns:
            ``s_r``, what comes into this rank's piece.
        """
        return _Scan.apply(self, self.anchor(), decay, added)

    def receive_state(self) -> State:
        """The state from the rank before, with its graph; ``None`` on the first."""
        if self.first:
            return None
        state = self.receive()
        tensors = _Received.apply(self, self.anchor(), *state_tensors(state))
        return rebuild_state(state, tensors)

    def send_state(self, y: Tensor, received: State, state: State) -> Tensor:
        """A state to the next rank; ``y`` with the gradients' way back tied to it."""
        came, goes = state_tensors(received), state_tensors(state)
        if not self.last:
            self.send(detach_state(state))
        return _Sent.apply(self, self.anchor(), y, len(came), *came, *goes)


def sum_over_ranks(loss: Tensor, parameters: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """The sum of a scalar over ranks. Its gradient is this rank's own, times the number of ranks: their mean over ranks, as DDP takes it, is the sum.

    ``parameters`` become part of the graph also where this rank's loss knows nothing of them: DDP waits for every one of them on every rank.
    """
    return _SumOverRanks.apply(group, loss, *parameters)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, loss: Tensor, *parameters: Tensor) -> Tensor:
        total = loss.detach().clone()
        ctx.size = 1
        if group is not None:
            dist.all_reduce(total, group=group)
            ctx.size = dist.get_world_size(group)
        ctx.parameters = len(parameters)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return (None, dloss * ctx.size, *[None] * ctx.parameters)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Links, anchor: Tensor, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ctx.links, ctx.count = links, count
        came = links.swap([x[:, -count:]], links.rank + 1, links.rank - 1)
        return x.clone(), torch.zeros_like(x[:, :count]) if came is None else came[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dbefore: Tensor) -> tuple[None, None, Tensor, None]:
        came = ctx.links.swap([dbefore], ctx.links.rank - 1, ctx.links.rank + 1)
        if came is not None:
            dx = dx.clone()
            dx[:, -ctx.count :] += came[0]
        return None, None, dx, None


class _Past(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Links, anchor: Tensor, x: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        later, earlier = links.reached(reach)
        for rank in later:
            links.hand([x], rank)
        found = [x[:, :0]]
        for rank in earlier:
            found += links.take([x.new_empty(x.shape[0], links.lengths[rank], x.shape[2])], rank)
        links.finish()
        ctx.links, ctx.reach = links, reach
        past = torch.cat(found, 1)
        return x.clone(), past[:, max(past.shape[1] - reach, 0) :].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dpast: Tensor) -> tuple[None, None, Tensor, None]:
        links: Links = ctx.links
        later, earlier = links.reached(ctx.reach)
        lengths = [links.lengths[rank] for rank in earlier]
        whole = F.pad(dpast, (0, 0, sum(lengths) - dpast.shape[1], 0))
        for rank, part in zip(earlier, whole.split(lengths, 1), strict=True):
            links.hand([part], rank)
        for rank in later:
            dx = dx + links.take([dx], rank)[0]
        links.finish()
        return None, None, dx, None


def _exclusive(links: Links, decay: Tensor, added: Tensor, turned: bool) -> Tensor:
    """The scan without gradients, from the first rank or (``turned``) from the last."""
    step, place = (-1, links.size - 1 - links.rank) if turned else (1, links.rank)
    total, distance = added, 1
    while distance < links.size:
        # Hillis & Steele: after each round a rank has combined twice as many pieces up to its own.
        came = links.swap([decay, total], links.rank + step * distance, links.rank - step * distance)
        if came is not None:
            total, decay = total + decay * came[1], decay * came[0]
        distance *= 2
    came = links.swap([total], links.rank + step, links.rank - step)
    return torch.zeros_like(added) if came is None or not place else came[0].clone()


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Links, anchor: Tensor, decay: Tensor, added: Tensor) -> Tensor:
        came = _exclusive(links, decay, added, turned=False)
        ctx.links = links
        ctx.save_for_backward(decay, came)
        return came

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcame: Tensor) -> tuple[None, None, Tensor, Tensor]:
        decay, came = ctx.saved_tensors
        # With t_r for the gradient of s_r: t_r = conj(decay_r) t_{r+1} + dcame_r, the same recurrence from the other end.
        after = _exclusive(ctx.links, decay.conj().resolve_conj(), dcame.contiguous(), turned=True)
        ddecay = (after * came.conj()).sum_to_size(decay.shape)
        return None, None, ddecay, after


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Links, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.links = links
        ctx.floating = [t.is_floating_point() for t in tensors]
        found = tuple(t.clone() for t in tensors)
        ctx.mark_non_differentiable(*[t for t in found if not t.is_floating_point()])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.links.send_back([g for g, floating in zip(gradients, ctx.floating, strict=True) if floating])
        ctx.links.finish()
        return (None, None, *[None] * len(gradients))


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Links, anchor: Tensor, y: Tensor, came: int, *tensors: Tensor) -> Tensor:
        ctx.links, ctx.came = links, came
        ctx.forms = [(t.is_floating_point(), t.detach()[:0], t.shape) for t in tensors]
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        came, goes = ctx.forms[: ctx.came], ctx.forms[ctx.came :]
        tied = [like.new_zeros(shape) if floating else None for floating, like, shape in came]
        back: list[Tensor | None] = [None] * len(goes)
        if not ctx.links.last:
            found = iter(ctx.links.receive_back([like.new_empty(shape) for floating, like, shape in goes if floating]))
            back = [next(found) if floating else None for floating, _, _ in goes]
        return (None, None, dy, None, *tied, *back)
