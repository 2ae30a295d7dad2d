"""A call is a function of its arguments: it draws no random numbers in eval, writes into nothing it was given, and keeps rows apart."""

from __future__ import annotations

import torch

from mmlong.mixers.state import State, map_state, select_rows, state_tensors
from mmlong.testing.subject import Subject, copied

SAME = 1e-12
"""Equal calls need not be equal to the bit: vector units round differently at another alignment of memory."""


def arguments_are_left_alone(s: Subject) -> None:
    """Neither x nor the incoming state is written into, and a state does not live in x's memory."""
    module = s.module()
    x, more = s.tokens(3, 63), s.tokens(3, 17, seed=1)
    with torch.no_grad():
        given = x.clone()
        _, state = s.run(module, given)
        s.agree(given, x, "x after the call that read it", tol=0.0)
        if not s.streaming:
            return
        kept = copied(state)
        given = more.clone()
        y, _ = s.run(module, given, state)
        s.agree(given, more, "x after the call that continued a state", tol=0.0)
        _same_state(s, state, kept, "the incoming state after the call that read it")
        again, _ = s.run(module, more, state)
        s.agree(again, y, "a second continuation of the same state", tol=SAME)
        buffer = x.clone()
        _, state = s.run(module, buffer)
        buffer.fill_(7.0)
        again, _ = s.run(module, more, state)
        s.agree(again, y, "a continuation after the memory of the earlier x was reused (the state aliases x)", tol=SAME)


def _same_state(s: Subject, found: State, expected: State, what: str) -> None:
    for i, (a, b) in enumerate(zip(state_tensors(found), state_tensors(expected), strict=True)):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            s.fail(f"{what}: tensor {i} of the state, {tuple(a.shape)}, was written into")


def eval_is_deterministic(s: Subject) -> None:
    """Twice the same call is the same, and the global random generators are where they were."""
    module = s.module(torch.float32)
    x = s.tokens(3, 63, dtype=torch.float32)
    with torch.no_grad():
        torch.manual_seed(11)
        before = torch.get_rng_state()
        y, _ = s.run(module, x.clone())
        drew = not torch.equal(before, torch.get_rng_state())
        torch.manual_seed(12)
        again, _ = s.run(module, x.clone())
    s.agree(again, y, "two equal calls in eval", tol=1e-6)
    if drew:
        s.fail("a call in eval drew from the global random generator")


def rows_are_independent(s: Subject) -> None:
    """A row of a batch gives what it gives alone, and no gradient crosses rows, in eval and in training."""
    module = s.module()
    for length in (1, 70):
        x, more = s.tokens(3, length), s.tokens(3, 17, seed=1)
        with torch.no_grad():
            y, state = s.run(module, x)
            batch_comes_first(s, state, 3, f"a batch of 3 (L = {length})")
            for b in range(3):
                row = slice(b, b + 1)
                alone, own = s.run(module, x[row])
                s.agree(y[row], alone, f"row {b} of a batch against the row alone (L = {length})")
                if s.streaming:
                    expected, _ = s.run(module, more[row], own)
                    chosen, _ = s.run(module, more[row], select_rows(state, row))
                    s.agree(chosen, expected, f"row {b} continued from its row of the batch's state", start=length)
            if s.streaming:
                together, _ = s.run(module, more, state)
                order = torch.tensor([2, 0, 1], device=s.device)
                shuffled, _ = s.run(module, more[order], select_rows(state, order))
                s.agree(shuffled, together[order], "a continuation with the rows reordered", start=length)
    _no_gradient_across(s, training=False)
    _no_gradient_across(s, training=True)


def _no_gradient_across(s: Subject, training: bool) -> None:
    module = s.module(fresh=True).train(training)
    x = s.tokens(3, 33).requires_grad_()
    y, state = s.run(module, x)
    loss = (y[1] * s.tokens(1, 33, seed=3)[0]).sum()
    for i, t in enumerate(state_tensors(state)):
        if t.is_floating_point() and t.shape[:1] == (3,):
            loss = loss + (t[1] * s.draw(tuple(t.shape[1:]), seed=4 + i, dtype=t.dtype)).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    others = gradient.clone()
    others[1] = 0
    mode = "training" if training else "eval"
    s.silent(others, float(gradient.abs().max()), f"in {mode}, the output of row 1 has a gradient to other rows")


def batch_comes_first(s: Subject, state: State, batch: int, what: str) -> None:
    """Fail unless every tensor of a state has the batch as its first axis."""
    with s.running(f"the state after {what}"):
        map_state(lambda t: t, state)
    for i, t in enumerate(state_tensors(state)):
        if t.ndim < 1 or t.shape[0] != batch:
            s.fail(
                f"after {what}: tensor {i} of the state is {tuple(t.shape)}; its first axis must be the batch, {batch}"
            )
