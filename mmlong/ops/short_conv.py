"""Causal depthwise short convolution, channels last, with the tail of the past as its state.

Definition, for every channel ``d`` (each, or each group of neighbours, has its own ``K`` taps; the last tap is the present):

    y_t[d] = bias[d] + sum_{k=0..K-1} weight[d, K-1-k] x_{t-k}[d],      optionally y <- silu(y)

where ``x`` before position 0 is the tail (zeros at the beginning of a document). It stands before most gated recurrences (Fu et al. 2022, H3,
arXiv 2212.14052; Mamba, arXiv 2312.00752) with ``K = 4``.

Fast form: ``K`` shifted multiply-adds over blocks of tokens that stay in the cache, directly on ``(B, L, D)``, where a library convolution wants
``(B, D, L)`` and copies both ways. A few tokens of a narrow ``D`` are folded into one row so that the inner loops are long. The backward is written out and
recomputes what comes before the activation. More than ``SHIFTED_TAPS`` taps go by products of matrices (:mod:`mmlong.ops.toeplitz_conv`).

Documents (resets) are moved apart by ``K - 1`` zeros, which nothing reaches across; where that would more than double the sequence, each tap is masked instead, in stretches that the backward
recomputes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmlong.layout import Layout
from mmlong.ops.backends import Backend
from mmlong.ops.places import gather, spread
from mmlong.ops.short_conv_backends import SHORT_CONV, choose_short_conv
from mmlong.ops.tails import tail_after
from mmlong.ops.toeplitz_conv import toeplitz_conv

Activation = Literal["silu"] | None

BLOCK_ELEMENTS = 1 << 19
"""Elements of a block of tokens; it, the block it makes and a temporary fit the second-level caches of a common processor."""

ROW_ELEMENTS = 512
"""Tokens are folded into rows of at least this many elements."""

SHIFTED_TAPS = 32
"""Up to so many taps, shifted multiply-adds take less time than products of matrices."""


def short_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None, activation: Activation = None
) -> tuple[Tensor, Tensor]:
    """The definition, without a layout; arguments and results as :func:`short_conv`."""
    K = weight.shape[1]
    weight = _each(weight, x.shape[2])
    padded = torch.cat([_zero_tail(x, K) if tail is None else tail.to(x.dtype), x], dim=1)
    y = sum((padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(K)), torch.zeros_like(x))
    y = y if bias is None else y + bias
    return F.silu(y) if activation == "silu" else y, padded[:, x.shape[1] :]


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    layout: Layout | None = None,
    activation: Activation = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution of a piece of a sequence.

    Args:
        x: ``(B, L, D)``; fastest where each row is contiguous.
        weight: ``(D, K)``, K >= 1; ``weight[:, -1]`` multiplies the present token. Or ``(G, K)``, G dividing D: channels ``d`` share taps ``d // (D // G)``.
        bias: ``(D,)`` or ``None``.
        tail: the last ``K - 1`` inputs of the past ``(B, K - 1, D)``, oldest first, or ``None`` from the beginning.
        layout: lengths and resets are honoured. Many taps and documents much shorter than them cost as if those were that long.
        activation: ``"silu"`` to apply it in the same pass, or ``None``.
        backend: a name that ``mmlong doctor`` lists, or ``auto`` for the best that can run here.

    Returns:
        ``(y, tail)``: ``y`` like ``x``, and the last ``K - 1`` inputs of each row's last document at its own length, in at least
        float32.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: an unknown backend, or one that cannot do this, with the reason.
    """
    B, _, D = x.shape
    K = weight.shape[1]
    if not weight.shape[0] or D % weight.shape[0]:
        raise ValueError(f"short_conv: weight is {tuple(weight.shape)}, x has D = {D} channels")
    if tail is not None and tuple(tail.shape) != (B, K - 1, D):
        raise ValueError(f"short_conv: tail is {tuple(tail.shape)}, expected (B, K - 1, D) = {(B, K - 1, D)}")
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: unknown activation {activation!r}; use 'silu' or None")
    if layout is not None and (layout.lengths is not None or layout.resets is not None):
        return _with_layout(x, weight, bias, tail, layout, activation, backend)
    chosen = _choose(x, weight, False, backend)
    return chosen.run(x, weight if chosen.name == "portable" else _each(weight, D), bias, tail, activation)


