"""The backends of softmax attention, and which of them ``auto`` takes.

| name | what | where |
|---|---|---|
| `sdpa` | torch's ``scaled_dot_product_attention``; where it has no kernel for what is seen, under an explicit mask | all |
| `tiled` | :mod:`mmlong.ops.tiled_attention`: any intervals and terms, memory linear in the length | all; made for CPUs |
| `dense` | :mod:`mmlong.ops.dense_attention`: any terms, by the matrix of scores | all; short sequences and compilers |
| `blocks` | sliding windows as a batch of blocks for SDPA (:mod:`mmlong.ops.local_attention`) | all; made for GPUs |
| `flex` | FlexAttention, its block mask computed from the intervals | CUDA; on a CPU without a gradient |
| `varlen` | torch's variable-length flash attention, for documents in one row | CUDA, half precision |
| `xformers` | memory-efficient attention of ``mslk`` or ``xformers`` | CUDA |

Terms (a bias, a sink, ...: :mod:`mmlong.ops.score_terms`) are left to ``dense`` where the scores are few, or a compiler needs one expression, and to ``tiled`` elsewhere.
The last three are taken by name, or where no other can; but on CUDA ``flex`` comes first where rows or documents differ and an explicit mask would be too large. Measured on a CPU: SDPA's own kernel is the fastest for full and causal attention, tiles for everything that it
has no kernel for. Nothing here has been run on a GPU: masks are held against the intervals, and calls against stand-ins.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.backends import CUDA, HALVES, Backend, Backends, Request, cuda_package
from mmlong.ops.dense_attention import dense_attention
from mmlong.ops.local_attention import window_in_blocks
from mmlong.ops.score_terms import Terms
from mmlong.ops.tiled_attention import tiled_attention
from mmlong.ops.visible import Visible

MASK_ELEMENTS = 1 << 16
"""An explicit mask of up to this many elements is the fastest way on a CPU."""

GPU_MASK_ELEMENTS = 1 << 26
"""On other devices masks up to this size are worth their memory."""

BLOCK = 128
"""Side of FlexAttention's blocks."""

KINDS = frozenset({"full", "causal", "past", "window", "ragged", "ragged past", "ragged window"})
TERMS = frozenset({"decay", "bias", "relative", "fade", "softcap", "sink"})

ATTENTION = Backends("attention")


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float, backend: str, terms: Terms | None = None
) -> Tensor:
    """Choose a backend and call it; arguments as :func:`mmlong.ops.attention.attention`."""
    (B, H, L, D), (_, _, S, E) = q.shape, v.shape
    kind = visible.kind(L, S)
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if terms is not None:
        grad = grad or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in terms.tensors()))
        request = Request(q.device.type, q.dtype, kind, dropout > 0, grad, terms=terms.kinds)
        chosen = ATTENTION.choose(request, backend, _fastest_with_terms(q.device.type, B * H * L * S))
        return chosen.run(q, k, v, visible, dropout, terms)
    request = Request(q.device.type, q.dtype, kind, dropout > 0, grad)
    fastest = _fastest(kind, q.device.type, B, L, S, visible)
    if D != E and fastest[0] == "sdpa" and q.device.type == "cpu" and not torch.compiler.is_compiling():
        # Torch's own kernel for CPUs wants values as wide as keys; without it, it makes the matrix of scores.
        fastest = ("sdpa", "tiled") if B * H * L * S <= MASK_ELEMENTS else ("tiled",)
    return ATTENTION.choose(request, backend, fastest).run(q, k, v, visible, dropout)


def _fastest(kind: str, device: str, B: int, L: int, S: int, visible: Visible) -> tuple[str, ...]:
    if kind in ("full", "causal"):
        return ("sdpa", "tiled")
    if device == "cuda" and visible.ragged and not torch.compiler.is_compiling():
        # What an explicit mask, or that of all blocks, would take.
        keys = 2 * sum(S if n is None else n for n in (visible.left, visible.right)) if "window" in kind else S
        if B * L * keys > GPU_MASK_ELEMENTS:
            return ("flex", "blocks") if "window" in kind else ("flex", "tiled")
    if "window" in kind and (torch.compiler.is_compiling() or device != "cpu"):
        return ("blocks",)
    if torch.compiler.is_compiling() or (kind == "past" and device == "cuda"):
        return ("sdpa",)
    elements = (B if visible.ragged else 1) * L * S
    return ("sdpa", "tiled") if elements <= (MASK_ELEMENTS if device == "cpu" else GPU_MASK_ELEMENTS) else ("tiled",)


