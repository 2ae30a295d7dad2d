"""Published hierarchies by name: each writes the list of parts that its paper describes, for whatever width.

    backbone: {dim: 256, form: megabyte}
    backbone: {dim: 512, form: {name: hnet, stages: 2, layers: 16}}

is the same as the list that :func:`write_form` gives, written out in ``backbone.parts``, where a saved configuration has it; ``mmlong mixers --forms`` prints them. Blocks are the house's (pre-norm, RoPE, the feed-forward of ``backbone.ffn`` unless a form says another), and sizes are ratios to ``dim``; what else departs
from a paper is in each one's note. Other people's packages add theirs by the entry-point group ``mmlong.forms``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmlong.registry import Registry, check_options

Parts = list[Any]


@dataclass(frozen=True)
class Form:
    """A published form.

    Attributes:
        write: ``(dim, **options)`` to a list of parts (:mod:`mmlong.backbone.parts`).
        paper: authors, year and identifier.
        note: fidelity: what is the paper's, and what departs.
    """

    write: Callable[..., Parts]
    paper: str
    note: str


FORMS: Registry[Form] = Registry("backbone form", group="mmlong.forms")


def register_form(name: str, paper: str, note: str) -> Callable[[Callable[..., Parts]], Callable[..., Parts]]:
    """Decorator for a function ``(dim, **options)`` that writes parts; its options are what ``backbone.form`` takes."""

    def add(write: Callable[..., Parts]) -> Callable[..., Parts]:
        FORMS.register(name)(Form(write, paper, note))
        return write

    return add


def write_form(form: str | Mapping[str, Any], dim: int) -> Parts:
    """The parts that a form stands for.

    Args:
        form: its name, or ``{name: ..., option: ...}``.
        dim: width of the tokens.

    Raises:
        KeyError: an unknown name (the nearest is named).
        TypeError: an option that it does not take (the nearest is named).
        ValueError: a mapping without a name, or sizes that make no sense.
    """
    options = {"name": form} if isinstance(form, str) else dict(form)
    if "name" not in options:
        raise ValueError(f"backbone.form is a name or {{name: ..., option: ...}}, got {dict(options)!r}")
    name = options.pop("name")
    write = FORMS[name].write
    if "dim" in options:
        raise ValueError(f"backbone.form {name!r} takes its width from backbone.dim")
    check_options(f"backbone form {name!r}", write, options)
    return write(dim, **options)


def _times(block: Any, count: int) -> Parts:
    """Nothing, one block, or several, as they are written."""
    if count < 0:
        raise ValueError(f"a form has at least no blocks, got {count}")
    if not count:
        return []
    if isinstance(block, str):
        return [block if count == 1 else f"{block} x {count}"]
    own = copy.deepcopy(dict(block))
    return [own if count == 1 else {**own, "repeat": count}]


@register_form(
    "megabyte",
    paper="Yu et al. 2023, arXiv 2305.07185",
    note="a global model reads patches, shifted by one patch (in an autoregressive model a chunk is made of the bytes of the patch before), and a local model each patch's bytes, shifted by one, with the global output added. Departs: RoPE for learned positions; every byte of a patch has a projection of its own of the global output, where the paper cuts it in pieces and projects all alike; the patch's first byte sees the byte before it, where the paper has a padding vector; what stands before the first patch is zeros and the start vector",
)
def megabyte(
    dim: int,
    patch: int = 8,
    global_dim: int | None = None,
    global_layers: int = 6,
    local_layers: int = 3,
    mixer: Any = "attention",
) -> Parts:
    """``patch`` tokens to a global token of ``global_dim`` (4 ``dim``)."""
    return [
        {"pool": patch, "dim": global_dim or 4 * dim, "parts": _times(mixer, global_layers)},
        {"within": patch, "parts": _times(mixer, local_layers)},
    ]


@register_form(
    "hourglass",
    paper="Nawrot et al. 2021, arXiv 2110.13711",
    note="blocks at full length, shortened blocks between them (nested as deep as told), shifted right by k - 1, attention resampling both ways, one width. Departs: RoPE for Transformer-XL's relative positions; what mmlong.backbone.resampling says of resampling; no norm behind a level",
)
def hourglass(
    dim: int,
    pool: Sequence[int] = (3,),
    layers: Sequence[int] = (1, 6),
    down: str = "attention",
    up: str = "attention",
    mixer: Any = "attention",
) -> Parts:
    """``layers[i]`` blocks before and behind level ``i``, and ``layers[-1]`` in the middle: the paper's ``2@1 24@3 2@1`` is ``pool: [3], layers: [2, 24]``."""
    if len(layers) != len(pool) + 1:
        raise ValueError(
            f"hourglass has one more number of layers than of pooling, got layers {list(layers)} and pool {list(pool)}"
        )
    parts = _times(mixer, layers[-1])
    for k, count in zip(reversed(pool), reversed(layers[:-1]), strict=True):
        level = {"pool": k, "down": down, "up": up, "parts": parts}
        parts = [*_times(mixer, count), level, *_times(mixer, count)]
    return parts


