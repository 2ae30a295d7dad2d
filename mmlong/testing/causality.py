"""No leak from the future, at any distance; and both sides seen where that is claimed.

Both probes use that rows do not see one another (a property of its own): one batch asks the question for many positions at once.

- by value: row i keeps ``x[:s_i]`` and gets other, ten times larger tokens from ``s_i`` on; its outputs before ``s_i`` may not change.
  This finds what gradients cannot see: statistics, selections, sorting.
- by gradient: row i has a random cotangent at position ``t_i`` alone; its input gradient after ``t_i`` must be zero. This finds leaks
  too small for the value test.

Every position of a sequence of 257 is probed, and the edges of every multiple of 64 in one of 1,031. A subject that asks for a shorter sequence (its windows and chunks are small) is probed at every
position of that.
"""

from __future__ import annotations

import torch

from mmlong.testing.subject import PROBED, Subject

LONG_EDGES = sorted({*range(64, 1031, 64), *range(63, 1031, 64), 1, 100, 500, 1000, 1029})


def no_leak_from_the_future(s: Subject) -> None:
    """Outputs do not depend on later tokens, by value and by gradient."""
    _probe(s, s.probed, list(range(s.probed)), rows=64)
    if s.probed >= PROBED:
        _probe(s, 1031, LONG_EDGES, rows=8)
    _probe_in_training(s)


def _probe(s: Subject, length: int, positions: list[int], rows: int) -> None:
    module = s.module()
    x = s.tokens(1, length)
    other = 10 * s.tokens(rows, length, seed=1)
    cotangents = s.tokens(rows, 1, seed=2)
    with torch.no_grad():
        base, _ = s.run(module, x)
    here = torch.arange(length, device=s.device)
    for k in range(0, len(positions), rows):
        some = torch.tensor(positions[k : k + rows], device=s.device)
        n = len(some)
        later = here >= some[:, None]
        with torch.no_grad():
            y, _ = s.run(module, torch.where(later[..., None], other[:n], x))
        change = (y - base).masked_fill(later[..., None], 0)
        for i in range(n):
            s.silent(
                change[i : i + 1],
                float(base.abs().max()),
                f"with every token from position {int(some[i])} on replaced, earlier outputs change (L = {length})",
            )
        leaves = x.expand(n, -1, -1).clone().requires_grad_()
        y, _ = s.run(module, leaves)
        at = torch.arange(n, device=s.device)
        (gradient,) = torch.autograd.grad(y[at, some], leaves, cotangents[:n, 0])
        after = gradient.masked_fill((here <= some[:, None])[..., None], 0)
        for i in range(n):
            s.silent(
                after[i : i + 1],
                float(gradient[i].abs().max()),
                f"the output at position {int(some[i])} has a gradient to later inputs (L = {length})",
            )


def _probe_in_training(s: Subject) -> None:
    """What is normalised by a running statistic in eval may be normalised by the sequence's own in training."""
    module = s.module(fresh=True).train()
    x = s.tokens(2, 70).requires_grad_()
    y, _ = s.run(module, x)
    (gradient,) = torch.autograd.grad(y[:, 29], x, s.tokens(2, 1, seed=2)[:, 0])
    s.silent(
        gradient[:, 30:],
        float(gradient.abs().max()),
        "in training, the output at position 29 has a gradient to later inputs (L = 70)",
        start=30,
    )


def both_sides_are_seen(s: Subject) -> None:
    """A bidirectional form depends on what lies before and on what lies after."""
    module = s.module()
    length, t = 63, 31
    x = s.tokens(1, length).requires_grad_()
    y, _ = s.run(module, x)
    (gradient,) = torch.autograd.grad(y[:, t], x, s.tokens(1, 1, seed=1)[:, 0])
    whole = float(gradient.abs().max())
    for side, part in (("before", gradient[:, :t]), ("after", gradient[:, t + 1 :])):
        if not float(part.abs().max()) > 1e-12 * whole:
            s.fail(f"built with causal=False, the output at position {t} of {length} depends on nothing {side} it")
