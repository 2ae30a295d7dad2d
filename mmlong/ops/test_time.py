"""Memories that learn while they read: a small network a head, trained on the sequence by gradient descent over mini-batches of tokens.

The network ``f`` has one or more layers of weights ``W`` with a GELU between them; a layer's last row may be its bias. Its loss at a token is

    l_s(W) = 1/2 |LN(f(k_s)) - target_s|^2,     LN a layer norm with weights a head, or nothing

and the gradients of a mini-batch are all taken at one point, the *anchor* ``A``, the network before its first token. With ``u_s = grad l_s(A)``, two rules:

    plain (TTT, Sun et al. 2024, arXiv 2407.04620)            W_t = A - p_t sum_{s<=t} e_s u_s,     p_t a factor of the place in the mini-batch
    momentum (Titans, Behrouz et al. 2025, arXiv 2501.00663)  S_t = eta_t S_{t-1} - theta_t u_t;   W_t = (1 - alpha_t) W_{t-1} + S_t

each read at once, ``z_t = f(q_t)`` with ``W_t``. After the mini-batch's last token the anchor is what the network has become.

Fast form (the papers' dual form). The gradient of a layer is ``x_s g_s^T``, its input times the error behind it, and under both rules ``W_t`` is a sum of these and of two parts of the state before
the mini-batch (:mod:`mmlong.ops.descent_steps`). So a layer says of ``h``

    h W_t = read_t h W + read_other_t h W' - sum_{s<=t} (write_ts h.x_s) g_s

and no ``W_t`` is made but the last. A loop over mini-batches (:mod:`mmlong.ops.mini_batches`) learns; reading needs no loop once it is through. Errors are written in closed form, so that autograd
differentiates them once more. It keeps the network of every mini-batch: long sequences want to be run in pieces (:mod:`mmlong.ops.blockwise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.descent_steps import Steps, momentum_steps, plain_steps
from mmlong.ops.mini_batches import Frames, lay_out, whole_frames

EPS = 1e-6
"""Of the layer norm, as the TTT authors'."""

Layers = tuple[Tensor, ...]
"""Weights of a network, or something of their shapes: ``(B, H, N, P)`` each in states, ``(M, N, P)`` with M rows and heads here."""

gelu_backward: Any = torch.ops.aten.gelu_backward.default


class Norm(NamedTuple):
    """Layer norm of what the network says: ``weight`` and ``bias`` ``(H, P)``."""

    weight: Tensor
    bias: Tensor


class Memory(NamedTuple):
    """The state of a memory.

    Attributes:
        anchor: where gradients are taken; ``None`` where that is ``network``.
        network: plain: the anchor; momentum: the network now.
        other: plain: the sum of ``e_s u_s`` in this mini-batch; momentum: S. ``None`` where it is zero and stays so.
    """

    anchor: Layers | None
    network: Layers
    other: Layers | None

    def tensors(self) -> Layers:
        return (*(self.anchor or ()), *self.network, *(self.other or ()))

    def rebuilt(self, tensors: Sequence[Tensor]) -> Memory:
        """The same parts made of other tensors."""
        n = len(self.network)
        parts = iter([tuple(tensors[i : i + n]) for i in range(0, len(tensors), n)])
        anchor = None if self.anchor is None else next(parts)
        return Memory(anchor, next(parts), None if self.other is None else next(parts))


def descend(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rate: Tensor,
    place_rate: Tensor,
    norm: Norm | None,
    first: Layers,
    state: Memory,
    place: Tensor,
    layout: Layout | None = None,
) -> tuple[Tensor, Memory]:
    """Plain descent, tokens before heads as projections give them.

    Args:
        q: queries ``(B, L, H, N)``.
        k: keys ``(B, L, H, N)``.
        target: what the network is to say ``(B, L, H, P)``.
        rate: e ``(B, L, H)``.
        place_rate: p ``(size,)``, one for each place in a mini-batch.
        norm: of what the network says, or ``None``.
        first: weights that a document begins with, ``(H, N (+ 1), P)`` each; a row more than the input has is the bias.
        state: without an anchor.
        place: int64 ``(B, L)``, place of each token in its mini-batch; a document begins at 0.
        layout: lengths and resets are honoured.

    Returns:
        ``(z, state)``: ``z (B, L, H, P)`` before the norm, and the state at each row's own length, both in at least float32.
    """
    return _run(q, k, target, (rate,), place_rate, place_rate.shape[0], norm, first, state, place, layout)