@register_form(
    "hnet",
    paper="Hwang, Wang & Gu 2025, arXiv 2507.07955",
    note="encoder and decoder of Mamba-2 without a feed-forward, learned chunks of 6 tokens (two stages: 3 and 3), a Transformer inside; layouts m4 [T] m4 and m3 [T1m3 [T] m3T1] m3, ratio loss 0.03. Departs: LayerNorm for RMSNorm, and none behind encoder, main network and decoder; RoPE on whole heads; no learning rates of their own for the stages",
)
def hnet(
    dim: int,
    stages: int = 1,
    layers: int = 8,
    ratio: float | None = None,
    dims: Sequence[int] | None = None,
    window: int = 1023,
    d_state: int = 128,
    weight: float = 0.03,
) -> Parts:
    """``layers`` blocks in the main network; ``dims`` of the stages inside (1 stage: 2 ``dim``; 2: 1.5 and 2 ``dim``)."""
    if stages not in (1, 2):
        raise ValueError(f"hnet has 1 stage or 2, got {stages}")
    inside = list(dims or ([2 * dim] if stages == 1 else [3 * dim // 2, 2 * dim]))
    if len(inside) != stages:
        raise ValueError(f"hnet has a width for each stage inside, {stages}; got {inside}")
    ssm = {"name": "mamba2", "d_state": d_state, "ffn": "none"}
    main = _times("attention", layers)
    level: dict[str, Any] = {"dynamic": ratio or (6 if stages == 1 else 3), "weight": weight}
    if stages == 1:
        return [*_times(ssm, 4), {**level, "dim": inside[0], "parts": main}, *_times(ssm, 4)]
    near = _times({"name": "local", "window": window}, 1)
    middle = [*near, *_times(ssm, 3), {**level, "dim": inside[1], "parts": main}, *_times(ssm, 3), *near]
    return [*_times(ssm, 3), {**level, "dim": inside[0], "parts": middle}, *_times(ssm, 3)]


@register_form(
    "spacebyte",
    paper="Slagle 2024, arXiv 2404.14408",
    note="local blocks over a window of dim bytes, half of them before and half behind wide blocks that run where a word ends. Departs: RoPE for learned positions, the house's feed-forward, no normed queries and keys, and no most words of a row",
)
def spacebyte(
    dim: int, global_dim: int | None = None, global_layers: int = 6, local_layers: int = 6, window: int | None = None
) -> Parts:
    """``global_dim`` is 2 ``dim``, ``window`` is ``dim``."""
    near = {"name": "local", "window": window or dim}
    before = local_layers // 2
    inside = {"spacebyte": "utf8", "dim": global_dim or 2 * dim, "parts": _times("attention", global_layers)}
    return [*_times(near, before), inside, *_times(near, local_layers - before)]


@register_form(
    "sashimi",
    paper="Goel et al. 2022, arXiv 2202.09729",
    note="S4 blocks with a GELU feed-forward of ratio 2 behind pooling by 4 and 4, widths doubled, a tier's output a pooled token late and added to what the tier before had; unet: blocks before pooling too. Departs: no second residual round the blocks of a tier; of what a document's first pooled tokens have, their code makes zeros behind the tier, here they are a projection of zeros before it",
)
def sashimi(
    dim: int,
    pool: Sequence[int] = (4, 4),
    layers: int = 8,
    expand: int = 2,
    unet: bool = False,
    mixer: str = "s4",
) -> Parts:
    """``layers`` blocks in each tier."""
    block = {"name": mixer, "ffn": {"name": "mlp", "ratio": 2.0}}
    parts = _times(block, layers)
    for tier in reversed(range(len(pool))):
        level = {"pool": pool[tier], "dim": dim * expand ** (tier + 1), "lag": 1, "parts": parts}
        parts = [*(_times(block, layers) if unet else []), level, *_times(block, layers)]
    return parts


@register_form(
    "block_recurrent",
    paper="Hutchins et al. 2022, arXiv 2203.07852",
    note="a Transformer of windows with one recurrent layer, the tenth of twelve or in proportion. Departs: what mixer block_recurrent says; windows are sliding",
)
def block_recurrent(dim: int, layers: int = 12, window: int = 512, states: int = 512, gate: str = "fixed") -> Parts:
    """``layers`` in all, at least 1."""
    if layers < 1:
        raise ValueError(f"block_recurrent has at least 1 layer, got {layers}")
    near = {"name": "local", "window": window}
    before = max(0, round(layers * 10 / 12) - 1)
    recurrent = {"name": "block_recurrent", "window": window, "states": states, "gate": gate}
    return [*_times(near, before), recurrent, *_times(near, layers - before - 1)]


@register_form(
    "rmt",
    paper="Bulatov, Kuratov & Burtsev 2022, arXiv 2207.06881",
    note="a Transformer over segments with memory tokens read before and written behind. Departs: RoPE",
)
def rmt(dim: int, layers: int = 6, tokens: int = 10, segment: int = 512, mixer: Any = "attention") -> Parts:
    """``tokens`` of memory, from segment to segment."""
    return [{"recurrent_memory": tokens, "segment": segment, "parts": _times(mixer, layers)}]


@register_form(
    "universal_transformer",
    paper="Dehghani et al. 2018, arXiv 1807.03819",
    note="one block, up to `steps` times, with adaptive halting. Departs: RoPE in the block for sines at every step",
)
def universal_transformer(dim: int, steps: int = 6, halting: bool = True, mixer: Any = "attention") -> Parts:
    """One block with shared weights."""
    return [{"universal": steps, "halting": halting, "parts": _times(mixer, 1)}]
