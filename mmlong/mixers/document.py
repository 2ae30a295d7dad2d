"""Mixers that count from a document's first token: every document becomes a row of its own, and rows with equal pasts run together.

Blocks, strides, selections and projections over a length are laid out from position 0. In a batch with padding, several documents in a row, or pasts of different lengths, position 0 is elsewhere in each.
:class:`DocumentMixer` takes such a batch apart, so that a mechanism is written once, for full rows that all have seen the same number of tokens, and keeps the whole contract nevertheless:

    mix_document(x, state, past, layout) -> (y, state)         x (N, T, D), rows alike: no lengths, no resets

Documents of equal length and past are one call; so a batch without a layout is a single one. The price of a ragged batch is a call for each distinct length.

A state is a dict of tensors. Those that :meth:`DocumentMixer.slots` names are caches: their axis -2 is slots, and the number of slots is a function of the tokens seen. The base adds how many those
are: in full batches as the *shape* of ``seen (B, n, 0)``, a tensor of no bytes, so that nothing waits for a device and exports know it; where rows differ as ``count (B,)``, and caches stand at the right
edge, with zeros before them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer
from mmlong.mixers.state import State

Parts = dict[str, Tensor]


class DocumentMixer(Mixer):
    """Base of mixers whose mechanism is laid out from the first token of a document. Subclasses define :meth:`mix_document` and, if they stream, :meth:`slots`."""

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        """The mechanism.

        Args:
            x: ``(N, T, D)``, T >= 1, every row a document or the next piece of one.
            state: what an earlier call returned for these documents, caches exactly as it did; ``None`` from the beginning.
            past: tokens that each had before; 0 without a state.
            layout: a grid, or positions, of all rows; never lengths or resets. ``None`` for none.

        Returns:
            ``y`` like ``x``, and the state (``None`` if this instance does not stream), in memory that is not a view of something much larger.
        """
        raise TypeError(f"{type(self).__name__} does not define mix_document(x, state, past, layout)")

    def absorb_document(self, x: Tensor, state: Parts | None, past: int, layout: Layout | None) -> Parts | None:
        """The state alone of :meth:`mix_document`, for those that have it for less."""
        return self.mix_document(x, state, past, layout)[1]

    def absorb(self, x: Tensor, state: State = None, layout: Layout | None = None) -> State:
        if not self.streaming or _ragged(layout) or (state is not None and "count" in state):
            return super().absorb(x, state, layout)
        parts, past = (None, 0) if state is None else _taken(state)
        after = self.absorb_document(x, parts, past, layout)
        return None if after is None else self._seen(after, x, past)

    def _seen(self, after: Parts, x: Tensor, past: int) -> Parts:
        return {**after, "seen": x.new_empty(x.shape[0], past + x.shape[1], 0)}

    def slots(self, seen: int) -> dict[str, int]:
        """Slots, on axis -2, of each cache of the state after ``seen`` tokens. Tensors of the state that are not named are of one size always."""
        return {}

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        if not _ragged(layout) and (state is None or "count" not in state):
            parts, past = (None, 0) if state is None else _taken(state)
            y, after = self.mix_document(x, parts, past, layout)
            return y, None if after is None else self._seen(after, x, past)
        return self._apart(x, state, layout)

    def _apart(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        """A batch whose rows differ, document by document."""
        B, L, _ = x.shape
        before = [0] * B
        parts: Parts | None = None
        if state is not None:
            parts = {key: t for key, t in state.items() if key not in ("seen", "count")}
            before = state["count"].tolist() if "count" in state else [state["seen"].shape[1]] * B
        groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        lasts: list[tuple[int, int] | None] = [None] * B
        counts = list(before)
        for row, documents in enumerate(_documents(layout, B, L)):
            for start, stop, new in documents:
                past = 0 if new else before[row]
                groups[past, stop - start].append((row, start))
                lasts[row] = (row, start)
                counts[row] = past + stop - start
        order: list[Tensor] = []
        outputs: list[Tensor] = []
        rows_of: dict[int, int] = {}
        afters: list[Parts] = []
        held = 0
        for (past, length), members in groups.items():
            rows = torch.tensor([row for row, _ in members], device=x.device)
            starts = torch.tensor([start for _, start in members], device=x.device)
            places = (rows * L + starts)[:, None] + torch.arange(length, device=x.device)
            taken = x.reshape(B * L, -1).index_select(0, places.flatten()).view(len(members), length, -1)
            given = None if parts is None or past == 0 else self._cut(parts, rows, past)
            y, after = self.mix_document(taken, given, past, self._of_documents(layout, rows, starts, length))
            outputs.append(y.reshape(len(members) * length, -1))
            order.append(places.flatten())
            if after is not None:
                last = [n for n, member in enumerate(members) if lasts[member[0]] == member]
                for n in last:
                    rows_of[members[n][0]] = held
                    held += 1
                if last:
                    index = torch.tensor(last, device=x.device)
                    afters.append({key: t.index_select(0, index) for key, t in after.items()})
        if outputs:
            found = torch.cat(outputs)
            y = found.new_zeros(B * L, x.shape[2]).index_copy(0, torch.cat(order), found).view(B, L, -1)
        else:
            # Nothing but padding. Parameters, and what x is made of, have a gradient of zero then, and not none: ranks add theirs up.
            nothing, _ = self.mix_document((0 * x[:1, :1]).nan_to_num(), None, 0, None)
            y = (0 * nothing).expand(B, L, -1)
        if not self.streaming:
            return y, None
        return y, self._joined(x, parts, rows_of, afters, counts, held)

    def _cut(self, parts: Parts, rows: Tensor, past: int) -> Parts:
        """The states of some rows that have seen ``past`` tokens each."""
        slots = self.slots(past)
        found = {key: t.index_select(0, rows) for key, t in parts.items()}
        return {key: t[..., t.shape[-2] - slots[key] :, :] if key in slots else t for key, t in found.items()}

    def _of_documents(self, layout: Layout | None, rows: Tensor, starts: Tensor, length: int) -> Layout | None:
        if layout is None or layout.positions is None:
            return None
        positions = (
            layout.positions if layout.positions.shape[0] > 1 else layout.positions.expand(int(rows.max()) + 1, -1, -1)
        )
        places = starts[:, None] + torch.arange(length, device=starts.device)
        return Layout(positions=positions[rows[:, None], places])

    def _joined(
        self, x: Tensor, parts: Parts | None, rows_of: dict[int, int], afters: list[Parts], counts: list[int], held: int
    ) -> State:
        """One state of all rows; a row that had no token keeps what it had."""
        B = x.shape[0]
        pool = [*afters] if parts is None else [*afters, parts]
        if not pool:
            return None  # no row has had a token yet
        none = held + (0 if parts is None else B)
        index = [rows_of.get(row, none if parts is None else held + row) for row in range(B)]
        most = [self.slots(n) for n in set(counts)]
        slots = {key: max(each[key] for each in most) for key in most[0]}
        joined: Parts = {}
        for key in pool[0]:
            sized = [_aligned(p[key], slots[key]) if key in slots else p[key] for p in pool]
            sized.append(sized[0].new_zeros(1, *sized[0].shape[1:]))
            joined[key] = torch.cat(sized).index_select(0, torch.tensor(index, device=x.device))
        joined["count"] = torch.tensor(counts, device=x.device)
        return joined


def _ragged(layout: Layout | None) -> bool:
    return layout is not None and (layout.lengths is not None or layout.resets is not None)


def _taken(state: Any) -> tuple[Parts, int]:
    return {key: t for key, t in state.items() if key != "seen"}, state["seen"].shape[1]


def _aligned(t: Tensor, slots: int) -> Tensor:
    """A cache with so many slots on axis -2, what it has at the right edge."""
    have = t.shape[-2]
    return t[..., have - slots :, :] if have >= slots else F.pad(t, (0, 0, slots - have, 0))


def _documents(layout: Layout | None, B: int, L: int) -> list[list[tuple[int, int, bool]]]:
    """Of every row its documents ``(start, stop, new)``; ``new`` if the row's state is not of it."""
    lengths = [L] * B if layout is None or layout.lengths is None else layout.lengths.tolist()
    marks: list[list[int]] = [[] for _ in range(B)]
    if layout is not None and layout.resets is not None:
        for row, position in layout.resets.nonzero().tolist():
            if position < lengths[row]:
                marks[row].append(position)
    found = []
    for length, cuts in zip(lengths, marks, strict=True):
        edges = [0, *(p for p in cuts if p > 0), length]
        new = [bool(cuts) and cuts[0] == 0, *[True] * (len(edges) - 2)]
        found.append([(a, b, n) for a, b, n in zip(edges, edges[1:], new, strict=False) if b > a])
    return found