def descend_with_momentum(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    theta: Tensor,
    log_keep: Tensor,
    log_eta: Tensor,
    size: int,
    norm: Norm | None,
    first: Layers,
    state: Memory,
    place: Tensor,
    layout: Layout | None = None,
) -> tuple[Tensor, Memory]:
    """Descent with momentum and decay; arguments and results as :func:`descend`, and

    Args:
        theta: rates ``(B, L, H)``.
        log_keep: ``log(1 - alpha)`` ``(B, L, H)``; anything below ``decayed_pairs.LEAST`` counts as that.
        log_eta: ``log eta`` ``(B, L, H)``; likewise.
        size: tokens of a mini-batch.
        state: with all three parts.
    """
    return _run(q, k, target, (theta, log_keep, log_eta), None, size, norm, first, state, place, layout)


def _run(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    gates: tuple[Tensor, ...],
    place_rate: Tensor | None,
    size: int,
    norm: Norm | None,
    first: Layers,
    state: Memory,
    place: Tensor,
    layout: Layout | None,
) -> tuple[Tensor, Memory]:
    """Whole mini-batches first, where there are such in all rows at once, then the rest."""
    B, L, H, _ = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        tokens = tuple(t.to(dtype) for t in (q, k, target, *(g[..., None] for g in gates)))
        first = tuple(w.to(dtype).repeat(B, 1, 1) for w in first)
        if norm is not None:
            norm = Norm(*(t.to(dtype).repeat(B, 1)[:, None] for t in norm))
        place_rate = None if place_rate is None else place_rate.to(dtype)
        memory = state.rebuilt([t.to(dtype).flatten(0, 1) for t in state.tensors()])
        outputs = []
        start = L - L % size if _aligned(place, layout) else 0
        if start:
            frames = whole_frames(start // size, size, q.device)
            z, memory = _frames(tuple(t[:, :start] for t in tokens), place_rate, norm, first, memory, frames, H)
            outputs.append(z)
        if start < L:
            frames = lay_out(place[:, start:], None if start else layout, size)
            z, memory = _frames(tuple(t[:, start:] for t in tokens), place_rate, norm, first, memory, frames, H)
            outputs.append(z)
        return torch.cat(outputs, 1), memory.rebuilt([t.unflatten(0, (B, H)) for t in memory.tensors()])


def _aligned(place: Tensor, layout: Layout | None) -> bool:
    """Whether every row begins with a mini-batch and goes on to the end; not asked where the answer is not known yet."""
    if layout is not None and (layout.lengths is not None or layout.resets is not None):
        return False
    return not torch.compiler.is_compiling() and not bool(place[:, 0].any())


def _frames(
    tokens: tuple[Tensor, ...],
    place_rate: Tensor | None,
    norm: Norm | None,
    first: Layers,
    memory: Memory,
    frames: Frames,
    H: int,
) -> tuple[Tensor, Memory]:
    """Some frames. Where all are whole, there is no sum between them, and no anchor but the network."""
    q, k, target, *gates = (frames.cut(t) for t in tokens)
    there = None
    if frames.there is not None:
        there = frames.there.transpose(0, 1).repeat_interleave(H, 1)[..., None]
        gates = [torch.where(there, g, 0) for g in gates]
    plain, whole = place_rate is not None, there is None
    if place_rate is None:
        theta, log_keep, log_eta = gates
        steps = momentum_steps(theta, log_keep, log_eta, there)
    else:
        steps = plain_steps(gates[0], place_rate, frames, H)
    given = memory
    if whole:
        memory = memory._replace(other=None) if plain else memory._replace(anchor=None)
    if first[0].shape[-2] > k.shape[-1]:
        q, k = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1), value=1.0)
    if norm is not None:
        target = target - norm.bias
    fresh, closes = frames.each(frames.fresh, H), frames.each(frames.closes, H)
    z, memory = _learn_and_read(q, k, target, steps, norm, first, memory, fresh, closes)
    if whole and plain:
        memory = memory._replace(other=given.other)
    elif whole:
        memory = memory._replace(anchor=tuple(t.clone() for t in memory.network))
    return frames.join(z, H), memory


