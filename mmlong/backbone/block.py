"""A block: pre-norm mixer and feed-forward, each on a residual branch, with the mixer's own signature.

``x = x + mixer(norm(x))`` then ``x = x + ffn(norm(x))`` (pre-norm Transformer, Xiong et al. 2020), each branch optionally scaled per
channel (LayerScale, Touvron et al. 2021) and dropped per sample in training (stochastic depth, Huang et al. 2016).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from mmlong.backbone.feedforward import create_ffn
from mmlong.layout import Layout
from mmlong.mixers import Mixer, State


class Block(nn.Module):
    """Mixer and feed-forward on residual branches.

    Args:
        mixer: a :class:`Mixer` or anything with its signature, ``causal`` and ``streaming``.
        dim: width D.
        ffn: feed-forward by name (``swiglu``, ``mlp``, ``none``).
        ffn_ratio: hidden width of the feed-forward over D.
        dropout: after each branch.
        drop_path: chance that a sample skips a branch in training.
        layer_scale: initial scale of each branch, or ``None`` for no scaling.
        norm_eps: of the layer norms.
    """

    def __init__(
        self,
        mixer: Mixer | nn.Module,
        dim: int,
        ffn: str = "swiglu",
        ffn_ratio: float = 8 / 3,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.mixer: Any = mixer
        self.ffn = create_ffn(ffn, dim, ffn_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps) if self.ffn is not None else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None or self.ffn is None else LayerScale(dim, layer_scale)

    @property
    def causal(self) -> bool:
        return bool(self.mixer.causal)

    @property
    def streaming(self) -> bool:
        return bool(self.mixer.streaming)

    def mix(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """The mixer's branch: what is added to ``x``, and the state."""
        y, state = self.mixer(self.norm1(x), state, layout)
        return self.drop_path(self.dropout(self.scale1(y))), state

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward's branch, of a block that has one."""
        assert self.ffn is not None
        assert self.norm2 is not None
        return self.drop_path(self.dropout(self.scale2(self.ffn(self.norm2(x)))))

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)`` and the mixer's state."""
        y, state = self.mix(x, state, layout)
        x = x + y
        if self.ffn is not None:
            x = x + self.feed(x)
        return x, state


class Merge(nn.Module):
    """``k`` neighbouring tokens become one wider token: concatenated, normed, projected (patch merging, Liu et al. 2021).

    On a grid in Morton order and ``k = 4`` a group is a 2x2 block. Positions past a row's length count as zeros, and a short last group is
    filled with zeros.
    """

    def __init__(self, k: int, dim_in: int, dim_out: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.k = k
        self.norm = nn.LayerNorm(k * dim_in, eps=norm_eps)
        self.project = nn.Linear(k * dim_in, dim_out)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, dim_in)`` to ``(B, ceil(L / k), dim_out)``."""
        valid = None if layout is None else layout.valid(x.shape[1])
        if valid is not None:
            x = torch.where(valid[..., None], x, 0)
        groups = (x.shape[1] + self.k - 1) // self.k
        if torch.compiler.is_exporting() and not isinstance(groups, int):
            # How much is missing of an unknown length is no number of zeros that a program can hold: more than enough, cut off.
            x = nn.functional.pad(x, (0, 0, 0, self.k))[:, : groups * self.k]
        elif short := -x.shape[1] % self.k:
            x = nn.functional.pad(x, (0, 0, 0, short))
        x = x.reshape(x.shape[0], groups, self.k * x.shape[2])
        return self.project(self.norm(x))
