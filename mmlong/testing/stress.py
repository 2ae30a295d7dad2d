"""Under strong decays, long gates open or shut, and keys and gates in the thousands: finite, and as near to float64 as the inputs allow.

Tokens come in three ways:

- ``large``: all of them 1,000 times too large, so that keys, gates and scores are in the hundreds and thousands, or their products;
- ``mixed``: of sizes from 1 to 1,000, spread evenly in the logarithm, so that decays of e^-1 and e^-1,000 stand side by side;
- ``stretches``: 30 times too large, and alike for dozens to hundreds of tokens, so that gates stay open or shut for whole chunks.

Decays that are parameters are as the module has them: give ``check_mixer`` a ``prepare`` that sets them. (One of the house's mixers does so for each, down to e^-20 a token.)

What is right is the same module in float64; and that, where it streams, one token at a time, where no chunk multiplies or divides decays. What may be asked of a lower precision depends on
the mechanism: softmax of scores in the thousands picks a maximum, and a tie is decided by the last bit of the input. So it is measured. Inputs and parameters are moved at random by about one rounding of that precision, in
float64, and results may be off by a small multiple of what that does to them, plus a small share of their size; and never by as much as their size, so that something is asked of all. Differences are rms over all positions and
channels, which a few wrong positions in a thousand move far from rounding; over a long sequence without the worst :data:`TIES` of them, since among so many some softmax lies so near a tie that one rounding decides it
and another does not. What a move does is itself a matter of chance, of which one token near a tie may be most; so what two moves do not allow is measured with :data:`DRAWS` before it fails.

The gradient of the inputs is compared in the same way, in float32, but for ``large`` tokens: where softmaxes and gates are saturated it is what remains after a cancellation. All gradients, outputs and states must be finite.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmlong.mixers.state import State, state_tensors
from mmlong.testing.subject import Subject

LENGTH, LONG = 1037, 65_536
SINGLE = 257
"""Tokens run one at a time."""

FLOAT32, BFLOAT16 = 2.0**-23, 2.0**-8
"""Spacing of the numbers just above 1."""

MULTIPLE = {FLOAT32: 8.0, BFLOAT16: 8.0}
"""Times what a move of inputs and parameters by that much does: what is rounded on the way may count for more, where a mixer averages its inputs first. (Over the house's
mixers at most 8, mostly below 1.)"""
SHARE = {FLOAT32: 3e-4, BFLOAT16: 0.06}
"""Of the rms, beside it. In float32 what sums of log decays over a chunk lose, and what a factor of e^-1e-4 a token does, whose distance from 1 is known to 6e-4 of it (RG-LRU: 1.2e-4 on one processor and less on
another); in bfloat16 as elsewhere in this suite."""
GRADIENT_SHARE = 5e-3
DRAWS = 10
"""Moves before something is said to be wrong."""
TIES = 1 / 8192
"""Share of positions that are set aside; none of a short sequence."""
MOST = 0.9
"""Share of the rms that no error may come to: a result of zeros is off by 1."""


def near_float64_under_stress(s: Subject) -> None:
    """At a length of a few chunks."""
    _check(s, LENGTH, draws=2)


def near_float64_under_long_stress(s: Subject) -> None:
    """At 65,536 tokens."""
    _check(s, LONG, draws=1)


def stressed_tokens(s: Subject, length: int) -> Iterator[tuple[str, Tensor]]:
    """What they are, and float32 tokens ``(1, length, D)``. Over a long sequence not ``mixed``: sizes that change from token to token show in a short one what they do."""
    x = s.tokens(1, length, seed=6)
    yield "large", (1e3 * x).float()
    if length < LONG:
        yield "mixed", (torch.exp(math.log(1e3) * torch.sigmoid(2 * s.draw((1, length, 1), seed=7))) * x).float()
    r = torch.Generator().manual_seed(8)
    stretch = torch.zeros(length, dtype=torch.long)
    starts = torch.randint(30, 300, (length // 30 + 1,), generator=r).cumsum(0)
    stretch[starts[starts < length]] = 1
    alike = s.tokens(1, int(stretch.sum()) + 1, seed=9)[:, stretch.cumsum(0).to(s.device)]
    yield "in stretches", (30 * (0.8 * alike + 0.6 * x)).float()


def _check(s: Subject, length: int, draws: int) -> None:
    exact, module = s.module(torch.float64), s.module(torch.float32)
    weights = s.tokens(1, length, seed=3)
    for what, x in stressed_tokens(s, length):
        told = f"tokens {what}"
        y, gradient = _slope(s, exact, x.double(), weights, told)
        s.finite(y, f"{told}: outputs in float64")
        _one_at_a_time(s, exact, x.double(), y, told)
        compared = what != "large"
        for eps, name in ((FLOAT32, "float32"), (BFLOAT16, "bfloat16 autocast")):
            both = compared and eps == FLOAT32
            moves = _Moves(s, exact, x, weights if both else None, eps, draws, told)
            with torch.autocast(s.device.type, dtype=torch.bfloat16, enabled=eps == BFLOAT16):
                found, slope = _trained(s, module, x, weights.float(), f"{told}, {name}")
            _near(s, found, y, moves, 0, SHARE[eps], f"{told}, {name}: outputs")
            if both:
                _near(s, slope, gradient, moves, 1, GRADIENT_SHARE, f"{told}, {name}: gradient of the inputs")


class _Moves:
    """What the float64 module makes of numbers moved by ``eps``: outputs, and the gradient of the inputs where ``weights`` are given. Drawn when asked for, and kept."""

    def __init__(self, s: Subject, exact: nn.Module, x: Tensor, weights: Tensor | None, eps: float, draws: int, what: str) -> None:  # fmt: skip
        self.s, self.exact, self.x, self.weights, self.eps, self.draws, self.what = s, exact, x, weights, eps, draws, what  # fmt: skip
        self.drawn: list[tuple[Tensor, ...]] = []

    def off(self, which: int, exact: Tensor, draws: int) -> float:
        """The most that one of them is off by."""
        while len(self.drawn) < draws:
            twin, tokens = _moved(self.s, self.exact, self.x, self.eps, len(self.drawn))
            if self.weights is not None:
                self.drawn.append(_slope(self.s, twin, tokens, self.weights, self.what))
            else:
                with torch.no_grad():
                    self.drawn.append((self.s.run(twin, tokens, what=self.what)[0],))
        return max(_off(each[which], exact) for each in self.drawn[:draws])


def _slope(s: Subject, module: nn.Module, x: Tensor, weights: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient of the inputs."""
    x = x.clone().requires_grad_()
    y, _ = s.run(module, x, what=what)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return y.detach(), gradient