def _choose(x: Tensor, weight: Tensor, resets: bool, backend: str) -> Backend:
    if backend == "auto" and (x.device.type == "cpu" or torch.compiler.is_compiling()):
        return SHORT_CONV.portable()
    return choose_short_conv(x, weight, resets, backend)


def _each(weight: Tensor, D: int) -> Tensor:
    """The taps of every channel ``(D, K)``."""
    times = D // weight.shape[0]
    return weight if times == 1 else weight.repeat_interleave(times, 0)


def _portable(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        # A compiler fuses the shifts by itself, and a GPU's cache is not blocked from Python.
        form = _plain if weight.shape[1] <= SHIFTED_TAPS else _many_taps
        return form(x, weight, bias, tail, activation)
    if x.shape[1] == 1 and not torch.is_grad_enabled():
        return _one_token(x, _each(weight, x.shape[2]), bias, tail, activation)
    if weight.shape[1] > SHIFTED_TAPS:
        return _many_taps(x, weight, bias, tail, activation)
    return _ShortConv.apply(x, _each(weight, x.shape[2]), bias, tail, activation)


SHORT_CONV.register(Backend("portable", _portable, masks=frozenset({"resets"}), note="default on a CPU"))


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _zero_tail(x: Tensor, K: int) -> Tensor:
    return x.new_zeros(x.shape[0], K - 1, x.shape[2])


def _finish(y: Tensor, activation: Activation) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def _one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    dtype = _state_dtype(x.dtype)
    window = torch.cat([_zero_tail(x, weight.shape[1]).to(dtype) if tail is None else tail, x], dim=1)
    y = (window * weight.t()).sum(1, keepdim=True)
    y = y if bias is None else y + bias
    return _finish(y, activation).to(x.dtype), window[:, 1:].to(dtype)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Shifted multiply-adds in operations that autograd and compilers understand."""
    K, L, dtype = weight.shape[1], x.shape[1], _state_dtype(x.dtype)
    taps = _each(weight, x.shape[2]).to(dtype)
    padded = torch.cat([_zero_tail(x, K) if tail is None else tail, x.to(dtype)], dim=1)
    y = padded[:, K - 1 :] * taps[:, K - 1]
    for k in range(1, K):
        y = y + padded[:, K - 1 - k : K - 1 - k + L] * taps[:, K - 1 - k]
    y = y if bias is None else y + bias.to(dtype)
    return _finish(y, activation).to(x.dtype), padded[:, L:]


def _many_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """By products of Toeplitz matrices."""
    dtype = _state_dtype(x.dtype)
    before = (_zero_tail(x, weight.shape[1]) if tail is None else tail).to(dtype)
    y = toeplitz_conv(x, weight, before)
    y = y if bias is None else y + bias.to(dtype)
    return _finish(y, activation).to(x.dtype), tail_after(x, before, None)


def _with_layout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    layout: Layout,
    activation: Activation,
    backend: str,
) -> tuple[Tensor, Tensor]:
    K, documents = weight.shape[1], layout.documents()
    before = (_zero_tail(x, K) if tail is None else tail).to(_state_dtype(x.dtype))
    after = tail_after(x, before, layout)
    if documents is None or K == 1:
        return short_conv(x, weight, bias, tail, None, activation, backend)[0], after
    _choose(x, weight, True, backend)
    given = (x, _each(weight, x.shape[2]), bias, before)
    if torch.compiler.is_compiling():
        return _masked(*given, documents, activation), after
    if x.device.type == "cpu":
        # As many zeros before a document as its first token's taps reach back.
        places = torch.arange(x.shape[1]) + (K - 1) * documents
        longer = int(places[:, -1].max()) + 1
        if longer <= 2 * x.shape[1]:
            return _apart(x, weight, bias, before, places, longer, activation), after
    return _in_stretches(*given, documents, activation), after


def _apart(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, places: Tensor, longer: int, activation: Activation
) -> Tensor:
    """Documents moved to ``places (B, L)`` of a sequence of ``longer`` tokens, where zeros lie between them, and back."""
    y, _ = _portable(spread(x, places, longer), weight, bias, tail, activation)
    return gather(y, places)


def _masked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    documents: Tensor,
    activation: Activation,
) -> Tensor:
    """Shifted multiply-adds, each masked by whether the tap's document is the token's: ``documents`` ``(B, L)``, 0 that of the tail."""
    L, K, dtype = x.shape[1], weight.shape[1], tail.dtype
    taps = weight.to(dtype)
    padded = torch.cat([tail, x.to(dtype)], dim=1)
    documents = F.pad(documents, (K - 1, 0))
    y = padded[:, K - 1 :] * taps[:, K - 1]
    for k in range(1, K):
        there = slice(K - 1 - k, K - 1 - k + L)
        same = documents[:, there] == documents[:, K - 1 :]
        y = y + torch.where(same[..., None], padded[:, there], 0) * taps[:, K - 1 - k]
    return _finish(y if bias is None else y + bias.to(dtype), activation).to(x.dtype)


def _in_stretches(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, documents: Tensor, activation: Activation
) -> Tensor:
    """:func:`_masked` over stretches of tokens, each recomputed in the backward, for the memory of one."""
    again = partial(checkpoint, _masked, use_reentrant=False, preserve_rng_state=False)
    B, L, D = x.shape
    step = max(weight.shape[1], BLOCK_ELEMENTS // (B * D)) if x.device.type == "cpu" else L
    outputs = []
    for i in range(0, L, step):
        part, inside = x[:, i : i + step], documents[:, i : i + step]
        # Counted from what the stretch before ended in, of which the tail may hold several.
        first = documents[:, i - 1 : i] if i else torch.zeros_like(documents[:, :1])
        outputs.append(again(part, weight, bias, tail, inside - first, activation))
        if i + step < L:
            ended = Layout(resets=torch.diff(inside, dim=1, prepend=first) > 0)
            tail = tail_after(part, tail, ended)
    return torch.cat(outputs, 1)


# The blocked form


def _blocks(B: int, L: int, D: int, head: int) -> Iterator[tuple[slice, int, int]]:
    """Rows and ``start, stop`` of blocks of about ``BLOCK_ELEMENTS``; several whole rows together where rows are short.

    The first ``head`` tokens are a block of their own, for all rows: only they reach back to the tail, so that every other block is a view.
    """
    head = min(head, L)
    yield slice(0, B), 0, head
    tokens = max(64, BLOCK_ELEMENTS // D)
    rows = max(1, tokens // L)
    for b in range(0, B, rows):
        for i in range(head, L, tokens):
            yield slice(b, min(b + rows, B)), i, min(i + tokens, L)


class _Taps:
    """The taps, tiled over the tokens of a folded row, and the walks over a block of tokens."""

    def __init__(self, weight: Tensor, bias: Tensor | None, fold: int, dtype: torch.dtype) -> None:
        self.fold, (self.D, self.K) = fold, weight.shape
        self.head = -(-self.K // fold) * fold
        self.rows = [tap.repeat(fold) for tap in weight.to(dtype).t()]
        self.bias = None if bias is None else bias.to(dtype).repeat(fold)

    def parts(self, tokens: int) -> list[tuple[int, int, int]]:
        """``(start, stop, tokens a row)``: what folds evenly, and the rest."""
        even = tokens - tokens % self.fold
        whole = [(0, even, self.fold)] if even else []
        return whole + ([(even, tokens, 1)] if even < tokens else [])

    def view(self, t: Tensor, start: int, stop: int, fold: int) -> Tensor:
        part = t[:, start:stop]
        return part if fold == 1 else part.view(t.shape[0], -1, fold * self.D)

    def convolve(self, padded: Tensor, out: Tensor) -> None:
        """``padded (R, K - 1 + T, D)`` to ``out (R, T, D)``, before the activation."""
        for a, b, fold in self.parts(out.shape[1]):
            o, n = self.view(out, a, b, fold), fold * self.D
            for k in range(self.K):
                s = self.view(padded, a + self.K - 1 - k, b + self.K - 1 - k, fold)
                tap = self.rows[self.K - 1 - k][:n]
                if k:
                    o.addcmul_(s, tap)
                elif self.bias is None:
                    torch.mul(s, tap, out=o)
                else:
                    torch.addcmul(self.bias[:n], s, tap, out=o)

    def transpose(self, dy: Tensor, dpadded: Tensor) -> None:
        """Write the present's share of ``dy (R, T, D)`` into ``dpadded (R, K - 1 + T, D)`` and add the past's."""
        for k in range(self.K):
            for a, b, fold in self.parts(dy.shape[1]):
                d = self.view(dpadded, a + self.K - 1 - k, b + self.K - 1 - k, fold)
                tap = self.rows[self.K - 1 - k][: fold * self.D]
                if k:
                    d.addcmul_(self.view(dy, a, b, fold), tap)
                else:
                    torch.mul(self.view(dy, a, b, fold), tap, out=d)

    def gradient(self, padded: Tensor, dy: Tensor, dweight: Tensor, scratch: Tensor) -> None:
        """Add to ``dweight (K, D)``."""
        for a, b, fold in self.parts(dy.shape[1]):
            d = self.view(dy, a, b, fold)
            product = scratch.view(-1)[: d.numel()].view(d.shape)
            for k in range(self.K):
                torch.mul(d, self.view(padded, a + self.K - 1 - k, b + self.K - 1 - k, fold), out=product)
                dweight[self.K - 1 - k] += product.sum((0, 1)).view(fold, self.D).sum(0)


def _fold(x: Tensor) -> int:
    D = x.shape[2]
    dense = x.stride(2) == 1 and x.stride(1) == D
    return max(1, ROW_ELEMENTS // D) if dense else 1


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: Activation
    ) -> tuple[Tensor, Tensor]:
        (B, L, D), K = x.shape, weight.shape[1]
        dtype = _state_dtype(x.dtype)
        taps = _Taps(weight, bias, _fold(x), dtype)
        y = torch.empty(B, L, D, dtype=x.dtype)
        before = (_zero_tail(x, K) if tail is None else tail).to(dtype)
        for rows, i, j in _blocks(B, L, D, taps.head):
            padded = _padded(x, before, rows, i, j, K, dtype)
            direct = y[rows, i:j]
            out = direct if x.dtype == dtype else torch.empty(direct.shape, dtype=dtype)
            taps.convolve(padded, out)
            if activation == "silu":
                F.silu(out, inplace=True)
            if out is not direct:
                direct.copy_(out)
        ctx.save_for_backward(x, weight, bias, before)
        ctx.activation, ctx.has_tail = activation, tail is not None
        ctx.set_materialize_grads(False)
        return y, tail_after(x, before, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dafter: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, before = ctx.saved_tensors
        (B, L, D), K, dtype = x.shape, weight.shape[1], before.dtype
        dweight = torch.zeros(K, D, dtype=dtype)
        dbias = torch.zeros(D, dtype=dtype)
        dbefore = torch.zeros_like(before)
        if dy is None:
            dx = torch.zeros(B, L, D, dtype=dtype)
        else:
            dx = torch.empty(B, L, D, dtype=dtype)
            taps = _Taps(weight, bias, min(_fold(x), _fold(dy)), dtype)
            for rows, i, j in _blocks(B, L, D, taps.head):
                padded = _padded(x, before, rows, i, j, K, dtype)
                d = dy[rows, i:j].to(dtype)
                scratch = torch.empty(d.shape, dtype=dtype)
                if ctx.activation == "silu":
                    taps.convolve(padded, scratch)
                    d = torch.ops.aten.silu_backward(d, scratch)
                if i:
                    taps.transpose(d, dx[rows, i - K + 1 : j])
                else:
                    dpadded = torch.zeros(padded.shape, dtype=dtype)
                    taps.transpose(d, dpadded)
                    dbefore[rows] = dpadded[:, : K - 1]
                    dx[rows, :j] = dpadded[:, K - 1 :]
                if ctx.needs_input_grad[1]:
                    taps.gradient(padded, d, dweight, scratch)
                if bias is not None:
                    dbias += d.sum((0, 1))
        if dafter is not None:
            new = min(L, K - 1)
            dx[:, L - new :] += dafter[:, K - 1 - new :]
            dbefore[:, new:] += dafter[:, : K - 1 - new]
        return (
            dx.to(x.dtype),
            dweight.t().to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            dbefore if ctx.has_tail else None,
            None,
        )


def _padded(x: Tensor, before: Tensor, rows: slice, i: int, j: int, K: int, dtype: torch.dtype) -> Tensor:
    """Tokens ``i - K + 1`` to ``j`` of some rows, in the accumulation type: a view wherever it can be."""
    if i == 0:
        return torch.cat([before[rows], x[rows, :j].to(dtype)], dim=1)
    return x[rows, i - K + 1 : j].to(dtype)
