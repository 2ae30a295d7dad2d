"""Feed-forward networks of a block: what happens to each token by itself.

SwiGLU (Shazeer 2020, arXiv 2002.05202): ``W_out (silu(a) * b)`` with ``a, b = W_in x``. It is run by :func:`mmlong.ops.swiglu.swiglu`, which never
holds the hidden activations of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmlong.ops.swiglu import swiglu
from mmlong.registry import Registry

FFNS: Registry[type[nn.Module]] = Registry("feed-forward")


def create_ffn(spec: str | Mapping[str, Any], dim: int, ratio: float) -> nn.Module | None:
    """A feed-forward for width ``dim`` and hidden width ``ratio * dim``, by name or ``{name: ..., option: ...}``; ``none`` gives ``None``."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name")
    return None if name == "none" else FFNS.create(name, dim, ratio, **options)


@FFNS.register("swiglu")
class SwiGLU(nn.Module):
    """Gated feed-forward with one fused input projection; hidden width rounded up to a multiple of 8."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = max(8, -(-round(dim * ratio) // 8) * 8)
        self.w_in = nn.Linear(dim, 2 * hidden)
        self.w_out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        return swiglu(x, self.w_in.weight, self.w_in.bias, self.w_out.weight, self.w_out.bias)


@FFNS.register("mlp")
class Mlp(nn.Sequential):
    """The Transformer's two layers with GELU."""

    def __init__(self, dim: int, ratio: float) -> None:
        hidden = max(8, round(dim * ratio))
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
