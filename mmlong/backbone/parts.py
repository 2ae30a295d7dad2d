"""A backbone written as a list: blocks, levels on chunks of tokens, and parts within chunks, nested as deep as one likes.

How each part is written::

    mamba2                                             a block
    mamba2 x 4                                         four of them
    {name: local, window: 128, repeat: 2}              two, with options of the mixer
    [pool 4, [mamba2 x 4], up]                         a level: four tokens become one, four blocks run on those, and back
    {pool: 4, dim: 256, down: mean, parts: [...]}      the same with options of :class:`~mmlong.backbone.hierarchy.Level`
    {within: 8, parts: [attention]}                    blocks within chunks of eight tokens
    {dynamic: 6, dim: 256, parts: [...]}               chunks that are learned, of six tokens or so (:mod:`mmlong.backbone.dynamic`)
    {recurrent_memory: 8, segment: 512, parts: [...]}  eight memory tokens from segment to segment (:mod:`mmlong.backbone.recurrent_memory`)
    {retro: 64, index: FOLDER}                         what was found for the chunk of 64 tokens before (:mod:`mmlong.backbone.retro`)
    {universal: 6, parts: [...]}                       the same parts up to six times (:mod:`mmlong.backbone.universal`)
    {spacebyte: utf8, dim: 256, parts: [...]}          parts that run where a word ends (:mod:`mmlong.backbone.spacebyte`)
    {ngrams: [3, 4, 5], rows: 65536}                   the last three, four and five codes, looked up (:mod:`mmlong.backbone.ngrams`)
    {token_learner: 8, parts: [...]}                   eight tokens learned from all (:mod:`mmlong.backbone.token_learner`)
    {charformer: 2, blocks: 4, parts: [...]}           soft blocks of one to four tokens, then half as many (:mod:`mmlong.backbone.charformer`)
    {funnel: 2, parts: [...]}                          queries that are means of two tokens (:mod:`mmlong.backbone.funnel`)
    {perceiver_io: 64, dim: 256, parts: [...]}         64 latents that read the tokens, and that tokens read (:mod:`mmlong.backbone.perceiver`)
    {perceiver_ar: 512, parts: [...]}                  one read of the whole past, then parts within chunks of 512 (:mod:`mmlong.backbone.perceiver_ar`)
    {perceiver: 64, reads: 3, parts: [...]}            64 latents in place of the tokens, at the end of a backbone
    {mixture_of_depths: 0.125, parts: [...]}           for an eighth of the tokens (:mod:`mmlong.backbone.mixture_of_depths`)
    {feedback: 4, window: 512, heads: 4}               four layers that read one memory of all of them (:mod:`mmlong.backbone.feedback`)
    {ttm: 16, size: 64, read: 8, parts: [...]}         a memory of 16 tokens, read and written once a chunk of 64 (:mod:`mmlong.backbone.token_turing`)
    {timm: resnet10t, stage: 2}                        the feature map of a network of timm over the picture (:mod:`mmlong.backbone.timm_map`)
    {transformers: mamba, layers: 2}                   a network of the package transformers (:mod:`mmlong.backbone.transformers_stack`)

Published hierarchies are such lists with a name (:mod:`mmlong.backbone.forms`). What is not a block is registered by its key (:mod:`mmlong.backbone.part`), other people's parts too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from mmlong.backbone import (  # noqa: F401  (each registers what it has)
    charformer,
    dynamic,
    feedback,
    funnel,
    hierarchy,
    mixture_of_depths,
    ngrams,
    perceiver,
    perceiver_ar,
    recurrent_memory,
    retro,
    spacebyte,
    timm_map,
    token_learner,
    token_turing,
    transformers_stack,
    universal,
)
from mmlong.backbone.hierarchy import Parts
from mmlong.backbone.part import PARTS, make_part, written_keys
from mmlong.registry import nearest

MakeBlock = Callable[..., nn.Module]
"""``(mixer, dim)`` to a block; with ``direction``, to one of another direction than the backbone's."""


