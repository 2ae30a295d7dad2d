"""The backends of the short convolution, and which of them ``auto`` takes.

| name | what | where |
|---|---|---|
| `portable` | :mod:`mmlong.ops.short_conv` itself | all |
| `causal_conv1d` | ``causal_conv1d_fn`` of ``causal-conv1d``, one kernel for taps, bias and SiLU | CUDA, 2 to 4 taps, channels a multiple of 8 |

On CUDA ``auto`` takes the second where it can: like the first it sums in float32 and rounds once. Its kernels want channels last with strides that are multiples of 8 elements; what is laid out
otherwise is copied. The tail is made here and not by the kernel, whose gradient of it is wrong for pieces shorter than the taps; those pieces stay portable. So do rows of several documents:
the kernel reads beyond the end of ``seq_idx`` (its issue 67), and releases until 1.7 take none together with a tail.

Nothing here has been run on a GPU: calls are held against a stand-in with the package's signature and checks. ``python -m mmlong.experiments.gpu_check`` proves them where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.ops.backends import CUDA, HALVES, Backend, Backends, Request, cuda_package, load, span

SHORT_CONV = Backends("short_conv")

ALIGNED = 8
"""Elements that the kernel reads at a time."""


def choose_short_conv(x: Tensor, weight: Tensor, resets: bool, backend: str) -> Backend:
    """The backend for a piece; arguments as :func:`mmlong.ops.short_conv.short_conv`."""
    sizes = {"length": x.shape[1], "channels": x.shape[2], "taps": weight.shape[1], "span": span(x)}
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    request = Request(x.device.type, x.dtype, "resets" if resets else "", backward=grad, sizes=sizes)
    return SHORT_CONV.choose(request, backend, preferred(request))


def preferred(request: Request) -> tuple[str, ...]:
    """What ``auto`` tries first."""
    return ("causal_conv1d", "portable") if request.device == "cuda" else ("portable",)


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    package = load("causal_conv1d", "causal-conv1d", "short_conv", "causal_conv1d")
    K = weight.shape[1]
    if not _aligned(x):
        # Not `contiguous`, which leaves the stride of an axis of length 1 as it is.
        x = x.clone(memory_format=torch.contiguous_format)
    # Inputs of the past, in the type that they had.
    before = None if tail is None else tail.to(x.dtype).contiguous().transpose(1, 2)
    y = package.causal_conv1d_fn(
        x.transpose(1, 2),
        weight,
        None if bias is None else bias.to(weight.dtype),
        initial_states=before,
        activation=activation,
    ).transpose(1, 2)
    if y.requires_grad:
        # The backward refuses a gradient whose rows are apart by no multiple of 8.
        y.register_hook(lambda dy: dy if _aligned(dy) else dy.clone(memory_format=torch.contiguous_format))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return y, x[:, x.shape[1] - (K - 1) :].to(dtype, copy=True)


def _aligned(x: Tensor) -> bool:
    """Channels last as the kernel wants them, ``x (B, L, D)``."""
    row, token, channel = x.stride()
    return channel == 1 and token > 1 and row % ALIGNED == token % ALIGNED == 0 and x.data_ptr() % 16 == 0


def _fits(request: Request) -> str | None:
    s = request.sizes
    if not 2 <= s["taps"] <= 4:
        return f"has 2 to 4 taps, not {s['taps']}"
    if s["channels"] % ALIGNED:
        return f"takes channels by {ALIGNED}, not {s['channels']}"
    if s["length"] < s["taps"]:
        return f"takes pieces at least as long as the {s['taps']} taps, not {s['length']} tokens"
    if s["span"] >= 1 << 31:
        return "counts elements in 32 bits, and here there are 2^31 or more: train in segments, or smaller batches"
    return None


SHORT_CONV.register(
    Backend(
        "causal_conv1d",
        _causal_conv1d,
        CUDA,
        frozenset({torch.float32, *HALVES}),
        fits=_fits,
        available=lambda: cuda_package(("causal_conv1d",), "causal-conv1d"),
        note="default on a GPU; extra: causal-conv1d",
    )
)