def _fastest_with_terms(device: str, elements: int) -> tuple[str, ...]:
    if torch.compiler.is_compiling():
        return ("dense",)
    return ("dense", "tiled") if elements <= (MASK_ELEMENTS if device == "cpu" else GPU_MASK_ELEMENTS) else ("tiled",)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float) -> Tensor:
    L, S = q.shape[2], k.shape[2]
    kind = visible.kind(L, S)
    mask: Any = None
    if kind == "past" and q.device.type == "cuda" and not torch.compiler.is_compiling():
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(L, S)
    elif kind not in ("full", "causal"):
        mask = visible.mask(L, S, q.device)
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and L * S > MASK_ELEMENTS:
        # Each is read once for every block of queries: heads by heads that is faster by a twentieth, copies included (4,096 tokens, forward and backward).
        q, k, v = (t.contiguous() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, kind == "causal", enable_gqa=grouped)


def _tiled(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float, terms: Terms | None = None) -> Tensor:
    first, stop = visible.intervals(q.shape[2], k.shape[2], q.device)
    return tiled_attention(q, k, v, first, stop, 1 / math.sqrt(q.shape[-1]), dropout, terms)


def _dense(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float, terms: Terms | None = None) -> Tensor:
    return dense_attention(q, k, v, visible, terms, dropout)


def _blocks(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float) -> Tensor:
    return window_in_blocks(q, k, v, visible, dropout)


# FlexAttention


