"""Feed-forward networks of a block: what happens to each token by itself.

SwiGLU (Shazeer 2020, arXiv 2002.05202): ``W_out (silu(a) * b)`` with ``a, b = W_in x``. It is run by :func:`mmlong.ops.swiglu.swiglu`, which never
holds the hidden activations of the whole sequence. ``glu`` is the same paper's with any activation for silu, plainly run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmlong.ops.activations import activation
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

    def __init__(self, dim: int, ratio: float, bias: bool = True) -> None:
        super().__init__()
        hidden = max(8, -(-round(dim * ratio) // 8) * 8)
        self.w_in = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w_out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        return swiglu(x, self.w_in.weight, self.w_in.bias, self.w_out.weight, self.w_out.bias)


@FFNS.register("glu")
class GLU(nn.Module):
    """``W_out (activation(a) * b)`` with ``a, b = W_in x``; hidden width ``dim * ratio`` as it is."""

    def __init__(self, dim: int, ratio: float, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        hidden = max(1, round(dim * ratio))
        self.activation = Activation(activation)
        self.w_in = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w_out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        a, b = self.w_in(x).chunk(2, dim=-1)
        y: Tensor = self.w_out(self.activation(a) * b)
        return y


@FFNS.register("mlp")
class Mlp(nn.Sequential):
    """The Transformer's two layers, with GELU unless another activation is named (:mod:`mmlong.ops.activations`)."""

    def __init__(self, dim: int, ratio: float, activation: str = "gelu") -> None:
        hidden = max(8, round(dim * ratio))
        super().__init__(nn.Linear(dim, hidden), Activation(activation), nn.Linear(hidden, dim))


class Activation(nn.Module):
    """An activation by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.function = name, activation(name)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name
