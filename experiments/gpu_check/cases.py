"""What the ops are asked: inputs in float64 on a CPU, and a call that gives outputs for them on any device, in any type, by any backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.attention import attention
from mmlong.ops.attention_backends import ATTENTION
from mmlong.ops.backends import Backends
from mmlong.ops.block_patterns import CAUSAL, First, LastOfBlocks, Pattern, SameBlock, Window
from mmlong.ops.diagonal import diagonal_recurrence
from mmlong.ops.gated_norm import gated_rms_norm
from mmlong.ops.gated_norm_backends import GATED_NORM
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.linear_attention_backends import LINEAR_ATTENTION
from mmlong.ops.long_conv import long_conv
from mmlong.ops.pattern_attention import PATTERN_ATTENTION, pattern_attention
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.short_conv import short_conv
from mmlong.ops.short_conv_backends import SHORT_CONV
from mmlong.ops.swiglu import swiglu
from mmlong.ops.visible import Visible, visible_in

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """``batch`` rows of ``length`` tokens, ``heads`` heads of ``width`` channels over ``groups`` groups, ``state`` columns of a matrix state."""

    batch: int
    length: int
    heads: int
    groups: int
    width: int
    state: int

    @property
    def dim(self) -> int:
        return self.heads * self.width


@dataclass(frozen=True)
class Case:
    """One question to an op.

    Attributes:
        op: its name.
        name: of the question.
        make: float64 inputs; integers and booleans among them are positions.
        run: outputs, given the inputs and the name of a backend.
        low: inputs that come in the type that is checked; the rest have at least float32.
        backends: of the op; ``None`` where it has plain torch only, under the name ``torch``.
        coarse: backends whose float32 products are TF32.
        timed: whether it is the one that is timed.
    """

    op: str
    name: str
    make: Callable[[Sizes, torch.Generator], Inputs]
    run: Callable[[Inputs, str], tuple[Tensor, ...]]
    low: frozenset[str]
    backends: Backends | None = None
    coarse: frozenset[str] = frozenset()
    timed: bool = False

    def names(self) -> list[str]:
        """Backends, what the others are held against first."""
        if self.backends is None:
            return ["torch"]
        return sorted(self.backends.names(), key=lambda name: name not in ("portable", "sdpa"))


def _normal(r: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=r, dtype=torch.float64) * scale


def _lengths(s: Sizes) -> Tensor:
    """The first row is full, the others end earlier."""
    return torch.tensor([s.length - i * s.length // (s.batch + 1) for i in range(s.batch)])


def _resets(s: Sizes) -> Tensor:
    """Documents of unlike lengths, in the first row one at the very beginning."""
    resets = torch.zeros(s.batch, s.length, dtype=torch.bool)
    resets[0, 0] = True
    for row in range(s.batch):
        resets[row, s.length // 3 + row :: max(2, s.length // 4)] = True
    return resets


def _layout(t: Inputs) -> Layout | None:
    if "lengths" not in t and "resets" not in t:
        return None
    return Layout(lengths=t.get("lengths"), resets=t.get("resets"))


def _seen(y: Tensor, layout: Layout | None) -> Tensor:
    """What is at padding is anything."""
    valid = None if layout is None else layout.valid(y.shape[1])
    return y if valid is None else torch.where(valid[(...,) + (None,) * (y.ndim - 2)], y, 0)


# Attention


def _attention(
    name: str, past: float = 0, window: int | None = None, causal: bool = True, layout: str = "", timed: bool = False
) -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        S = s.length + int(past * s.length)
        t = {"q": _normal(r, s.batch, s.heads, s.length, s.width)}
        t |= {key: _normal(r, s.batch, s.groups, S, s.width) for key in ("k", "v")}
        if "padded" in layout:
            t["lengths"] = _lengths(s)
        if "documents" in layout:
            t["resets"] = _resets(s)
        return t

    def run(t: Inputs, backend: str) -> tuple[Tensor, ...]:
        q, k, v = t["q"], t["k"], t["v"]
        L, S = q.shape[2], k.shape[2]
        shape = _layout(t)
        if shape is None:
            visible = Visible(window, 0 if causal else window)
        else:
            visible = visible_in(shape, L, causal=causal, window=window, past=S - L)
        y = attention(q, k, v, visible, backend=backend)
        return (_seen(y.transpose(1, 2), shape),)

    low = frozenset({"q", "k", "v"})
    return Case("attention", name, make, run, low, ATTENTION, frozenset({"flex", "xformers"}), timed)


def _pattern(name: str, pattern: Pattern, past: float = 0, timed: bool = False) -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        S = s.length + int(past * s.length)
        t = {"q": _normal(r, s.batch, s.heads, s.length, s.width)}
        return t | {key: _normal(r, s.batch, s.groups, S, s.width) for key in ("k", "v")}

    def run(t: Inputs, backend: str) -> tuple[Tensor, ...]:
        before = t["k"].shape[2] - t["q"].shape[2]
        return (pattern_attention(t["q"], t["k"], t["v"], pattern, before, k_size=8, backend=backend),)

    low = frozenset({"q", "k", "v"})
    return Case("pattern_attention", name, make, run, low, PATTERN_ATTENTION, frozenset({"flex"}), timed)


# Linear attention


def _linear(name: str, rated: bool, layout: bool = False, timed: bool = False) -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        B, L, H = s.batch, s.length, s.heads
        t = {
            "q": _normal(r, B, L, s.groups, s.state),
            "k": _normal(r, B, L, s.groups, s.state, scale=1 / math.sqrt(s.state)),
            "v": _normal(r, B, L, H, s.width),
            "log_input": _normal(r, B, L, H, scale=0.5) - 2,
            "skip": _normal(r, H),
            "state": _normal(r, B, H, s.width, s.state),
        }
        if rated:
            t["log_rate"] = _normal(r, H, scale=0.5)
        else:
            t["g"] = -F.softplus(_normal(r, B, L, H) - 2)
        return t | ({"lengths": _lengths(s), "resets": _resets(s)} if layout else {})

    def run(t: Inputs, backend: str) -> tuple[Tensor, ...]:
        rate = -t["log_rate"].exp() if rated else None
        g = t["g"] if rate is None else rate * t["log_input"].exp()
        shape = _layout(t)
        y, state = scalar_decay_attention(
            t["q"], t["k"], t["v"], g, t["log_input"], t["skip"], t["state"], shape, rate=rate, backend=backend
        )
        return _seen(y, shape), state

    low = frozenset({"q", "k", "v"})
    coarse = frozenset({"mamba_ssm", "fla"})
    return Case("linear_attention", name, make, run, low, LINEAR_ATTENTION, coarse, timed)


# Short convolution, gated norm


def _short_conv(name: str, tokens: int | None = None, layout: str = "", silu: bool = True, timed: bool = False) -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        L, D, K = tokens or s.length, s.dim, 4
        t = {
            "x": _normal(r, s.batch, L, D),
            "weight": _normal(r, D, K, scale=0.5),
            "tail": _normal(r, s.batch, K - 1, D),
        }
        if silu:
            t["bias"] = _normal(r, D)
        if "padded" in layout:
            t["lengths"] = _lengths(s)
        if "documents" in layout:
            t["resets"] = _resets(s)
        return t

    def run(t: Inputs, backend: str) -> tuple[Tensor, ...]:
        shape = _layout(t)
        y, tail = short_conv(
            t["x"], t["weight"], t.get("bias"), t["tail"], shape, "silu" if silu else None, backend=backend
        )
        return _seen(y, shape), tail

    return Case("short_conv", name, make, run, frozenset({"x"}), SHORT_CONV, timed=timed)


def _gated_norm(name: str, groups: int, timed: bool = False) -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        t = {key: _normal(r, s.batch, s.length, s.dim) for key in ("y", "z")}
        return t | {"weight": _normal(r, s.dim)}

    def run(t: Inputs, backend: str) -> tuple[Tensor, ...]:
        return (gated_rms_norm(t["y"], t["z"], t["weight"], groups, backend=backend),)

    return Case("gated_norm", name, make, run, frozenset({"y", "z"}), GATED_NORM, timed=timed)


# Ops of plain torch: the same on every device


def _diagonal(name: str, layout: bool) -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        lam = torch.stack([-_normal(r, s.dim, 8).abs() - 0.01, _normal(r, s.dim, 8)], -1)
        t = {"u": _normal(r, s.batch, s.length, s.dim), "lam": lam, "c": _normal(r, s.dim, 8, 2)}
        t["h"] = _normal(r, s.batch, s.dim, 8, 2)
        return t | ({"lengths": _lengths(s), "resets": _resets(s)} if layout else {})

    def run(t: Inputs, _: str) -> tuple[Tensor, ...]:
        shape = _layout(t)
        y, h = diagonal_recurrence(t["u"], t["lam"], t["c"], t["h"], shape)
        return _seen(y, shape), h

    return Case("diagonal", name, make, run, frozenset({"u"}))


def _long_conv(name: str, layout: bool) -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        past = s.length // 2
        t = {"u": _normal(r, s.batch, s.length, s.dim), "past": _normal(r, s.batch, past, s.dim)}
        t["k"] = _normal(r, s.length + past, s.dim, scale=s.length**-0.5)
        return t | ({"lengths": _lengths(s), "resets": _resets(s)} if layout else {})

    def run(t: Inputs, _: str) -> tuple[Tensor, ...]:
        shape = _layout(t)
        y, past = long_conv(t["u"], t["k"], t["past"], shape)
        return _seen(y, shape), past

    return Case("long_conv", name, make, run, frozenset({"u"}))


def _rotary() -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        return {"x": _normal(r, s.batch, s.length, s.heads, s.width), "at": torch.arange(s.length) + 100_000}

    def run(t: Inputs, _: str) -> tuple[Tensor, ...]:
        return (rotate(t["x"], rotary_table(t["at"], t["x"].shape[-1], 10000.0, t["x"].dtype)),)

    return Case("rotary", "far positions", make, run, frozenset({"x"}))


def _swiglu() -> Case:
    def make(s: Sizes, r: torch.Generator) -> Inputs:
        t = {"x": _normal(r, s.batch, s.length, s.dim), "w_in": _normal(r, 4 * s.dim, s.dim, scale=s.dim**-0.5)}
        return t | {"w_out": _normal(r, s.dim, 2 * s.dim, scale=s.dim**-0.5), "b_in": _normal(r, 4 * s.dim)}

    def run(t: Inputs, _: str) -> tuple[Tensor, ...]:
        return (swiglu(t["x"], t["w_in"], t["b_in"], t["w_out"], None),)

    return Case("swiglu", "biased", make, run, frozenset({"x", "w_in", "b_in", "w_out"}))


CASES: list[Case] = [
    _attention("full", causal=False),
    _attention("causal", timed=True),
    _attention("after a past", past=0.5),
    _attention("window", window=32, timed=True),
    _attention("window to both sides", window=32, causal=False),
    _attention("padded", causal=False, layout="padded"),
    _attention("documents", layout="documents", timed=True),
    _attention("documents, window", window=32, layout="documents"),
    _attention("documents after a past", past=0.5, layout="documents"),
    _pattern("blocks and their last tokens", (SameBlock(32) | LastOfBlocks(32, 8)) & CAUSAL, timed=True),
    _pattern("the first tokens after a past", (Window(16, 0) | First(4)) & CAUSAL, past=0.5),
    _pattern("blocks and what is around, both sides", SameBlock(16, 8, 8)),
    _linear("mamba2", rated=True, timed=True),
    _linear("mamba2, documents, padded", rated=True, layout=True),
    _linear("free decay", rated=False, timed=True),
    _linear("free decay, documents, padded", rated=False, layout=True),
    _short_conv("biased, silu", timed=True),
    _short_conv("bare", silu=False),
    _short_conv("padded", layout="padded"),
    _short_conv("documents, padded", layout="documents padded"),
    _short_conv("3 tokens", tokens=3),
    _gated_norm("one group", 1, timed=True),
    _gated_norm("two groups", 2),
    _diagonal("full", layout=False),
    _diagonal("documents, padded", layout=True),
    _long_conv("full", layout=False),
    _long_conv("documents, padded", layout=True),
    _rotary(),
    _swiglu(),
]
