"""The backends of linear attention with a scalar decay, and which of them ``auto`` takes.

| name | what | where |
|---|---|---|
| `portable` | :mod:`mmlong.ops.linear_attention` itself | all |
| `mamba_ssm` | ``mamba_chunk_scan_combined`` of ``mamba-ssm``: Mamba-2's own Triton kernels | CUDA, where the decay is a rate a head times the input scale |
| `fla` | ``chunk_simple_gla`` of ``fla-core`` | CUDA |

On a CPU, and while something is being compiled, there is only the first. On CUDA ``auto`` takes the others, in that order, where the arguments are in half precision: on float32 their
products are TF32, so there they are taken by name, or where :func:`torch.get_float32_matmul_precision` says that this is wanted.

Arguments are translated, never approximated. ``mamba_ssm`` is parametrised by a time step and a rate, ``g = rate dt, exp(i) = dt``; a decay of another form it cannot express. ``fla`` has no
input scale, which is multiplied into the values here, and shares no keys, which are repeated. Documents in a row are ``seq_idx`` to the one (the state that comes in belongs to index 0) and
``cu_seqlens`` to the other (a state for each document, all zero but the ones that go on). Padding is dealt with before: there nothing decays and nothing is written.

Nothing here has been run on a GPU: calls are held against stand-ins with the packages' signatures. ``python -m mmlong.experiments.gpu_check`` proves them where there is one.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from mmlong.ops.backends import CUDA, HALVES, Backend, Backends, Request, cuda_package, load

LINEAR_ATTENTION = Backends("linear_attention")

MAMBA_CHUNK = 256
"""Tokens a chunk in mamba-ssm's own layers."""

INT32 = 1 << 31
"""mamba-ssm's kernels count elements in 32 bits and wrap round without a word beyond (state-spaces/mamba issue 1015)."""

GRID = 65535
"""Most blocks along a CUDA grid's second axis."""

TAKEN = frozenset({torch.float32, *HALVES})


class Recurrence(NamedTuple):
    """What is asked of a backend: the arguments of :func:`mmlong.ops.linear_attention.scalar_decay_attention`, checked, masked and typed.

    Attributes:
        q, k: ``(B, L, G, N)``.
        v: ``(B, L, H, P)``; padding is zero in it and in ``k``.
        g: ``(B, L, H)`` in at least float32, as everything below; 0 at padding.
        log_input: ``(B, L, H)`` or ``None``; ``-inf`` at padding.
        skip: ``(H,)`` or ``None``.
        state: ``(B, H, P, N)``.
        documents: int64 ``(B, L)``, the number of resets at or before each token, or ``None``; 0 is the document of ``state``.
        rate: ``(H,)`` where ``g = rate exp(log_input)``, or ``None``.
        chunk: tokens a chunk of the portable form.
        keep: for the portable form.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    log_input: Tensor | None
    skip: Tensor | None
    state: Tensor
    documents: Tensor | None
    rate: Tensor | None
    chunk: int
    keep: bool


def preferred(request: Request) -> tuple[str, ...]:
    """What ``auto`` tries first."""
    exact = request.dtype not in HALVES and torch.get_float32_matmul_precision() == "highest"
    return ("portable",) if request.device != "cuda" or exact else ("mamba_ssm", "fla", "portable")


# mamba-ssm


def _mamba_ssm(r: Recurrence) -> tuple[Tensor, Tensor]:
    package = load("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm", "linear_attention", "mamba_ssm")
    assert r.log_input is not None
    q, k = r.q.to(r.v.dtype), r.k.to(r.v.dtype)
    with torch.autocast(r.v.device.type, enabled=False):
        return package.mamba_chunk_scan_combined(
            r.v,
            r.log_input.exp(),
            r.rate,
            k,
            q,
            MAMBA_CHUNK,
            D=r.skip,
            initial_states=r.state,
            seq_idx=None if r.documents is None else r.documents.to(torch.int32).contiguous(),
            return_final_states=True,
        )


def _mamba_ssm_fits(request: Request) -> str | None:
    s = request.sizes
    if not s["rated"]:
        return "takes decays that are a rate a head times the input scale, and this one is not known to be (give rate)"
    chunks = s["batch"] * -(-s["length"] // MAMBA_CHUNK)
    if chunks > GRID:
        return f"runs {GRID:,} chunks of {MAMBA_CHUNK} tokens at most, not {chunks:,}: train in segments, or smaller batches"
    made = chunks * max(s["heads"] * max(s["values"] * s["keys"], MAMBA_CHUNK), s["groups"] * MAMBA_CHUNK**2)
    if max(s["span"], made) >= INT32:
        return "counts elements in 32 bits, and here there are 2^31 or more: train in segments, or smaller batches"
    return None


# fla


def document_starts(documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The documents of all rows, one after another.

    Args:
        documents: int64 ``(B, L)``, the number of resets at or before each token.

    Returns:
        int64 cumulative lengths ``(n + 1,)`` over ``B L`` tokens, and of each row the first document and the last, ``(B,)``.
    """
    B, L = documents.shape
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    bounds = begins.flatten().nonzero().flatten()
    count = begins.sum(1).cumsum(0)
    first = torch.cat([count.new_zeros(1), count[:-1]])
    return torch.cat([bounds, bounds.new_full((1,), B * L)]), first, count - 1


