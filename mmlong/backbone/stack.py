"""The backbone: stages of blocks, with pooling between stages; one stage is a plain stack.

It has the mixer's signature, ``y, state = backbone(x, state, layout)``, and knows neither modalities nor files. With one causal stage it streams.
With several, each stage works on ``pool`` times fewer, wider tokens (as image pyramids do, Liu et al. 2021); a pooled token has seen its whole group, so
such a backbone is not causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmlong.backbone.block import Block, Merge
from mmlong.backbone.directions import Direction, create_directed
from mmlong.backbone.reverse_complement import join_strands, split_strands
from mmlong.backbone.reversible import ReversibleBlock, reversible_stack
from mmlong.layout import Layout
from mmlong.mixers import State


@dataclass
class BackboneConfig:
    """What a backbone is made of.

    Attributes:
        dim: width; or one a stage.
        depth: blocks; or one number a stage.
        pool: how many neighbours become one token between stages (one less than there are stages); empty for a plain stack.
        mixers: mixer names, or ``{name: ..., option: ...}``, repeated over depth; or one such list a stage.
        direction: ``causal``, ``alternate`` or ``both``; see :mod:`mmlong.backbone.directions`.
        ffn: feed-forward: ``swiglu``, ``mlp`` or ``none``.
        ffn_ratio: its hidden width over ``dim``; or one a stage.
        dropout: after each residual branch.
        drop_path: chance of skipping a branch at the last block, rising linearly with depth.
        layer_scale: initial scale of each branch, or null for none.
        checkpoint: recompute each block's activations in the backward instead of keeping them.
        reversible: two streams through the blocks, whose activations are recomputed from what comes out, at any depth those of one block; another function than the plain stack's. See
            :mod:`mmlong.backbone.reversible`.
        reverse_complement: equivariant to the reverse complement of DNA: half of ``dim`` for each strand, with shared weights; see
            :mod:`mmlong.backbone.reverse_complement`.
    """

    dim: int | list[int] = 128
    depth: int | list[int] = 4
    pool: list[int] = field(default_factory=list)
    mixers: list[Any] = field(default_factory=lambda: ["mamba2"])
    direction: Direction = "causal"
    ffn: str = "swiglu"
    ffn_ratio: float | list[float] = 8 / 3
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    checkpoint: bool = False
    reversible: bool = False
    reverse_complement: bool = False


def _per_stage(name: str, value: Any, stages: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * stages
    if len(values) != stages:
        raise ValueError(
            f"backbone.{name} has {len(values)} entries for {stages} stages (pool has {stages - 1}): {values}"
        )
    return values


class Backbone(nn.Module):
    """Stages of blocks with the mixer's signature.

    Args:
        config: see :class:`BackboneConfig`.

    Attributes:
        dim_in: width of the tokens that come in.
        num_features: width of the features that go out.
        stride: input tokens per output token.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        stages = len(config.pool) + 1
        dims = _per_stage("dim", config.dim, stages)
        depths = _per_stage("depth", config.depth, stages)
        ratios = _per_stage("ffn_ratio", config.ffn_ratio, stages)
        if not config.mixers:
            raise ValueError("backbone.mixers is empty: name at least one mixer")
        nested = isinstance(config.mixers[0], list)
        mixers = _per_stage("mixers", config.mixers, stages) if nested else [config.mixers] * stages
        if stages > 1 and config.direction == "causal":
            raise ValueError("a pooled token has seen its whole group: use direction alternate or both with pool")
        if config.reversible and config.checkpoint:
            raise ValueError(
                "backbone.reversible keeps no activations that backbone.checkpoint could spare: set one of them"
            )
        self.config = config
        self.dim_in, self.num_features = dims[0], dims[-1]
        if config.reverse_complement:
            if config.direction == "causal":
                raise ValueError(
                    "the other strand is read from the end: use direction alternate or both with reverse_complement"
                )
            if odd := [dim for dim in dims if dim % 2]:
                raise ValueError(
                    f"each strand takes half of backbone.dim, which must be even with reverse_complement; got {odd[0]}"
                )
            dims = [dim // 2 for dim in dims]
        make = ReversibleBlock if config.reversible else Block
        self.stride = 1
        total, index = sum(depths), 0
        self.stages = nn.ModuleList()
        self.merges = nn.ModuleList()
        for s in range(stages):
            blocks = nn.ModuleList()
            for i in range(depths[s]):
                mixer = create_directed(mixers[s][i % len(mixers[s])], dims[s], config.direction, index)
                drop_path = config.drop_path * index / max(total - 1, 1)
                blocks.append(
                    make(mixer, dims[s], config.ffn, ratios[s], config.dropout, drop_path, config.layer_scale)
                )
                index += 1
            self.stages.append(blocks)
            if s + 1 < stages:
                self.merges.append(Merge(config.pool[s], dims[s], dims[s + 1]))
                self.stride *= config.pool[s]
        self.norm = nn.LayerNorm(dims[-1])
        self.grad_checkpointing = config.checkpoint
        self._init_residuals(total)

    def _init_residuals(self, depth: int) -> None:
        # GPT-2's rule: what is added to the residual stream starts smaller the more blocks add to it.
        for block in self.blocks():
            if block.ffn is not None and isinstance(getattr(block.ffn, "w_out", None), nn.Linear):
                with torch.no_grad():
                    block.ffn.w_out.weight.mul_((2 * depth) ** -0.5)

    def blocks(self) -> list[Any]:
        """Every block, in depth order."""
        return [block for stage in self.stages for block in stage]  # type: ignore[attr-defined]

    @property
    def causal(self) -> bool:
        both = bool(self.merges) or self.config.reverse_complement
        return not both and all(block.causal for block in self.blocks())

    @property
    def streaming(self) -> bool:
        both = bool(self.merges) or self.config.reverse_complement
        return not both and all(block.streaming for block in self.blocks())

    def layout_out(self, layout: Layout | None, length: int) -> Layout | None:
        """The layout of the output tokens, for an input of ``length`` tokens under ``layout``."""
        for k in self.config.pool:
            layout = None if layout is None else layout.pool(k, length)
            length = -(-length // k)
        return layout

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Run the stages.

        Args:
            x: ``(B, L, dim_in)``.
            state: a tuple with one state a block, or ``None``.
            layout: of ``x``.

        Returns:
            Features after the final norm ``(B, ceil(L / stride), num_features)``, and the state (``None`` unless it streams).

        Raises:
            TypeError: integers.
            ValueError: another shape, or a state of another number of blocks.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"the backbone takes real vectors, got {x.dtype}: embed codes first (modality.embed(tokens, layout), or call the model)"
            )
        if x.ndim != 3 or x.shape[-1] != self.dim_in:
            raise ValueError(f"the backbone takes (B, L, {self.dim_in}), got {tuple(x.shape)}")
        given, length_in = layout, x.shape[1]
        if self.config.reverse_complement:
            x, layout = split_strands(x, layout)
        blocks = self.blocks()
        if state is not None and len(state) != len(blocks):
            raise ValueError(f"the state has {len(state)} entries, the backbone {len(blocks)} blocks")
        states = iter(state if state is not None else [None] * len(blocks))
        out = []
        for s, stage in enumerate(self.stages):
            if s:
                merge: Any = self.merges[s - 1]
                length = x.shape[1]
                x = merge(x, layout)
                layout = None if layout is None else layout.pool(merge.k, length)
            if self.config.reversible:
                here = [next(states) for _ in stage]  # type: ignore[attr-defined]
                x, after = reversible_stack(list(stage), x, here, layout)  # type: ignore[call-overload]
                out += after
                continue
            for block in stage:  # type: ignore[attr-defined]
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x, after = checkpoint(block, x, next(states), layout, use_reentrant=False)
                else:
                    x, after = block(x, next(states), layout)
                out.append(after)
        x = self.norm(x)
        if self.config.reverse_complement:
            x = join_strands(x, self.layout_out(given, length_in))
        return x, tuple(out) if self.streaming else None
