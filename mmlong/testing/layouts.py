"""Padding never changes a valid position, and nothing crosses a reset: outputs, states and gradients.

The meaning of a layout is spelled out by :meth:`Subject.each_alone`: every document of every row run by itself, on exactly its own
tokens, without a layout. A batch with the layout must give the same at valid positions, leave the same state for each row, and be the
same in pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.state import State, select_rows, state_tensors
from mmlong.testing.isolation import batch_comes_first
from mmlong.testing.subject import Subject, differentiable

L = 131
PREFIX = 37
GARBAGE = 100.0
"""Size of what is put at padding: finite, since a matrix product spreads a NaN that is masked after it."""

LENGTHS = ([L, 41, 1], [0, L, 5], [64, 0, L - 1])
RESETS = (
    [(0, 0), (0, 64), (1, 1), (1, 2), (1, 5), (1, 63), (1, 65), (1, 130)],
    [(1, 0), (2, 64), (2, 128)],
    [(0, 0), (0, 1), (0, 2), (0, 3), (1, 100), (2, 33)],
)
CUTS = ([1, 62, 1, 67], [64, 64, 3], [5, 96, 30])


def padding_changes_nothing(s: Subject) -> None:
    """Garbage at padding changes no valid output, no state and no gradient; an empty row keeps its state."""
    for lengths in LENGTHS:
        _check(s, s.layout(lengths), f"lengths {lengths}")
    _single_tokens(s)
    _padding_gradient(s, s.layout([L, 41, 1]))


def resets_separate(s: Subject) -> None:
    """Documents packed in a row give what each gives by itself."""
    for resets in RESETS:
        _check(s, s.layout(None, resets, (3, L)), f"resets {resets}")
    if s.traits.padding:
        # Marks in the padding as well: what stands there is not part of the row.
        _check(s, s.layout(LENGTHS[0], [*RESETS[0], (1, 41), (2, 1)], (3, L)), "lengths and resets")
        _check(s, s.layout(LENGTHS[1], [*RESETS[2], (2, 5)], (3, L)), "lengths and resets, an empty row")
    _reset_gradient(s)


def _fill(x: Tensor, layout: Layout, seed: int = 9) -> Tensor:
    """``x`` with garbage at padding."""
    valid = layout.valid(x.shape[1])
    if valid is None:
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(valid[..., None], x, GARBAGE * noise.to(x))


def _check(s: Subject, layout: Layout, what: str) -> None:
    module = s.module()
    x = _fill(s.tokens(3, L), layout)
    with torch.no_grad():
        pasts: list[tuple[str, State]] = [("", None)]
        if s.streaming:
            pasts.append((", continuing a state", s.run(module, s.tokens(3, PREFIX, seed=1))[1]))
        for suffix, past in pasts:
            case = f"{what}{suffix}"
            truth = s.each_alone(module, x, past, layout)
            y, state = s.run(module, x, past, layout, case)
            _compare(s, y, state, truth, f"{case}: the batch")
            if s.streaming:
                for sizes in CUTS:
                    y, state = s.in_pieces(module, x, sizes, past, layout, case)
                    _compare(s, y, state, truth, f"{case}: in pieces of {sizes}")


def _single_tokens(s: Subject) -> None:
    """One token at a time with rows that end at different times, as in generation."""
    if not s.streaming:
        return
    module, layout = s.module(), s.layout([9, 4, 0])
    x = _fill(s.tokens(3, 9), layout)
    with torch.no_grad():
        truth = s.each_alone(module, x, None, layout)
        y, state = s.in_pieces(module, x, [1] * 9, None, layout)
        _compare(s, y, state, truth, "lengths [9, 4, 0], one token at a time")


def _compare(s: Subject, y: Tensor, state: State, truth: list[tuple[Tensor, State]], what: str) -> None:
    s.finite(y, f"{what}: outputs, padding included (the next layer multiplies by them)")
    for b, (expected, _) in enumerate(truth):
        length = expected.shape[1]
        s.agree(y[b : b + 1, :length], expected, f"{what}: row {b}, {length} valid, against its documents alone")
    if not s.streaming:
        return
    batch_comes_first(s, state, len(truth), what)
    module, more = s.module(), s.tokens(len(truth), 17, seed=2)
    together, _ = s.run(module, more, state, None, f"{what}: continuing")
    for b, (outputs, past) in enumerate(truth):
        row = slice(b, b + 1)
        expected, _ = s.run(module, more[row], past)
        told = f"{what}: the state of row {b} ({outputs.shape[1]} valid) against its last document's"
        s.agree(together[row], expected, f"{told}, continued in the batch")
        by_itself, _ = s.run(module, more[row], select_rows(state, row))
        s.agree(by_itself, expected, f"{told}, continued by itself")


def _padding_gradient(s: Subject, layout: Layout) -> None:
    module = s.module()
    x = _fill(s.tokens(3, L), layout).requires_grad_()
    valid = layout.valid(L)
    assert valid is not None
    y, state = s.run(module, x, None, layout)
    loss = (y * s.tokens(3, L, seed=3) * valid[..., None]).sum() + _state_loss(s, state)
    (gradient,) = torch.autograd.grad(loss, x)
    s.finite(gradient, "gradient of valid outputs and the state to the inputs of a padded batch")
    # Beside what a unit of input is worth, not garbage: at padding the size of the input may scale the gradient down.
    leak = gradient.masked_fill(valid[..., None], 0)
    s.silent(leak, float(gradient.abs().max()) / GARBAGE, "gradient of valid outputs and the state to padding")


def _state_loss(s: Subject, state: State) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    for i, t in enumerate(state_tensors(state)):
        if t.is_floating_point() and t.requires_grad:
            total = total + (t * s.draw(tuple(t.shape), seed=4 + i, dtype=t.dtype)).sum().double()
    return total


def _reset_gradient(s: Subject) -> None:
    """No gradient from behind a reset to before it, nor back; in each row the cut is at another place."""
    cuts = [64, 63, 1]
    marks = [(b, p) for b, p in enumerate(cuts)] + [(0, 100), (1, 20)]
    layout = s.layout(None, marks, (3, L))
    module = s.module()
    past = s.run(module, s.tokens(3, PREFIX, seed=1))[1] if s.streaming else None
    behind = torch.arange(L, device=s.device) >= torch.tensor(cuts, device=s.device)[:, None]
    for sends, receives, with_state in (("behind", "before", True), ("before", "behind", False)):
        x, before = s.tokens(3, L).requires_grad_(), differentiable(past)
        leaves = [t for t in state_tensors(before) if t.requires_grad]
        y, state = s.run(module, x, before, layout)
        chosen = behind if sends == "behind" else ~behind
        loss = (y * s.tokens(3, L, seed=3) * chosen[..., None]).sum()
        if with_state:
            loss = loss + _state_loss(s, state)
        found = torch.autograd.grad(loss, [x, *leaves], allow_unused=True)
        scale = float(found[0].abs().max())
        leak = found[0].masked_fill(chosen[..., None], 0)
        s.silent(leak, scale, f"gradient from {sends} the resets at {cuts} (row by row) to {receives} them")
        if with_state:
            for i, g in enumerate(found[1:]):
                if g is not None:
                    s.silent(g, scale, f"gradient from behind a reset to tensor {i} of the incoming state")
