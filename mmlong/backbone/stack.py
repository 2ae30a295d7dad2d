"""The backbone: stages of blocks, with pooling between stages; one stage is a plain stack.

It has the mixer's signature, ``y, state = backbone(x, state, layout)``, and knows neither modalities nor files. With one causal stage it streams.
With several, each stage works on ``pool`` times fewer, wider tokens (as image pyramids do, Liu et al. 2021); a pooled token has seen its whole group, so
such a backbone is not causal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmlong.backbone import prefill
from mmlong.backbone.block import Block, Merge
from mmlong.backbone.colt5 import CoLT5
from mmlong.backbone.directions import Direction, create_directed
from mmlong.backbone.forms import write_form
from mmlong.backbone.norms import NORMS, create_norm, normed
from mmlong.backbone.parts import count_blocks, make_parts, repeated
from mmlong.backbone.reverse_complement import join_strands, split_strands
from mmlong.backbone.reversible import ReversibleBlock, reversible_stack
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.own_loss import asked_again


@dataclass
class BackboneConfig:
    """What a backbone is made of.

    Attributes:
        dim: width; or one a stage.
        depth: blocks; or one number a stage.
        pool: how many neighbours become one token between stages (one less than there are stages), or the sides of a patch of the grid that does, as ``2x2`` (:class:`~mmlong.backbone.block.Merge`); empty for a plain stack.
        parts: a list of blocks and levels instead of ``depth`` and ``mixers`` (:mod:`mmlong.backbone.parts`), e.g. ``[mamba2 x 2, [pool 4, [mamba2 x 4], up], mamba2 x 2]``; empty for none.
        form: a published hierarchy by name, or ``{name: ..., option: ...}``, which writes ``parts`` (:mod:`mmlong.backbone.forms`); empty for none.
        front: parts before the first block (:mod:`mmlong.backbone.parts`), whatever stages follow, e.g. ``[{ngrams: [3, 4, 5]}]``.
        mixers: mixer names, or ``{name: ..., option: ...}``, repeated over depth; or one such list a stage. ``NAME x N``, and ``repeat: N`` among the options, are one N times.
        direction: ``causal``, ``alternate`` or ``both``; see :mod:`mmlong.backbone.directions`.
        ffn: feed-forward: ``swiglu``, ``mlp``, ``none``; experts, ``switch`` or ``st_moe`` (:mod:`mmlong.backbone.experts`); ``colt5``, a heavy branch for some tokens (:mod:`mmlong.backbone.colt5`); a memory, ``product_key_memory`` (:mod:`mmlong.backbone.product_key_memory`); or ``{name: ..., option: ...}``. A mixer written as a mapping may have its block's own: ``{name: mamba2, ffn: none}``, ``{name: s4, ffn: {name: mlp, ratio: 2}}``.
        ffn_ratio: its hidden width over ``dim``; or one a stage.
        dropout: after each residual branch.
        drop_path: chance of skipping a branch at the last block, rising linearly with depth.
        layer_scale: initial scale of each branch, or null for none.
        norm: of the blocks, between stages and behind all: ``layer``, ``rms``, ``rms_offset``, or, where nothing is causal, ``group`` or ``batch`` (:mod:`mmlong.backbone.norms`); levels and other parts have layer norms of their own.
        norm_eps: of those norms.
        norm_after: blocks norm what they have added to, as BERT's do, in place of what they read.
        norm_in: a layer norm of the tokens before the first block, as BERT and RWKV have.
        norm_out: a norm behind the last block.
        checkpoint: recompute each block's activations in the backward instead of keeping them.
        reversible: two streams through the blocks, whose activations are recomputed from what comes out, at any depth those of one block; another function than the plain stack's. See
            :mod:`mmlong.backbone.reversible`.
        reverse_complement: equivariant to the reverse complement of DNA: half of ``dim`` for each strand, with shared weights; see
            :mod:`mmlong.backbone.reverse_complement`.
    """

    dim: int | list[int] = 128
    depth: int | list[int] = 4
    pool: list[int | str] = field(default_factory=list)
    mixers: list[Any] = field(default_factory=lambda: ["mamba2"])
    parts: list[Any] = field(default_factory=list)
    front: list[Any] = field(default_factory=list)
    form: str | dict[str, Any] = ""
    direction: Direction = "causal"
    ffn: str | dict[str, Any] = "swiglu"
    ffn_ratio: float | list[float] = 8 / 3
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_after: bool = False
    norm_in: bool = False
    norm_out: bool = True
    checkpoint: bool = False
    reversible: bool = False
    reverse_complement: bool = False

    def __post_init__(self) -> None:
        if not self.form:
            return
        if not isinstance(self.dim, int):
            raise ValueError(f"backbone.form is of one width that it makes others of, got dim {self.dim}")
        written = write_form(self.form, self.dim)
        # A saved configuration has both.
        if self.parts and self.parts != written:
            raise ValueError(
                f"backbone.form {self.form!r} writes backbone.parts, and there are others: leave one of the two empty"
            )
        self.parts = written


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
        tokens_out: output tokens of every row, where that is no matter of its length (:attr:`mmlong.backbone.part.Part.tokens_out`); else ``None``.
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
        if config.direction == "causal" and getattr(NORMS[config.norm], "two_sided", False):
            raise ValueError(
                f"backbone.norm: {config.norm} is of many tokens together, later ones too: use direction alternate or both, or norm: layer"
            )
        if issubclass(NORMS[config.norm], nn.BatchNorm1d) and (config.reversible or config.checkpoint):
            raise ValueError(
                f"backbone.norm: {config.norm} would count a batch twice where activations are computed again: set reversible and checkpoint to false, or take norm: group"
            )
        if config.reversible and config.checkpoint:
            raise ValueError(
                "backbone.reversible keeps no activations that backbone.checkpoint could spare: set one of them"
            )
        if config.norm_after and config.reversible:
            raise ValueError(
                "backbone.reversible adds a branch to the stream that it does not read, which norm_after would change: set one of them to false"
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
        if config.parts and (stages > 1 or config.reversible or config.reverse_complement):
            raise ValueError(
                "backbone.parts is a stack of its own making: leave pool empty, reversible and reverse_complement false"
            )
        for twice in ("reversible", "reverse_complement"):
            if config.front and getattr(config, twice):
                raise ValueError(f"backbone.front has one stream of one strand: leave {twice} false, or front empty")
        self.stride = 1
        total = sum(map(count_blocks, config.parts)) if config.parts else sum(depths)
        total, index = total + sum(map(count_blocks, config.front)), 0
        self.stages = nn.ModuleList()
        self.merges = nn.ModuleList()

        def make(mixer: Any, dim: int, ratio: float = ratios[0], direction: Direction = config.direction) -> Block:
            nonlocal index
            ffn = config.ffn
            if isinstance(mixer, Mapping) and "ffn" in mixer:
                own = {key: value for key, value in mixer.items() if key != "ffn"}
                mixer, ffn = own, mixer["ffn"]
            if isinstance(ffn, Mapping) and "ratio" in ffn:
                ratio = float(ffn["ratio"])
                ffn = {key: value for key, value in ffn.items() if key != "ratio"}
            drop_path = config.drop_path * index / max(total - 1, 1)
            directed = create_directed(mixer, dim, direction, index)
            index += 1
            kind = ReversibleBlock if config.reversible else Block
            return kind(
                directed, dim, ffn, ratio, config.dropout, drop_path, config.layer_scale,
                norm_eps=config.norm_eps, norm=config.norm, norm_after=config.norm_after,
            )  # fmt: skip

        front = make_parts(config.front, dims[0], make)
        for s in range(stages):
            first = front if s == 0 else []
            if config.parts:
                self.stages.append(nn.ModuleList([*first, *make_parts(config.parts, dims[0], make)]))
                continue
            row = [one for mixer in mixers[s] for one in repeated(mixer)]
            specs = (row[i % len(row)] for i in range(depths[s]))
            self.stages.append(nn.ModuleList([*first, *(make(spec, dims[s], ratios[s]) for spec in specs)]))
            if s + 1 < stages:
                merge = Merge(config.pool[s], dims[s], dims[s + 1], config.norm_eps, config.norm)
                self.merges.append(merge)
                self.stride *= merge.k
        if any(getattr(part, "tokens_out", None) is not None for part in self.parts()[:-1]):
            raise ValueError("backbone.parts: what leaves other tokens, as a perceiver does, stands last")
        last = self.parts()[-1] if self.parts() else None
        self.tokens_out: int | None = getattr(last, "tokens_out", None)
        if last is not None and self.tokens_out is not None:
            self.num_features = dims[-1] = last.width_out
        if config.direction == "causal" and any(isinstance(block.ffn, CoLT5) for block in self.blocks()):
            raise ValueError(
                "backbone.ffn: colt5 chooses tokens of the whole sequence, later ones too: use direction alternate or both, or ffn: switch, whose tokens are alone"
            )
        if config.reversible and self.has_own_loss:
            raise ValueError(
                "backbone.reversible keeps no graph that a mixer's own loss could be part of: set its weight (index_loss, span_loss) to 0, or reversible to false"
            )
        self.norm_in = nn.LayerNorm(dims[0], eps=config.norm_eps) if config.norm_in else nn.Identity()
        self.norm = create_norm(config.norm, dims[-1], config.norm_eps) if config.norm_out else nn.Identity()
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
        return [block for part in self.parts() for block in part.modules() if isinstance(block, Block)]

    def parts(self) -> list[Any]:
        """What the stages are made of, in depth order: blocks, and levels that hold some."""
        return [part for stage in self.stages for part in stage]  # type: ignore[attr-defined]

    @property
    def causal(self) -> bool:
        both = bool(self.merges) or self.config.reverse_complement
        return not both and all(part.causal for part in self.parts())

    @property
    def streaming(self) -> bool:
        both = bool(self.merges) or self.config.reverse_complement
        return not both and all(part.streaming for part in self.parts())

    @property
    def has_own_loss(self) -> bool:
        """Whether one of its mixers has a loss of its own (:mod:`mmlong.mixers.own_loss`)."""
        return any(bool(getattr(m, "has_own_loss", False)) for m in self.modules() if m is not self)

    @property
    def reads_codes(self) -> frozenset[str]:
        """Kinds of modality whose codes some part reads in ``layout.codes``, which the model is to give it; ``any`` for whichever; empty if none does."""
        found = (getattr(m, "reads_codes", None) for m in self.modules() if m is not self)
        return frozenset(kind for kind in found if kind)

    @property
    def per_token(self) -> bool:
        """Whether every token that comes in has one that goes out."""
        return self.stride == 1 and self.tokens_out is None

    @property
    def instead(self) -> str:
        """What one that is not ``per_token`` makes, as a clause for an error."""
        return f"makes one of {self.stride}" if self.tokens_out is None else f"makes {self.tokens_out} of them all"

    def length_out(self, length: int | None) -> int | None:
        """Output tokens of an input of ``length`` tokens; ``None`` where that is not known."""
        if self.tokens_out is not None or length is None:
            return self.tokens_out
        return -(-length // self.stride)

    def layout_out(self, layout: Layout | None, length: int) -> Layout | None:
        """The layout of the output tokens, for an input of ``length`` tokens under ``layout``."""
        if self.tokens_out is not None:
            return None
        for merge in self.merges:
            assert isinstance(merge, Merge)
            layout = merge.layout_out(layout, length)
            length = -(-length // merge.k)
        return layout

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Run the stages.

        Args:
            x: ``(B, L, dim_in)``.
            state: a tuple with one state a block or level, or ``None``.
            layout: of ``x``.

        Returns:
            Features after the final norm ``(B, ceil(L / stride), num_features)``, and the state (``None`` unless it streams).

        Raises:
            TypeError: integers.
            ValueError: another shape, or a state of another number of parts.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"the backbone takes real vectors, got {x.dtype}: embed codes first (modality.embed(tokens, layout), or call the model)"
            )
        if x.ndim != 3 or x.shape[-1] != self.dim_in or x.shape[1] < 1:
            raise ValueError(f"the backbone takes (B, L, {self.dim_in}) with L >= 1, got {tuple(x.shape)}")
        if layout is not None:
            layout.check(x.shape[0], x.shape[1])
        if state is not None and not self.streaming:
            raise ValueError("the backbone was given a state but has none: not all of it is causal and streams")
        given, length_in = layout, x.shape[1]
        if self.config.reverse_complement:
            x, layout = split_strands(x, layout)
        x = self.norm_in(x)
        parts = self.parts()
        if state is not None and len(state) != len(parts):
            raise ValueError(f"the state has {len(state)} entries, the backbone {len(parts)} blocks")
        states = iter(state if state is not None else [None] * len(parts))
        out = []
        for s, stage in enumerate(self.stages):
            if s:
                merge: Any = self.merges[s - 1]
                length = x.shape[1]
                x, layout = merge(x, layout), merge.layout_out(layout, length)
            if self.config.reversible:
                here = [next(states) for _ in stage]  # type: ignore[attr-defined]
                x, after = reversible_stack(list(stage), x, here, layout)  # type: ignore[call-overload]
                out += after
                continue
            for block in stage:  # type: ignore[attr-defined]
                if prefill.asked() and self.streaming and block is parts[-1] and hasattr(block, "absorb"):
                    after, x = block.absorb(x, next(states), layout), torch.full_like(x, torch.nan)
                elif self.grad_checkpointing and torch.is_grad_enabled():
                    x, after = checkpoint(block, x, next(states), layout, use_reentrant=False, context_fn=asked_again)
                else:
                    x, after = block(x, next(states), layout)
                out.append(after)
        x = normed(self.norm, x, layout if self.tokens_out is None else None)
        if self.config.reverse_complement:
            x = join_strands(x, self.layout_out(given, length_in))
        return x, tuple(out) if self.streaming else None