def _fla(r: Recurrence) -> tuple[Tensor, Tensor]:
    package = load("fla.ops.simple_gla", "fla-core", "linear_attention", "fla")
    H, G, dtype = r.v.shape[2], r.k.shape[2], r.state.dtype
    q, k, v, g = r.q.to(r.v.dtype), r.k.to(r.v.dtype), r.v, r.g
    if H > G:
        q, k = (t.repeat_interleave(H // G, 2) for t in (q, k))
    if r.log_input is not None:
        v = (v.to(dtype) * r.log_input.exp()[..., None]).to(v.dtype)
    state, bounds, last = r.state.mT, None, None
    if r.documents is not None:
        bounds, first, last = document_starts(r.documents)
        going_on = torch.where((r.documents[:, 0] == 0)[:, None, None, None], state, 0)
        state = state.new_zeros(bounds.shape[0] - 1, *state.shape[1:]).index_copy(0, first, going_on)
        q, k, v, g = (t.flatten(0, 1)[None] for t in (q, k, v, g))
    with torch.autocast(r.v.device.type, enabled=False):
        y, after = package.chunk_simple_gla(
            q, k, v, g, scale=1.0, initial_state=state.contiguous(), output_final_state=True, cu_seqlens=bounds
        )
    if last is not None:
        y, after = y.view(r.v.shape), after.index_select(0, last)
    if r.skip is not None:
        y = torch.addcmul(y.to(dtype), r.v.to(dtype), r.skip[:, None])
    return y.to(r.v.dtype), after.mT.to(dtype).contiguous()


def _fla_fits(request: Request) -> str | None:
    s = request.sizes
    if request.dtype in HALVES and request.backward and (s["keys"] % 2 or s["values"] % 2):
        return f"has a gradient in half precision for even head widths only, not keys of {s['keys']} and values of {s['values']}"
    rows = (1 if request.mask else s["batch"]) * s["heads"]
    if rows > GRID:
        return f"runs {GRID:,} rows of heads at most, not {rows:,}: use smaller batches"
    return _hopper() if request.backward else None


def _hopper() -> str | None:
    """What fla itself refuses in the backward: a Triton whose code for Hopper GPUs is wrong (fla issue 640)."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("tilelang") is not None:
        return None
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    if (3, 4, 0) <= version < (3, 7, 1):
        return f"has wrong gradients on Hopper GPUs with Triton {triton.__version__}: needs 3.7.1 or tilelang"
    return None


LINEAR_ATTENTION.register(
    Backend(
        "mamba_ssm",
        _mamba_ssm,
        CUDA,
        TAKEN,
        frozenset({"resets"}),
        fits=_mamba_ssm_fits,
        available=lambda: cuda_package(("mamba_ssm",), "mamba-ssm"),
        note="first choice on a GPU in half precision for mamba2; extra: mamba-ssm",
    )
)
LINEAR_ATTENTION.register(
    Backend(
        "fla",
        _fla,
        CUDA,
        TAKEN,
        frozenset({"resets"}),
        fits=_fla_fits,
        available=lambda: cuda_package(("fla",), "gpu"),
        note="on a GPU in half precision; extra: gpu",
    )
)
