"""Memories that learn while they read: mini-batches at once against the definition, token by token with every gradient by autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.test_time import Layers, Memory, Norm, descend, descend_with_momentum
from mmlong.ops.test_time_reference import descend_reference, descend_with_momentum_reference

RULES = {
    "plain": (descend, descend_reference),
    "momentum": (descend_with_momentum, descend_with_momentum_reference),
}
H, N = 2, 4


class Case:
    """Random arguments of one of the rules, in float64.

    Attributes:
        leaves: all that has a gradient, by name.
        place: of tokens, and of the one after the last.
    """

    def __init__(
        self,
        rule: str,
        B: int,
        L: int,
        size: int = 16,
        widths: tuple[int, ...] = (N, N),
        bias: bool = True,
        norm: bool = True,
        carried: list[int] | None = None,
        layout: Layout | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        r = torch.Generator().manual_seed(B + 10 * L + len(widths))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=r, dtype=dtype)

        def layers(*rows: int) -> Layers:
            return tuple(0.6 * normal(*rows, n + bias, p) for n, p in itertools.pairwise(widths))

        self.rule, self.size, self.layout = rule, size, layout
        t = {name: normal(B, L, H, width) for name, width in (("q", N), ("k", N), ("target", widths[-1]))}
        if rule == "plain":
            t["rate"] = torch.sigmoid(normal(B, L, H)) / 4
            t["place_rate"] = (1 / torch.arange(1, size + 1)).to(dtype) + 0.1 * normal(size)
        else:
            t["theta"] = torch.sigmoid(normal(B, L, H)) / 4
            t["log_keep"], t["log_eta"] = F.logsigmoid(normal(B, L, H) + 2), F.logsigmoid(normal(B, L, H))
        if norm:
            t["norm weight"], t["norm bias"] = 1 + 0.3 * normal(H, widths[-1]), 0.3 * normal(H, widths[-1])
        before = torch.tensor(carried or [0] * B)
        parts = {"first": layers(H), "network": layers(B, H), "other": layers(B, H)}
        if rule == "momentum":
            parts["anchor"] = layers(B, H)
        self.depth, self.norm = len(widths) - 1, norm
        t |= {f"{part} {j}": W for part, some in parts.items() for j, W in enumerate(some)}
        self.leaves = {name: a.requires_grad_() for name, a in t.items()}
        self.place = torch.zeros(B, L + 1, dtype=torch.int64)
        self.place[:, 0] = before
        for i in range(L):
            if layout is not None and layout.resets is not None:
                self.place[:, i] = torch.where(layout.resets[:, i], 0, self.place[:, i])
            self.place[:, i + 1] = (self.place[:, i] + 1) % size

    def layers(self, part: str) -> Layers:
        return tuple(self.leaves[f"{part} {j}"] for j in range(self.depth))

    def state(self) -> Memory:
        """Between mini-batches there is no sum, and the anchor is the network."""
        between = (self.place[:, 0] == 0)[:, None, None, None]
        network, other = self.layers("network"), self.layers("other")
        if self.rule == "plain":
            return Memory(None, network, tuple(torch.where(between, 0, t) for t in other))
        anchors = zip(network, self.layers("anchor"), strict=True)
        return Memory(tuple(torch.where(between, W, A) for W, A in anchors), network, other)

    def run(self, op: Any, some: slice = slice(None), state: Memory | None = None) -> tuple[Tensor, Memory]:
        """``op`` on some of the tokens."""
        t = self.leaves
        gates = ["rate"] if self.rule == "plain" else ["theta", "log_keep", "log_eta"]
        tokens = [t[name][:, some] for name in ("q", "k", "target", *gates)]
        tokens.append(t["place_rate"] if self.rule == "plain" else self.size)  # type: ignore[arg-type]
        norm = Norm(t["norm weight"], t["norm bias"]) if self.norm else None
        start, stop, _ = some.indices(self.place.shape[1] - 1)
        layout = self.layout and self.layout.slice(start, stop)
        return op(*tokens, norm, self.layers("first"), state or self.state(), self.place[:, start:stop], layout)

    def valid(self, z: Tensor) -> Tensor:
        here = self.layout and self.layout.valid(z.shape[1])
        return z if here is None else torch.where(here[..., None, None], z, 0)

    def same(self, got: tuple[Tensor, Memory], want: tuple[Tensor, Memory], tolerance: float = 1e-9) -> None:
        """Outputs at tokens, all parts of the state, and the gradients of all arguments."""
        mine, theirs = ([self.valid(z), *state.tensors()] for z, state in (got, want))
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        r = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(t.shape, generator=r, dtype=t.dtype) for t in theirs]
        totals = [sum((c * t).sum() for c, t in zip(cotangents, some, strict=True)) for some in (mine, theirs)]
        found, expected = (
            torch.autograd.grad(t, list(self.leaves.values()), allow_unused=True, materialize_grads=True)
            for t in totals
        )
        for name, a, b in zip(self.leaves, found, expected, strict=True):
            scale = float(b.abs().max()) + 1e-30
            torch.testing.assert_close(
                a / scale, b / scale, rtol=0, atol=10 * tolerance, msg=lambda text, n=name: f"gradient of {n}: {text}"
            )


def packed(B: int, L: int) -> Layout:
    """Rows that end early, one of nothing; documents that begin at the start, side by side, in the padding."""
    resets = torch.zeros(B, L, dtype=torch.bool)
    resets[0, [0, 5, 6, 40]] = True
    resets[1, [16, 48, L - 1]] = True
    return Layout(lengths=torch.tensor([L, L - 3, 0][:B]), resets=resets)


SHAPES: list[dict[str, Any]] = [
    {"B": 1, "L": 63},
    {"B": 3, "L": 63, "carried": [0, 5, 15]},
    {"B": 3, "L": 63, "carried": [3, 0, 9], "layout": packed(3, 63)},
    {"B": 2, "L": 63, "layout": Layout(lengths=torch.tensor([17, 48]))},
    {"B": 3, "L": 5, "carried": [2, 12, 14]},
    {"B": 3, "L": 1, "carried": [0, 7, 15], "layout": Layout(resets=torch.tensor([[False], [True], [False]]))},
]


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("widths", [(N, N), (N, 6, N)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "carried", "packed", "padded", "short", "one"])
@pytest.mark.parametrize("rule", list(RULES))
def test_definition(rule: str, shape: dict[str, Any], widths: tuple[int, ...], norm: bool) -> None:
    case = Case(rule, widths=widths, norm=norm, bias=norm, **shape)
    got, want = (case.run(op) for op in RULES[rule])
    case.same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("rule", list(RULES))
def test_definition_at_257_and_other_sizes(rule: str, size: int) -> None:
    case = Case(rule, 3, 257, size, (N, 5, 3, N - 1), carried=[0, size // 2, size - 1])
    with torch.no_grad():  # slowly: what learns fast from each token alone doubles roundings every few
        case.leaves["rate" if rule == "plain" else "theta"].mul_(0.1)
    got, want = (case.run(op) for op in RULES[rule])
    case.same(got, want, 1e-8)


@pytest.mark.parametrize("layout", [None, packed(2, 63)], ids=["full", "packed"])
@pytest.mark.parametrize("rule", list(RULES))
def test_pieces(rule: str, layout: Layout | None) -> None:
    case = Case(rule, 2, 63, 8, (N, 6, N), carried=[0, 3], layout=layout)
    want = case.run(RULES[rule][0])
    outputs, state = [], None
    for i, j in ((0, 1), (1, 2), (2, 24), (24, 40), (40, 63)):
        z, state = case.run(RULES[rule][0], slice(i, j), state)
        outputs.append(z)
    assert state is not None
    case.same((torch.cat(outputs, 1), state), want)


@pytest.mark.parametrize("rule", list(RULES))
def test_whole_mini_batches_equal_any(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """What is computed without sums and anchors equals what is computed with them, and so it does when traced."""
    case = Case(rule, 2, 37, 8, (N, 6, N))
    want = case.run(RULES[rule][0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case.same(case.run(RULES[rule][0]), want)


@pytest.mark.parametrize("rule", list(RULES))
def test_low_precision_learns_in_float32(rule: str) -> None:
    case = Case(rule, 2, 33, widths=(N, 6, N), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, state = case.run(RULES[rule][0])
    assert {t.dtype for t in (z, *state.tensors())} == {torch.float32}
    wide = Case(rule, 2, 33, widths=(N, 6, N))
    wide.leaves = {name: t.detach().double() for name, t in case.leaves.items()}
    exact, _ = wide.run(RULES[rule][0])
    torch.testing.assert_close(z.double(), exact, rtol=1e-3, atol=1e-3)


def test_everything_forgotten_at_once() -> None:
    """Logarithms of zero: the network is the step alone, as without momentum it is a step of the last token's."""
    case = Case("momentum", 2, 63, 8)
    with torch.no_grad():
        case.leaves["log_keep"][:, 20:40] = float("-inf")
        case.leaves["log_eta"][:, 30:50] = float("-inf")
    got, want = (case.run(op) for op in RULES["momentum"])
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1].tensors(), want[1].tensors())
    for g in torch.autograd.grad(got[0].sin().sum(), list(case.leaves.values()), allow_unused=True):
        assert g is None or g.isfinite().all()


def test_weak_decays_after_strong_ones_in_float32() -> None:
    """Sums of logarithms, the large ones of some tokens among them, keep the digits of the small ones."""
    case = Case("momentum", 1, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        for name in ("log_keep", "log_eta"):
            case.leaves[name].copy_(torch.where(torch.arange(64) % 8 < 4, -50.0, -1e-3)[:, None])
    z, _ = case.run(descend_with_momentum)
    wide = Case("momentum", 1, 64, 64)
    wide.leaves = {name: t.detach().double().requires_grad_() for name, t in case.leaves.items()}
    exact, _ = wide.run(descend_with_momentum_reference)
    torch.testing.assert_close(z.double(), exact, rtol=1e-5, atol=1e-5)