def count_blocks(spec: Any) -> int:
    """Blocks of a part or list of parts, however deep."""
    if isinstance(spec, str):
        return len(repeated(spec))
    if isinstance(spec, Mapping):
        if "parts" in spec:
            return sum(map(count_blocks, spec["parts"]))
        return len(repeated(spec)) if "name" in spec else 0
    written = level(spec)
    return sum(map(count_blocks, spec if written is None else written["parts"]))


def make_parts(spec: Sequence[Any], dim: int, make: MakeBlock) -> list[nn.Module]:
    """The parts that a list says, in order.

    Args:
        spec: see above.
        dim: width of the tokens.
        make: a block of a mixer and width.

    Raises:
        ValueError: what is no part; the message says which.
    """
    found: list[nn.Module] = []
    for part in spec:
        if isinstance(part, str):
            found += [make(mixer, dim) for mixer in repeated(part)]
            continue
        if not isinstance(part, Mapping):
            written = level(part)
            if written is None:
                raise ValueError(f"backbone.parts: {part!r} is no part; a level is [pool K, [parts], up]")
            part = written
        if "name" in part:
            found += [make(mixer, dim) for mixer in repeated(part)]
        else:
            found.append(_nested(part, dim, make))
    return found


def _nested(part: Mapping[str, Any], dim: int, make: MakeBlock) -> nn.Module:
    kind = next((key for key in part if key in PARTS), None)
    if kind is None:
        raise ValueError(
            f"backbone.parts: {dict(part)!r} has neither name, nor one of {', '.join(PARTS.names())}{nearest(next(iter(part), ''), PARTS.names())}"
        )
    known = written_keys(kind)
    for key in part:
        if key not in known:
            raise ValueError(
                f"backbone.parts: a part with {kind} has no option {key!r}{nearest(key, known)}; it has {', '.join(known)}"
            )
    options = {key: value for key, value in part.items() if key not in (kind, "parts", "dim")}
    if (direction := getattr(PARTS[kind], "inside", None)) is not None:
        make = partial(make, direction=direction)
    width = int(part.get("dim") or dim)
    inner = None
    if "parts" in known:
        if not part.get("parts"):
            raise ValueError(f"backbone.parts: {dict(part)!r} needs parts, at least one")
        inside = make_parts(part["parts"], width, make)
        if any(getattr(one, "tokens_out", None) is not None for one in inside):
            raise ValueError(
                f"backbone.parts: what leaves other tokens stands last in a backbone, not in a part: {dict(part)!r}"
            )
        inner = Parts(inside)
    return make_part(kind, part[kind], dim, inner, width, options)


def repeated(mixer: Any) -> list[Any]:
    """A mixer as often as it says: ``NAME x N``, or a mapping with ``repeat``."""
    if isinstance(mixer, str):
        name, times = name_and_times(mixer)
        return [name] * times
    if not isinstance(mixer, Mapping):
        return [mixer]
    times = mixer.get("repeat", 1)
    if not isinstance(times, int) or times < 1:
        raise ValueError(f"backbone: repeat must be a whole number of blocks, at least 1, got {times!r} in {dict(mixer)!r}")  # fmt: skip
    return [{key: value for key, value in mixer.items() if key != "repeat"} for _ in range(times)]


def name_and_times(text: str) -> tuple[str, int]:
    """Of ``NAME x N`` or ``NAME``."""
    found = re.fullmatch(r"\s*([\w.-]+)(?:\s+x\s+(\d+))?\s*", text)
    if found is None or found[2] == "0":
        raise ValueError(f"backbone: {text!r} is neither a mixer's name nor NAME x N")
    return found[1], int(found[2] or 1)


def level(part: Any) -> Mapping[str, Any] | None:
    """``[pool K, [parts], up]`` as a mapping; ``None`` for what is not written so."""
    if not isinstance(part, Sequence) or len(part) not in (2, 3) or not isinstance(part[0], str):
        return None
    if isinstance(part[1], str) or not isinstance(part[1], Sequence):
        return None
    found = re.fullmatch(r"\s*pool\s+(\d+)\s*", part[0])
    if found is None or (len(part) == 3 and part[2] != "up"):
        raise ValueError(f"backbone.parts: {list(part)!r} is no part; a level is [pool K, [parts], up]")
    return {"pool": int(found[1]), "parts": part[1]}