def _learn_and_read(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    steps: Steps,
    norm: Norm | None,
    first: Layers,
    memory: Memory,
    fresh: Tensor | None,
    closes: Tensor | None,
) -> tuple[Tensor, Memory]:
    """Frames ``(n, M, T, .)``; ``fresh`` and ``closes`` ``(n, M, 1, 1)``, first and norm ``(M, ., .)``."""
    kept: list[tuple[Tensor, ...]] = []
    parts = [None if t is None else t.unbind(0) for t in steps]
    for i, (ki, ti) in enumerate(zip(k.unbind(0), target.unbind(0), strict=True)):
        if fresh is not None:
            memory = _begun(memory, first, fresh[i])
        step = Steps(*(None if t is None else t[i] for t in parts))  # type: ignore[arg-type]
        inputs, errors = _gradients(ki, ti, memory.network if memory.anchor is None else memory.anchor, norm)
        kept.append((*inputs[1:], *errors, *memory.network, *(memory.other or ())))
        memory = _after(memory, inputs, errors, step, None if closes is None else closes[i])
    n = len(first)
    every = [torch.stack(t) for t in zip(*kept, strict=True)]
    xs, gs, networks, others = (
        [k, *every[: n - 1]],
        every[n - 1 : 2 * n - 1],
        every[2 * n - 1 : 3 * n - 1],
        every[3 * n - 1 :],
    )
    z = q
    for j, (x, g, W) in enumerate(zip(xs, gs, networks, strict=True)):
        h = _widened(F.gelu(z, approximate="tanh"), W) if j else q
        z = _times(h @ W, steps.read) - (steps.write * (h @ x.mT)) @ g
        if others:
            z = torch.addcmul(z, h @ others[j], steps.read_other)  # type: ignore[arg-type]
    return z, memory


def _begun(memory: Memory, first: Layers, fresh: Tensor) -> Memory:
    """With the first network where a document begins."""

    def begun(layers: Layers | None) -> Layers | None:
        return layers and tuple(torch.where(fresh, w, t) for w, t in zip(first, layers, strict=True))

    other = memory.other and tuple(torch.where(fresh, 0, t) for t in memory.other)
    return Memory(begun(memory.anchor), begun(memory.network) or (), other)


def _after(memory: Memory, inputs: list[Tensor], errors: list[Tensor], step: Steps, closes: Tensor | None) -> Memory:
    """After a frame whose gradients are these."""
    network, other = [], []
    for j, (x, g, W) in enumerate(zip(inputs, errors, memory.network, strict=True)):
        W = _times(W, step.keep)
        if memory.other is not None:
            W2 = memory.other[j]
            assert step.other_leave is not None
            W = torch.addcmul(W, W2, step.keep_other)  # type: ignore[arg-type]
            other.append(torch.baddbmm(_times(W2, step.other), (x * step.other_leave).mT, g, alpha=-1))
        network.append(torch.baddbmm(W, (x * step.leave).mT, g, alpha=-1))
    anchor = memory.anchor
    if anchor is not None:
        assert closes is not None
        anchor = tuple(torch.where(closes, w, a) for w, a in zip(network, anchor, strict=True))
    return Memory(anchor, tuple(network), None if memory.other is None else tuple(other))


def _gradients(k: Tensor, target: Tensor, layers: Layers, norm: Norm | None) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's input, and the loss's gradient by its output."""
    inputs, outputs = [k], [k @ layers[0]]
    for W in layers[1:]:
        inputs.append(_widened(F.gelu(outputs[-1], approximate="tanh"), W))
        outputs.append(inputs[-1] @ W)
    errors = [_error(outputs[-1], target, norm)]
    for W, z in zip(layers[:0:-1], outputs[-2::-1], strict=True):
        back = errors[0] @ W[:, : z.shape[-1]].mT
        errors.insert(0, gelu_backward(back, z, approximate="tanh"))
    return inputs, errors


def _error(z: Tensor, target: Tensor, norm: Norm | None) -> Tensor:
    """Gradient of the loss by ``z``; ``target`` has the norm's bias taken off."""
    if norm is None:
        return z - target
    # Torch's own variance takes several times as long on rows so short.
    centred = z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    unit = centred * scale
    e = torch.addcmul(-target, unit, norm.weight) * norm.weight
    return (e - e.mean(-1, keepdim=True) - unit * (e * unit).mean(-1, keepdim=True)) * scale


def _widened(h: Tensor, W: Tensor) -> Tensor:
    """With a one more for the bias, where the layer has one."""
    return F.pad(h, (0, 1), value=1.0) if W.shape[-2] > h.shape[-1] else h


def _times(t: Tensor, share: Tensor | None) -> Tensor:
    return t if share is None else t * share
