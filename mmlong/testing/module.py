"""A mixer as a module: manners of the call, state_dict, copies, ``torch.compile`` and ``torch.export``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.mixers.state import State
from mmlong.testing.subject import Subject


def manners(s: Subject) -> None:
    """Returns (y, state) like x; refuses what it cannot take with ValueError or TypeError."""
    for dtype in (torch.float32, torch.float64):
        for batch, length in ((1, 1), (3, 2), (1, 63)):
            x = s.tokens(batch, length, dtype=dtype)
            with torch.no_grad():
                y, _ = s.run(s.module(dtype), x)
            if y.dtype != dtype:
                s.fail(f"y is {y.dtype} for x of {dtype}, (B, L) = {(batch, length)}")
            s.finite(y, f"outputs at (B, L) = {(batch, length)}")
    module = s.module(torch.float32)
    x = s.tokens(2, 9, dtype=torch.float32)
    s.refuses(ValueError, lambda: module(x[0]), "x without a batch axis")
    s.refuses(ValueError, lambda: module(s.draw((2, 9, s.dim + 1), dtype=torch.float32)), "x of another width")
    s.refuses(ValueError, lambda: module(x[:, :0]), "x of no positions")
    s.refuses((TypeError, ValueError), lambda: module(x.long()), "integer x")
    s.refuses(ValueError, lambda: module(x, None, s.layout([9, 9, 9])), "a layout of another batch")
    if not s.streaming:
        s.refuses(ValueError, lambda: module(x, x[:, 0]), "a state, having none")
    if not s.traits.padding:
        s.refuses(ValueError, lambda: module(x, None, s.layout([9, 4])), "layout.lengths, which its traits exclude")
    if not s.traits.resets:
        reset = s.layout(None, [(0, 3)], (2, 9))
        s.refuses(ValueError, lambda: module(x, None, reset), "layout.resets, which its traits exclude")


def state_dict_restores(s: Subject) -> None:
    """A state_dict loaded into a fresh module, and a deep copy, give the same outputs; a copy shares nothing."""
    module = s.module()
    x = s.tokens(2, 63)
    with torch.no_grad():
        y, _ = s.run(module, x)
        fresh = s.build(seed=1).double()
        s.run(fresh, x)  # fills what it may keep from call to call
        with s.running("load_state_dict into a fresh module"):
            fresh.load_state_dict(copy.deepcopy(module.state_dict()))
        found, _ = s.run(fresh, x)
        s.agree(found, y, "a fresh module with the state_dict loaded")
        with s.running("deepcopy"):
            twin = copy.deepcopy(module)
        found, _ = s.run(twin, x)
        s.agree(found, y, "a deep copy")
        for p in twin.parameters():
            p.zero_()
        found, _ = s.run(module, x)
        s.agree(found, y, "the original after its deep copy was changed")


def compiles(s: Subject) -> None:
    """``torch.compile`` (backend aot_eager, graph breaks allowed) gives the same outputs, states and gradients."""
    module = s.module(torch.float32, fresh=True)
    x, more = s.tokens(2, 63, dtype=torch.float32), s.tokens(2, 5, seed=1, dtype=torch.float32)
    weights = s.tokens(2, 63, seed=3, dtype=torch.float32)
    torch._dynamo.reset()
    try:
        # Sizes as they are: tracing them as unknowns takes twice as long, and exports are where lengths stay free.
        compiled = torch.compile(module, backend="aot_eager", dynamic=False)
        y, gradient, state = _with_gradient(s, module, x, weights)
        found, compiled_gradient, compiled_state = _with_gradient(s, compiled, x, weights)
        s.agree(found, y, "outputs compiled")
        s.agree(compiled_gradient, gradient, "gradient of the inputs compiled", tol=2e-3)
        if s.streaming:
            with torch.no_grad():
                y, _ = s.run(module, more, state)
                found, _ = s.run(compiled, more, compiled_state)
            s.agree(found, y, "continuing a state, compiled", start=63)
    finally:
        torch._dynamo.reset()


def _with_gradient(s: Subject, module: Any, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, State]:
    x = x.clone().requires_grad_()
    y, state = s.run(module, x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return y.detach(), gradient, state


class _Call(nn.Module):
    """What is exported: positional arguments only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        return self.module(x, state)


def exports(s: Subject) -> None:
    """``torch.export`` (non-strict), run on other tokens, gives the same outputs, from the beginning and continuing a state."""
    module = s.module(torch.float32, fresh=True)
    for p in module.parameters():
        p.requires_grad_(False)
    x, other = s.tokens(2, 63, dtype=torch.float32), s.tokens(2, 63, seed=1, dtype=torch.float32)
    call = _Call(module).eval()
    with torch.no_grad():
        _, past = s.run(module, x)
        states: list[tuple[str, tuple[State, ...]]] = [("", ())]
        if s.streaming and past is not None:
            states.append((" continuing a state", (past,)))
        for what, state in states:
            with s.running(f"torch.export{what}"):
                program = torch.export.export(call, (x, *state), strict=False)
                found = program.module()(other, *state)[0]
            y, _ = s.run(module, other, *state)
            s.agree(found, y, f"the exported program{what}, on other tokens")
