"""Root-mean-square norm of each head, then a gate: how gated linear attentions leave their heads.

Definition, for every token and head of ``P`` channels (RetNet's and GLA's output, arXiv 2312.06635; Gated DeltaNet, arXiv 2412.06464, with SiLU; Kimi delta attention, arXiv
2510.26692, with a sigmoid):

    out = weight * y / sqrt(mean(y^2) + eps) * gate(z)

Mamba-2 gates first and then normalises: that is :mod:`mmlong.ops.gated_norm`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gate = Literal["silu", "sigmoid"]


def norm_then_gate(y: Tensor, z: Tensor | None, weight: Tensor, gate: Gate = "silu", eps: float = 1e-5) -> Tensor:
    """Norm, then gate.

    Args:
        y: heads ``(..., H, P)``.
        z: gates before their activation ``(..., H P)`` or ``(..., H, P)``, or ``None`` for no gate.
        weight: ``(P,)``, shared by the heads, or ``(H, P)``.
        gate: the activation.
        eps: added to the mean square.

    Returns:
        ``(..., H P)`` in the type of ``y``, computed in at least float32.

    Raises:
        ValueError: an unknown gate.
    """
    if gate not in ("silu", "sigmoid"):
        raise ValueError(f"norm_then_gate: unknown gate {gate!r}; use 'silu' or 'sigmoid'")
    dtype = torch.promote_types(y.dtype, torch.float32)
    wide = y.to(dtype)
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    if z is not None:
        open_ = z.to(dtype).reshape(y.shape)
        out = out * (F.silu(open_) if gate == "silu" else torch.sigmoid(open_))
    return out.flatten(-2).to(y.dtype)
