"""A linear time-invariant system of each channel, in chunks of tokens by matrix products: what diagonal and dense transitions share.

Definition, for every channel, with a state ``h`` of ``K`` numbers:

    h_t = A h_{t-1} + B u_t,      y_t = C h_t        (strict: C h_{t-1})

The sequence is cut into chunks of ``T`` tokens. Inside one, the convolution is a product with the ``T x T`` Toeplitz matrix of the first ``T`` values of the impulse
response; what a chunk leaves behind is a product with ``B .. A^{T-1} B``; states go from chunk to chunk by ``A^T``, and are read by a product with ``C A .. C A^T``.
Neither a kernel of the whole length nor an FFT is made. Documents (resets) are moved so that each begins a chunk.

Only the tables of one chunk depend on what ``A`` looks like: :mod:`mmlong.ops.diagonal` and :mod:`mmlong.ops.state_space` make them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout

CHUNK = 64
"""Tokens a chunk: as many as a channel's state commonly has numbers, which balances the products inside and between chunks."""

SCAN_PASSES = 20
"""Doubling steps over an unknown number of chunks in an exported program: enough for 2^20 of them, 67 million tokens."""


@dataclass(frozen=True)
class ChunkTables:
    """What a chunk of ``T`` tokens does.

    Attributes:
        kernel: ``(D, T)``, the impulse response at lags ``0 .. T - 1`` (strict: 0 at lag 0).
        read: ``(D, T, K)``, by which each token of a chunk reads the state that stood before the chunk.
        write: ``(D, T, K)``, what each token of a chunk leaves in the state after it.
        carry: ``(left (D, B, n, K), h (D, B, K), keep (B, n) or None)`` to the states between chunks ``(D, B, n + 1, K)``: the first is ``h``, and
            ``s_{j+1} = A^T keep_j s_j + left_j``.
        silent: a state ``(D, B, K)`` and a number of tokens below ``T``, or int64 ``(B,)`` of them, to the state after so many zeros.
    """

    kernel: Tensor
    read: Tensor
    write: Tensor
    carry: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    silent: Callable[[Tensor, int | Tensor], Tensor]


def plain(layout: Layout | None) -> bool:
    """Full rows of one document."""
    return layout is None or (layout.lengths is None and layout.resets is None)


def lagged(kernel: Tensor, strict: bool) -> Tensor:
    """The kernel ``(D, T)``, for ``strict`` one token later."""
    return F.pad(kernel[:, :-1], (1, 0)) if strict else kernel


def in_chunks(
    u: Tensor, h: Tensor, layout: Layout | None, chunk: int, tables: Callable[[int], ChunkTables]
) -> tuple[Tensor, Tensor]:
    """Run a system over a piece of a sequence.

    Args:
        u: ``(B, L, D)``.
        h: the state that came before ``(B, D, K)``.
        layout: lengths and resets are honoured. A document takes whole chunks.
        chunk: tokens a chunk; no more than there are, where that is known.
        tables: of chunks of so many tokens.

    Returns:
        ``(y, h)``: ``y`` like ``u``, and the state at each row's own length.
    """
    B, L = u.shape[:2]
    bare, T = plain(layout), chunk
    if not torch.compiler.is_exporting() or isinstance(L, int):
        T = min(chunk, L)
    elif layout is None or layout.lengths is None:
        # The end of a sequence of unknown length lies anywhere in a chunk, as that of a padded row does.
        layout, bare = replace(layout or Layout(), lengths=torch.full((B,), L, device=u.device)), False
    return _run(u, h, None if bare else layout, tables(T))


