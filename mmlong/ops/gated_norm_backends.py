"""The backends of the gated norm, and which of them ``auto`` takes.

| name | what | where |
|---|---|---|
| `portable` | :mod:`mmlong.ops.gated_norm` itself; on a GPU the definition, in float32 | all |
| `mamba_ssm` | ``rmsnorm_fn`` of ``mamba-ssm``, one kernel for gate and norm, which keeps no more than its input | CUDA |

On CUDA ``auto`` takes the second where it can; both compute in float32 and round once.

Nothing here has been run on a GPU: calls are held against a stand-in with the package's signature. ``python -m mmlong.experiments.gpu_check`` proves them where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.ops.backends import CUDA, HALVES, Backend, Backends, Request, cuda_package, load, span

GATED_NORM = Backends("gated_norm")

FUSED_BYTES = 1 << 16
"""Bytes of a group that the kernel normalises in one pass."""


def choose_gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, backend: str) -> Backend:
    """The backend for these; arguments as :func:`mmlong.ops.gated_norm.gated_rms_norm`."""
    sizes = {"bytes": y.shape[-1] // groups * y.element_size(), "span": span(y, z)}
    grad = torch.is_grad_enabled() and (y.requires_grad or z.requires_grad or weight.requires_grad)
    request = Request(y.device.type, y.dtype, backward=grad, sizes=sizes)
    return GATED_NORM.choose(request, backend, preferred(request))


def preferred(request: Request) -> tuple[str, ...]:
    """What ``auto`` tries first."""
    return ("mamba_ssm", "portable") if request.device == "cuda" else ("portable",)


def _mamba_ssm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    package = load("mamba_ssm.ops.triton.layernorm_gated", "mamba-ssm", "gated_norm", "mamba_ssm")
    size = y.shape[-1] // groups
    return package.rmsnorm_fn(y, weight, None, z=z, eps=eps, group_size=size, norm_before_gate=False)


def _fits(request: Request) -> str | None:
    s = request.sizes
    if s["bytes"] > FUSED_BYTES:
        return f"takes groups of {FUSED_BYTES:,} bytes at most, not {s['bytes']:,}"
    if s["span"] >= 1 << 31:
        return "counts elements in 32 bits, and here there are 2^31 or more: train in segments, or smaller batches"
    return None


GATED_NORM.register(
    Backend(
        "mamba_ssm",
        _mamba_ssm,
        CUDA,
        frozenset({torch.float32, *HALVES}),
        fits=_fits,
        available=lambda: cuda_package(("mamba_ssm",), "mamba-ssm"),
        note="default on a GPU; extra: mamba-ssm",
    )
)
