"""What stands between the parts of a backbone: ``model.forward_intermediates``, after timm.

Parts are those of ``backbone.parts()`` in depth order, over all stages: blocks, and levels with blocks inside. They are listened to while the model runs as ever, so what is
given is what they gave, in whatever kind of model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mmlong.backbone.reverse_complement import join_strands
from mmlong.layout import Layout
from mmlong.ops.raster import raster_of

if TYPE_CHECKING:
    from mmlong.models.model import Model

FORMATS = ("NLC", "NCHW")


class Intermediate(NamedTuple):
    """What one part gave: features ``(B, L', D')`` and their layout (``None`` for one full row)."""

    x: Tensor
    layout: Layout | None


class _EnoughError(Exception):
    """The last part that was asked for has run."""


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which of ``count`` parts are meant, ascending and once each, as timm has it: the last ``indices``, those listed (from the end where negative), or all.

    Raises:
        ValueError: none, or one that there is not.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"indices asks for the last {indices} parts of the backbone; it has {count}")
        return list(range(count - indices, count))
    if wrong := [i for i in indices if not -count <= i < count]:
        raise ValueError(f"indices asks for part {wrong[0]} of the backbone; it has {count}, 0 to {count - 1}")
    if not indices:
        raise ValueError(f"indices is empty: name parts of the backbone, 0 to {count - 1}")
    return sorted({i % count for i in indices})


def on_grid(x: Tensor, layout: Layout) -> Tensor:
    """Tokens ``(B, L, D)`` of a grid, in whatever scan order, as ``(B, *grid, D)``."""
    assert layout.grid is not None
    return raster_of(layout, x.shape[1], len(layout.grid), "on_grid").lay(x).unflatten(1, layout.grid)


def forward_intermediates(
    model: Model,
    tokens: Tensor,
    layout: Layout | None = None,
    indices: int | Sequence[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NLC",
    intermediates_only: bool = False,
) -> Any:
    """What parts of the backbone give, and what the model's features are.

    Args:
        model: any kind of model.
        tokens: whole sequences ``(B, L, ...)``.
        layout: of the tokens.
        indices: which parts: the last so many, those listed (negative: from the end), or all. They come in depth order.
        norm: give each the backbone's final norm.
        stop_early: do not run the parts after the last one asked for; then there are no features of the model, ``None``.
        output_fmt: ``NLC``: an :class:`Intermediate` each, a sequence and its layout. ``NCHW``: ``(B, D', H', W')`` each, in raster order whatever the scan order, of a model whose tokens are one grid of two axes.
        intermediates_only: leave out the model's features.

    Returns:
        ``(features, intermediates)``, features ``(B, L', num_features)`` as :meth:`~mmlong.models.Model.forward_features` gives them; or the list of intermediates alone.

    Raises:
        ValueError: an unknown format, parts that there are not, a norm of another width than what it should be given, tokens that are no grid of two axes, or a reversible backbone, which
            keeps nothing between blocks.
    """
    backbone = model.backbone
    if output_fmt not in FORMATS:
        raise ValueError(f"output_fmt is {output_fmt!r}; it can be {' or '.join(FORMATS)}")
    if backbone.config.reversible:
        raise ValueError("a reversible backbone keeps nothing between its blocks: set backbone.reversible to false")
    parts, layouts = backbone.parts(), _layouts(model, layout, tokens.shape[1])
    wanted = take_indices(len(parts), indices)
    found: dict[int, Intermediate] = {}

    def listen(index: int) -> Any:
        def hook(module: Any, given: Any, output: tuple[Tensor, Any]) -> None:
            found[index] = _given(model, index, output[0], layouts[index], norm, output_fmt)
            if stop_early and index == wanted[-1]:
                raise _EnoughError

        return hook

    handles = [parts[index].register_forward_hook(listen(index)) for index in wanted]
    features = None
    try:
        features, _ = model.forward_features(tokens, None, layout)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    intermediates = [found[index].x if output_fmt == "NCHW" else found[index] for index in wanted]
    return intermediates if intermediates_only else (features, intermediates)


def _layouts(model: Model, layout: Layout | None, length: int) -> list[Layout | None]:
    """Of what each part gives."""
    backbone, found = model.backbone, []
    for s, stage in enumerate(backbone.stages):
        if s:
            merge: Any = backbone.merges[s - 1]
            layout, length = merge.layout_out(layout, length), -(-length // merge.k)
        parts: Any = stage
        found += [None if getattr(part, "tokens_out", None) is not None else layout for part in parts]
    return found


def _given(model: Model, index: int, x: Tensor, layout: Layout | None, norm: bool, output_fmt: str) -> Intermediate:
    backbone = model.backbone
    if norm:
        width = next(backbone.norm.parameters()).numel()  # of one strand, where there are two
        if x.shape[-1] != width:
            raise ValueError(
                f"the final norm is {width} wide, and part {index} of the backbone gives {x.shape[-1]}: ask for parts of the last stage, or leave norm false"
            )
        x = backbone.norm(x)
    if backbone.config.reverse_complement:
        x = join_strands(x, layout)
    if output_fmt == "NCHW":
        if layout is None or layout.grid is None or len(layout.grid) != 2:
            tokens = "no grid" if layout is None or layout.grid is None else f"a grid of {len(layout.grid)} axes"
            raise ValueError(
                f"NCHW is of one grid of two axes, and what part {index} of the backbone gives is {tokens}: take output_fmt NLC"
                + (", or give the layout that model.encode made" if layout is None else "")
            )
        x = on_grid(x, layout).permute(0, 3, 1, 2).contiguous()
    return Intermediate(x, layout)