def _run(u: Tensor, h: Tensor, layout: Layout | None, system: ChunkTables) -> tuple[Tensor, Tensor]:
    B, L, D = u.shape
    T, K = system.write.shape[1:]
    ends = keep = places = None
    if layout is not None:
        valid = layout.valid(L)
        u = u if valid is None else torch.where(valid[..., None], u, 0)
        if layout.lengths is not None:
            ends = layout.lengths
        if layout.resets is not None:
            places, chunks = _places(layout, T)
            rows = torch.arange(B, device=u.device)[:, None].expand(-1, L)
            keep = torch.ones(B, chunks, dtype=u.dtype, device=u.device)
            keep = keep.masked_fill(
                torch.zeros_like(keep).index_put((rows, places // T), layout.resets.to(u.dtype), accumulate=True) > 0, 0
            )
            u = u.new_zeros(B, chunks * T, D).index_put((rows, places), u)
            last = torch.full((B,), L, device=u.device) if ends is None else ends
            ends = torch.where(last > 0, places.gather(1, (last - 1).clamp_min(0)[:, None])[:, 0] + 1, 0)
    length = u.shape[1]
    n = (length + T - 1) // T
    if torch.compiler.is_exporting() and not isinstance(length, int):
        n += 1  # of an unknown number of chunks, 1 would be traced as a special case
    # Channel-major, so that every product below is one batch of matrices a channel.
    major = F.pad(u.permute(2, 0, 1), (0, n * T - length)).reshape(D, B * n, T)

    left = torch.bmm(major, system.write).view(D, B, n, K)
    states = system.carry(left, h.transpose(0, 1), keep)
    entering = states[:, :, :n]
    if keep is not None:
        entering = entering * keep[:, :, None]
    toeplitz = F.pad(system.kernel, (T - 1, 0)).unfold(-1, T, 1).flip(-1)
    y = torch.bmm(major, toeplitz.transpose(1, 2))
    y = torch.baddbmm(y, entering.reshape(D, B * n, K), system.read.transpose(1, 2)).view(D, B, n * T)
    after = _final(major.view(D, B, n * T), states, keep, system, ends, length)
    y = y[:, :, :length].permute(1, 2, 0)
    if places is not None:
        y = y.gather(1, places[..., None].expand(-1, -1, D))
    return y, after


def _places(layout: Layout, T: int) -> tuple[Tensor, int]:
    """Where each token goes so that every document begins a chunk, int64 ``(B, L)``, and the number of chunks."""
    resets, starts = layout.resets, layout.starts()
    assert resets is not None
    assert starts is not None
    here = torch.arange(resets.shape[1], device=resets.device).expand_as(resets)
    previous = F.pad(starts.clamp_min(0), (1, -1))
    gaps = torch.where(resets, (previous - here) % T, 0)
    places = here + gaps.cumsum(1)
    return places, int(places[:, -1].max()) // T + 1


def _final(
    major: Tensor, states: Tensor, keep: Tensor | None, system: ChunkTables, ends: Tensor | None, length: int
) -> Tensor:
    """The state at ``ends (B,)`` (or at ``length``): that of the chunk it lies in, decayed, and the chunk's tokens before it."""
    D, B, _ = major.shape
    T = system.write.shape[1]
    rest: int | Tensor
    if ends is None:
        chunk, rest = divmod(length, T)
        before = states[:, :, chunk]
        if not rest:
            return before.transpose(0, 1).clone()
        window = F.pad(major[:, :, chunk * T : length], (T - rest, 0))
    else:
        rows = torch.arange(B, device=major.device)
        chunks, rest = ends // T, ends % T
        before = states[:, rows, chunks]
        if keep is not None:
            crossed = keep[rows, chunks.clamp_max(keep.shape[1] - 1)]
            before = before * torch.where(rest > 0, crossed, 1)[:, None]
        index = ends[:, None] - T + torch.arange(T, device=major.device)
        window = major.gather(2, index.clamp_min(0).expand(D, -1, -1))
        window = torch.where(index >= (chunks * T)[:, None], window, 0)
    return (system.silent(before, rest) + torch.bmm(window, system.write)).transpose(0, 1).contiguous()


def carry_by_doubling(
    left: Tensor,
    h: Tensor,
    keep: Tensor | None,
    factor: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor],
    square: Callable[[Tensor], Tensor],
) -> Tensor:
    """A ``carry`` for an exported program, which has no loop over an unknown number of chunks.

    A scan in doubling steps (Hillis & Steele 1986): after ``k`` of them each place holds the sum of the ``2^k`` chunks before it.

    Args:
        left, h, keep: as :class:`ChunkTables` has them.
        factor: ``A^T``, in the form that ``apply`` (to states ``(D, B, n, K)``) and ``square`` take.
    """
    n = left.shape[2]
    passes = n.bit_length() if isinstance(n, int) else SCAN_PASSES
    torch._check(n < 1 << passes)
    total = torch.cat([h[:, :, None], left], 2)
    across = None if keep is None else F.pad(keep, (1, 0))  # (B, n + 1): whether what came before crosses into it
    place = torch.arange(n + 1, device=left.device)
    for step in (1 << k for k in range(passes)):
        source = (place - step).clamp_min(0)
        moved = apply(factor, total.index_select(2, source))
        moved = torch.where((place >= step)[:, None], moved, 0)
        if across is not None:
            moved = moved * across[:, :, None]
            across = across * across.index_select(1, source)
        total = total + moved
        factor = square(factor)
    return total