def block_ranges(first: Tensor, stop: Tensor, S: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlexAttention's lists of blocks, from intervals ``(B, L)`` by arithmetic.

    Returns:
        numbers of partly seen blocks ``(B, 1, L / BLOCK)`` and their indices ``(B, 1, L / BLOCK, S / BLOCK)``; the same of blocks all of
        which every query of the row of blocks sees. Counts are rounded up; indices after the count are of no meaning.
    """
    L = first.shape[1]
    columns, short = -(-S // BLOCK), -L % BLOCK
    first, stop = (torch.cat([t, t[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, BLOCK)) for t in (first, stop))
    a, b = first.amin(-1) // BLOCK, (stop.amax(-1) + BLOCK - 1) // BLOCK
    full_a, full_b = (first.amax(-1) + BLOCK - 1) // BLOCK, stop.amin(-1) // BLOCK
    # A last block that is cut off by the end of the keys is not full.
    full = (full_b - full_a).clamp_min(0)
    full_a = torch.where(full > 0, full_a, b)
    n = torch.arange(columns, device=first.device)
    before = (full_a - a)[..., None]
    partly = a[..., None] + n
    partly = torch.where(n < before, partly, partly + full[..., None])
    whole = full_a[..., None] + n

    def shaped(t: Tensor) -> Tensor:
        return t.to(torch.int32)[:, None].contiguous()

    last = columns - 1
    return (
        shaped(b - a - full),
        shaped(partly.clamp_max(last)),
        shaped(full),
        shaped(whole.clamp_max(last)),
    )


def flex_block_mask(visible: Visible, L: int, S: int, device: torch.device | str) -> Any:
    """The BlockMask of what is seen. Cached where it depends on the sizes alone."""
    if visible.ragged:
        return _block_mask(visible, L, S, device)
    return _cached_block_mask(visible.left, visible.right, L, S, str(device))


@lru_cache(maxsize=32)
def _cached_block_mask(left: int | None, right: int | None, L: int, S: int, device: str) -> Any:
    return _block_mask(Visible(left, right), L, S, device)


def _block_mask(visible: Visible, L: int, S: int, device: torch.device | str) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    first, stop = visible.intervals(L, S, device)
    rows = first.shape[0]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = b if rows > 1 else torch.zeros_like(b)
        # Queries that fill up the last block have no interval of their own.
        query = i.clamp_max(L - 1)
        return (j >= first[row, query]) & (j < stop[row, query])

    lists = block_ranges(first, stop, S)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(L, S))


def _flex(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float) -> Tensor:
    mask = flex_block_mask(visible, q.shape[2], k.shape[2], q.device)
    return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


# Variable lengths


def document_bounds(visible: Visible, L: int, B: int, device: torch.device | str) -> Tensor:
    """int32 cumulative lengths of the documents of all rows, one after another, where rows have no past.

    A document begins where a query's first key is its own; a query at padding that sees itself alone is a document of one token.

    Raises:
        ValueError: intervals that are not those of documents.
    """
    within = Visible(None, visible.right, visible.first, visible.stop)
    first, stop = (t.expand(B, L) for t in within.intervals(L, L, device))
    here = torch.arange(L, device=device)
    begins = first == here
    latest = torch.where(begins, here, -1).cummax(1).values
    ends = torch.cat([begins[:, 1:], begins.new_ones(B, 1)], 1)
    last = torch.where(ends, here + 1, L).flip(1).cummin(1).values.flip(1)
    if visible.right is not None:
        last = torch.minimum(last, here + visible.right + 1)
    if not (torch.equal(first, latest) and torch.equal(stop, last)):
        raise ValueError("attention: backend 'varlen' takes documents in a row, and these intervals are others")
    bounds = begins.flatten().nonzero().flatten()
    return torch.cat([bounds, bounds.new_full((1,), B * L)]).to(torch.int32)


def _varlen(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    (B, H, L, _), S = q.shape, k.shape[2]
    window = (-1 if visible.left is None else visible.left, -1 if visible.right is None else visible.right)
    queries, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    if visible.ragged:
        over_q = over_k = document_bounds(visible, L, B, q.device)
        longest_q = longest_k = int(over_q.diff().amax())
    else:
        over_q, over_k = (torch.arange(0, B * n + 1, n, dtype=torch.int32, device=q.device) for n in (L, S))
        longest_q, longest_k = L, S
    grouped = k.shape[1] != H
    y: Any = varlen_attn(
        queries, keys, values, over_q, over_k, longest_q, longest_k, window_size=window, enable_gqa=grouped
    )
    return y.unflatten(0, (B, L)).transpose(1, 2)


# xformers


def xformers_bias(bias: Any, visible: Visible, L: int, S: int) -> Any:
    """What is seen as a bias class of ``fmha.attn_bias``, all of whose masks used here are aligned bottom right.

    Args:
        bias: the module ``attn_bias``.
    """
    kind = visible.kind(L, S)
    if kind == "full":
        return None
    if kind == "causal":
        return bias.LowerTriangularMask()
    if kind == "past":
        return bias.LowerTriangularFromBottomRightMask()
    left = S if visible.left is None else visible.left
    right = S if visible.right is None else visible.right
    if visible.right == 0:
        # There a window counts the query's own key.
        return bias.LowerTriangularFromBottomRightLocalAttentionMask(left + 1)
    return bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)


@lru_cache(maxsize=1)
def _fmha() -> tuple[Any, Any]:
    """``(fmha, attn_bias)``: xformers becomes a shell around mslk, so that is tried first."""
    failures = []
    for name in ("mslk.attention.fmha", "xformers.ops.fmha"):
        try:
            return importlib.import_module(name), importlib.import_module(f"{name}.attn_bias")
        except (ImportError, OSError) as error:
            failures.append(f"{name}: {error}")
    raise ImportError("attention: backend 'xformers' cannot be imported: " + "; ".join(failures))


def _xformers(q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: float) -> Tensor:
    fmha, bias = _fmha()
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
    seen = xformers_bias(bias, visible, q.shape[2], k.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return fmha.memory_efficient_attention(q, k, v, attn_bias=seen, p=dropout).transpose(1, 2)


def _xformers_there() -> tuple[bool, str]:
    return cuda_package(("mslk", "xformers"), "xformers")


def flex_there() -> tuple[bool, str]:
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return False, "needs triton, not installed"
    return True, "part of torch"


def _cuda_there() -> tuple[bool, str]:
    there = torch.cuda.is_available()
    return there, "part of torch" if there else "torch sees no CUDA device"


ATTENTION.register(Backend("sdpa", _sdpa, masks=KINDS, dropout=True, note="default for full and causal attention"))
ATTENTION.register(
    Backend(
        "tiled",
        _tiled,
        masks=KINDS,
        dropout=True,
        note="default on a CPU for windows, padding, documents and a past, and for terms in the scores",
        terms=TERMS,
    )
)
ATTENTION.register(
    Backend(
        "dense",
        _dense,
        masks=KINDS,
        dropout=True,
        automatic=False,
        note="default for terms in the scores of short sequences, and under a compiler",
        terms=TERMS,
    )
)
ATTENTION.register(
    Backend(
        "blocks",
        _blocks,
        masks=frozenset({"window", "ragged window"}),
        dropout=True,
        note="default on a GPU for windows",
    )
)
ATTENTION.register(
    Backend(
        "flex",
        _flex,
        devices=frozenset({"cuda", "cpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        masks=KINDS,
        backward=CUDA,
        available=flex_there,
        automatic=False,
        note="compiled on first use; default on CUDA for many documents or much padding",
    )
)
ATTENTION.register(
    Backend(
        "varlen",
        _varlen,
        CUDA,
        HALVES,
        KINDS - {"ragged past", "ragged window"},
        available=_cuda_there,
        automatic=False,
        note="documents without a past",
    )
)
ATTENTION.register(
    Backend(
        "xformers",
        _xformers,
        CUDA,
        frozenset({torch.float32, torch.bfloat16, torch.float16}),
        frozenset({"full", "causal", "past", "window"}),
        dropout=True,
        available=_xformers_there,
        automatic=False,
        note="extra: xformers",
    )
)
