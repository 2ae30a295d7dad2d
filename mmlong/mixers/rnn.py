"""LSTM and GRU, torch's own, as baselines: recurrences whose gates see the state, so that they run a token at a time.

Hochreiter & Schmidhuber 1997, "Long Short-Term Memory", in the form with a forget gate (Gers, Schmidhuber & Cummins 2000); Cho et al. 2014, arXiv 1406.1078, in
the form of cuDNN, whose reset gate acts after the product. ``torch.nn.LSTM`` and ``torch.nn.GRU`` give the equations. Padding and documents
in a row are a packed sequence, in which every document is a sequence of its own, so nothing is computed for padding.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State


class _TorchRNN(Mixer):
    """One layer of a torch recurrence, as wide as the tokens.

    Args:
        dim: width D, of tokens and state.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
    """

    kind: ClassVar[type[nn.LSTM] | type[nn.GRU]]
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, dim: int, *, causal: bool = True) -> None:
        super().__init__(dim, causal=causal)
        self.rnn = self.kind(dim, dim, batch_first=True)

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * len(self.parts)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        # A state that is rounded at every token would forget what is small beside it: no low precision here.
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(next(self.rnn.parameters()).dtype)
            if state is None:
                past = [tokens.new_zeros(x.shape[0], self.dim) for _ in self.parts]
            else:
                past = [state[part].to(tokens.dtype) for part in self.parts]
            if layout is None or (layout.lengths is None and layout.resets is None):
                y, after = self._run(tokens, past)
            else:
                y, after = self._documents(tokens, past, layout)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return y.to(x.dtype), {part: t.to(dtype) for part, t in zip(self.parts, after, strict=True)}

    def _run(self, tokens: Tensor | PackedSequence, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Torch's call, its states as a list without the axis of layers."""
        given = [t[None] for t in past]
        y, after = self.rnn(tokens, tuple(given) if len(given) > 1 else given[0])
        return y, [t[0] for t in (after if len(given) > 1 else (after,))]

    def _documents(self, x: Tensor, past: list[Tensor], layout: Layout) -> tuple[Tensor, list[Tensor]]:
        B, L, D = x.shape
        valid = layout.valid(L)
        valid = torch.ones(B, L, dtype=torch.bool, device=x.device) if valid is None else valid
        starts = torch.zeros_like(valid) if layout.resets is None else layout.resets & valid
        fresh = starts[:, 0].clone()  # rows that drop the state that came in
        starts[:, 0] = valid[:, 0]
        tokens = valid.flatten().nonzero()[:, 0]
        if not len(tokens):
            # Tokens and parameters stay in the graph: ranks must agree on what has a gradient.
            nothing = torch.stack([p.sum() for p in self.rnn.parameters()]).sum() * 0
            return x.masked_fill(torch.ones_like(valid)[..., None], 0) + nothing, past
        rows, places = tokens // L, tokens % L
        document = starts.flatten()[tokens].long().cumsum(0) - 1
        begin = starts.flatten().nonzero()[:, 0]
        row, sizes = begin // L, document.bincount()
        place = places - (begin % L)[document]  # inside its document
        # A packed sequence: the first tokens of all documents, longest document first, then their second tokens, and so on.
        order = sizes.argsort(descending=True, stable=True)
        rank = torch.empty_like(order).index_put((order,), torch.arange(len(order), device=x.device))
        index = (place * len(order) + rank[document]).argsort()
        packed = PackedSequence(x.flatten(0, 1)[tokens[index]], place.bincount().cpu())
        goes_on = ((begin % L == 0) & ~fresh[row])[order, None]
        first = [torch.where(goes_on, t[row[order]], 0) for t in past]
        y, last = self._run(packed, first)
        out = x.new_zeros(B * L, D).index_put((tokens[index],), y.data)
        ends = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])
        after = [t.index_put((rows[ends],), t_last[rank[document[ends]]]) for t, t_last in zip(past, last, strict=True)]
        return out.view(B, L, D), after


@register_mixer(
    "lstm",
    paper="Hochreiter & Schmidhuber 1997, Neural Computation 9(8)",
    note="torch.nn.LSTM itself, proved against torch's cell; sequential: a baseline",
)
class LSTM(_TorchRNN):
    """``torch.nn.LSTM`` of one layer with its state carried; arguments as :class:`GRU`."""

    kind = nn.LSTM
    parts = ("h", "c")


@register_mixer(
    "gru",
    paper="Cho et al. 2014, arXiv 1406.1078",
    note="torch.nn.GRU itself, proved against torch's cell; sequential: a baseline",
)
class GRU(_TorchRNN):
    """``torch.nn.GRU`` of one layer with its state carried.

    Args:
        dim: width D, of tokens and state.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
    """

    kind = nn.GRU
    parts = ("h",)