def _trained(s: Subject, module: nn.Module, x: Tensor, weights: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """As :func:`_slope`, with everything that training sees finite."""
    x = x.clone().requires_grad_()
    y, state = s.run(module, x, what=what)
    _finite_state(s, y, state, what)
    named = [("the inputs", x), *((f"parameter {n}", p) for n, p in module.named_parameters() if p.requires_grad)]
    found = torch.autograd.grad((y.float() * weights).sum(), [t for _, t in named], allow_unused=True)
    for (name, _), g in zip(named, found, strict=True):
        if g is not None:
            s.finite(g, f"{what}: gradient of {name}")
    return y.detach(), found[0]


def _finite_state(s: Subject, y: Tensor, state: State, what: str) -> None:
    s.finite(y, f"{what}: outputs")
    for i, t in enumerate(state_tensors(state)):
        if t.is_floating_point():
            s.finite(t, f"{what}: tensor {i} of the state")


def _one_at_a_time(s: Subject, exact: nn.Module, x: Tensor, y: Tensor, what: str) -> None:
    if not s.streaming:
        return
    length = min(SINGLE, x.shape[1])
    with torch.no_grad():
        single, _ = s.in_pieces(exact, x[:, :length], [1] * length, what=f"{what}, one at a time")
    error, size = _rms(single - y[:, :length]), _rms(y[:, :length])
    if not error <= 1e-7 * size:
        s.fail(
            f"{what}: in float64, whole and one token at a time differ by {error / size:.3g} of the rms, allowed 1e-7"
        )


def _moved(s: Subject, exact: nn.Module, x: Tensor, eps: float, seed: int) -> tuple[nn.Module, Tensor]:
    """The module and the tokens, every number of theirs a little larger or smaller."""
    twin = copy.deepcopy(exact)
    with torch.no_grad():
        for i, p in enumerate(twin.parameters()):
            if p.is_floating_point():
                p.mul_(1 + eps * s.draw(tuple(p.shape), seed=100 * seed + i + 50))
    return twin, x.double() * (1 + eps * s.draw(tuple(x.shape), seed=100 * seed + 10))


def _near(s: Subject, found: Tensor, exact: Tensor, moves: _Moves, which: int, share: float, what: str) -> None:
    size, error = _rms(exact), _off(found, exact)
    for draws in (moves.draws, DRAWS):
        natural = moves.off(which, exact, draws)
        allowed = min(MULTIPLE[moves.eps] * natural + share * size, MOST * size) + 1e-30
        if error <= allowed:
            return
    worst = int((found.double() - exact).square().sum((0, 2)).argmax())
    s.fail(
        f"{what}: rms error {error / size:.3g} of the rms against float64, allowed {allowed / size:.3g} (inputs and parameters moved "
        f"by a rounding: {natural / size:.3g}); largest at position {worst}"
    )


def _off(t: Tensor, exact: Tensor) -> float:
    """The rms difference over all positions but those set aside."""
    squares = (t.detach().double() - exact).square().sum((0, 2))
    kept = squares.sort().values[: squares.numel() - int(TIES * squares.numel())]
    return float(kept.sum() / exact.numel()) ** 0.5


def _rms(t: Tensor) -> float:
    return float(t.detach().square().mean().sqrt())
