"""A block: mixer and feed-forward, each on a residual branch, with the mixer's own signature.

``x = x + mixer(norm(x))`` then ``x = x + ffn(norm(x))`` (pre-norm Transformer, Xiong et al. 2020), each branch optionally scaled per
channel (LayerScale, Touvron et al. 2021) and dropped per sample in training (stochastic depth, Huang et al. 2016). With ``norm_after`` it is the first
Transformer's and BERT's: ``x = norm(x + mixer(x))``, ``x = norm(x + ffn(x))``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from mmlong.backbone import product_key_memory  # noqa: F401  (registers a feed-forward)
from mmlong.backbone.colt5 import CoLT5
from mmlong.backbone.experts import Experts
from mmlong.backbone.feedforward import create_ffn
from mmlong.backbone.norms import create_norm, normed
from mmlong.layout import Layout
from mmlong.mixers import Mixer, State


class Block(nn.Module):
    """Mixer and feed-forward on residual branches.

    Args:
        mixer: a :class:`Mixer` or anything with its signature, ``causal`` and ``streaming``.
        dim: width D.
        ffn: feed-forward by name (``swiglu``, ``mlp``, ``switch``, ``st_moe``, ``product_key_memory``, ``colt5``, ``none``), or ``{"name": ..., **options}``.
        ffn_ratio: hidden width of the feed-forward over D.
        dropout: after each branch.
        drop_path: chance that a sample skips a branch in training.
        layer_scale: initial scale of each branch, or ``None`` for no scaling.
        norm_eps: of the norms.
        norm: ``layer``, ``rms``, ``rms_offset``, ``group`` or ``batch`` (:mod:`mmlong.backbone.norms`).
        norm_after: norm what a branch was added to, and not what a branch reads.
    """

    def __init__(
        self,
        mixer: Mixer | nn.Module,
        dim: int,
        ffn: str | Mapping[str, Any] = "swiglu",
        ffn_ratio: float = 8 / 3,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        norm: str = "layer",
        norm_after: bool = False,
    ) -> None:
        super().__init__()
        self.norm_after = norm_after
        self.norm1 = create_norm(norm, dim, norm_eps)
        self.mixer: Any = mixer
        self.ffn = create_ffn(ffn, dim, ffn_ratio)
        self.norm2 = create_norm(norm, dim, norm_eps) if self.ffn is not None else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None or self.ffn is None else LayerScale(dim, layer_scale)
        one_sided = not isinstance(self.ffn, CoLT5)
        self.causal = bool(mixer.causal) and one_sided
        self.streaming = bool(mixer.streaming) and one_sided

    def mix(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """The mixer's branch: what is added to ``x``, and the state."""
        y, state = self.mixer(x if self.norm_after else normed(self.norm1, x, layout), state, layout)
        return self.drop_path(self.dropout(self.scale1(y))), state

    def absorb(self, x: Tensor, state: State = None, layout: Layout | None = None) -> State:
        """The state alone of :meth:`forward` (:mod:`mmlong.backbone.prefill`)."""
        x = x if self.norm_after else normed(self.norm1, x, layout)
        return self.mixer.absorb(x, state, layout) if hasattr(self.mixer, "absorb") else self.mixer(x, state, layout)[1]

    def feed(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """The feed-forward's branch, of a block that has one."""
        assert self.ffn is not None
        assert self.norm2 is not None
        read = x if self.norm_after else normed(self.norm2, x, layout)
        if isinstance(self.ffn, Experts):
            fed = self.ffn(read, None if layout is None else layout.valid(x.shape[1]))
        elif isinstance(self.ffn, CoLT5):
            fed = self.ffn(read, layout)
        else:
            fed = self.ffn(read)
        return self.drop_path(self.dropout(self.scale2(fed)))

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)`` and the mixer's state."""
        y, state = self.mix(x, state, layout)
        x = normed(self.norm1, x + y, layout) if self.norm_after else x + y
        if self.ffn is not None:
            assert self.norm2 is not None
            y = self.feed(x, layout)
            x = normed(self.norm2, x + y, layout) if self.norm_after else x + y
        return x, state


class Merge(nn.Module):
    """Several tokens become one wider token: concatenated, normed, projected (patch merging, Liu et al. 2021).

    Which: ``k`` neighbours in the sequence, or, given as ``HxW``, a patch of the grid in whatever scan order, which is what Swin's are with ``2x2``. On a grid in Morton order ``4`` and ``2x2`` are the same. Of neighbours, positions past a
    row's length count as zeros, and a short last group is filled with zeros; patches are of whole grids.

    Args:
        size: ``k``, or the sides of a patch, e.g. ``2x2``.
        dim_in, dim_out: width of the tokens before and after.
        norm_eps: of the norm.
        norm: of the concatenated tokens (:mod:`mmlong.backbone.norms`).

    Raises:
        ValueError: a size that is neither. When called: patches of what is no grid that they fill.

    Attributes:
        k: tokens that become one.
        sides: of a patch; ``None`` for neighbours.
    """

    def __init__(self, size: int | str, dim_in: int, dim_out: int, norm_eps: float = 1e-5, norm: str = "layer") -> None:
        super().__init__()
        written = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", str(size))
        if written is None:
            raise ValueError(
                f"backbone.pool: {size!r} is neither a number of neighbours nor the sides of a patch, as 2x2"
            )
        sides = tuple(int(n) for n in str(size).split("x"))
        self.sides = sides if len(sides) > 1 else None
        k = math.prod(sides)
        self.k = k
        self.norm = create_norm(norm, k * dim_in, norm_eps)
        self.project = nn.Linear(k * dim_in, dim_out)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, dim_in)`` to ``(B, ceil(L / k), dim_out)``."""
        if self.sides is not None:
            index, coarse = (layout or Layout()).patches(self.sides)
            return self.project(normed(self.norm, x[:, index.to(x.device)].flatten(2), coarse))
        valid = None if layout is None else layout.valid(x.shape[1])
        if valid is not None:
            x = torch.where(valid[..., None], x, 0)
        groups = (x.shape[1] + self.k - 1) // self.k
        if torch.compiler.is_exporting() and not isinstance(groups, int):
            # How much is missing of an unknown length is no number of zeros that a program can hold: more than enough, cut off.
            x = nn.functional.pad(x, (0, 0, 0, self.k))[:, : groups * self.k]
        elif short := -x.shape[1] % self.k:
            x = nn.functional.pad(x, (0, 0, 0, short))
        x, length = x.reshape(x.shape[0], groups, self.k * x.shape[2]), x.shape[1]
        return self.project(normed(self.norm, x, self.layout_out(layout, length)))

    def layout_out(self, layout: Layout | None, length: int) -> Layout | None:
        """The layout of what comes out, of ``length`` tokens under ``layout``."""
        if self.sides is not None:
            return (layout or Layout()).patches(self.sides)[1]
        return None if layout is None else layout.pool(self.k, length)
