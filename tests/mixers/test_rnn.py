"""LSTM and GRU against torch's cells, one document and one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import create_mixer, state_bytes

CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


def stepped(
    name: str, m: Any, x: Tensor, layout: Layout | None, state: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    cell = CELLS[name](m.dim, m.dim).double()
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        delattr(cell, part)
        setattr(cell, part, getattr(m.rnn, f"{part}_l0"))  # the same tensors, so that gradients can be compared
    outputs = x.new_zeros(x.shape)
    finals = []
    for b in range(x.shape[0]):
        past = [t[b] for t in state.values()]
        length = x.shape[1] if layout is None or layout.lengths is None else int(layout.lengths[b])
        rows = []
        for t in range(length):
            if layout is not None and layout.resets is not None and layout.resets[b, t]:
                past = [torch.zeros_like(p) for p in past]
            found = cell(x[b, t], tuple(past) if name == "lstm" else past[0])
            past = list(found) if name == "lstm" else [found]
            rows.append(past[0])
        if rows:
            outputs = outputs.index_put((torch.full((length,), b), torch.arange(length)), torch.stack(rows))
        finals.append(past)
    return outputs, [torch.stack(parts) for parts in zip(*finals, strict=True)]


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("laid", ["", "lengths", "resets", "both"])
@pytest.mark.oracle({"lstm": "torch: LSTMCell", "gru": "torch: GRUCell"})
def test_against_torchs_cell(held: Any, name: str, laid: str) -> None:
    """Outputs, final states and the gradients of tokens, states and weights, with documents, padding and empty rows."""
    torch.manual_seed(0)
    m = create_mixer(name, 4).double()
    x = torch.randn(3, 31, 4, dtype=torch.float64, requires_grad=True)
    state = {part: torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for part in m.parts}
    resets = torch.zeros(3, 31, dtype=torch.bool)
    resets[0, [0, 15, 16, 30]] = True
    resets[1, [8, 9, 25]] = True
    resets[2, 0] = True
    lengths = torch.tensor([31, 10, 0])
    layout = {
        "": None,
        "lengths": Layout(lengths),
        "resets": Layout(resets=resets),
        "both": Layout(lengths, resets),
    }[laid]
    y, after = m(x, state, layout)
    want, last = stepped(name, m, x, layout, state)
    valid = None if layout is None else layout.valid(31)
    shown = [y, want] if valid is None else [y[valid], want[valid]]
    held(x, (shown[0], after), (shown[1], last))
    torch.testing.assert_close(*shown, rtol=1e-12, atol=1e-12)
    g = torch.Generator().manual_seed(1)
    leaves, found = [x, *state.values(), *m.parameters()], []
    draws = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (want, *last)]
    draws[0] = draws[0] if valid is None else draws[0] * valid[..., None]
    for results in ([y, *after.values()], [want, *last]):
        found.append(torch.autograd.grad(results, leaves, draws))
    for a, b in zip([*after.values(), *found[0]], [*last, *found[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_rows_that_are_all_empty_keep_their_state(name: str) -> None:
    m = create_mixer(name, 4)
    state = {part: torch.randn(2, 4) for part in m.parts}
    y, after = m(torch.randn(2, 3, 4), state, Layout(torch.tensor([0, 0]), torch.ones(2, 3, dtype=torch.bool)))
    assert y.shape == (2, 3, 4)
    for part, t in state.items():
        torch.testing.assert_close(after[part], t)
    assert state_bytes(after) == 2 * m.state_bytes(3)
