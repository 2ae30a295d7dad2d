"""What is compared: a recipe as it is, and the same with another backbone. Options as ``mmlong fit`` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A recipe, and the backbones that take turns at it.

    Attributes:
        recipe: whose data, objective and optimiser all share.
        metric: of ``summary.json``.
        forms: by name, what differs.
        shared: options beside the recipe's.
    """

    recipe: str
    metric: str
    forms: dict[str, dict[str, Any]]
    shared: dict[str, Any]


_CONV = {"name": "masked_conv2d", "width": 256, "radius": 2}
_PIXEL = {"name": "mamba2", "expand": 1, "d_state": 16, "headdim": 16}
_WIDE = {"name": "mamba2", "expand": 1, "d_state": 32, "headdim": 32}
_BYTE = {"name": "mamba2", "expand": 1}
_SAMPLE = {"name": "mamba2", "expand": 1, "d_state": 16, "headdim": 16}


def _chain(dim: int, pool: int, wide: int, blocks: int, near: list[Any], behind: list[Any]) -> dict[str, Any]:
    """Blocks at full length, ``blocks`` wide ones on pooled tokens, blocks at full length."""
    level = {"pool": pool, "dim": wide, "parts": [{**_WIDE, "repeat": blocks}]}
    return {"model.backbone.dim": dim, "model.backbone.parts": [*near, level, *behind]}


def _megabyte(near: dict[str, Any]) -> dict[str, Any]:
    """MEGABYTE's parts: wide blocks on patches of 16, and blocks within each patch."""
    wide = {"pool": 16, "dim": 192, "parts": [{**_WIDE, "repeat": 4}]}
    return {"model.backbone.parts": [wide, {"within": 16, "parts": [{**near, "repeat": 3}]}]}


def _chunks(how: str, size: int, blocks: int) -> dict[str, Any]:
    """Wide blocks on chunks of about ``size`` bytes."""
    return {how: size, "dim": 256, "parts": [{**_WIDE, "repeat": blocks}]}


SUBJECTS: dict[str, Subject] = {
    "pixels": Subject(
        "image/photo256_ar",
        "test/bits",
        {
            "flat": {},
            "pool 16": _chain(48, 16, 192, 4, [_CONV, _PIXEL], [_CONV]),
            "pool 4": _chain(48, 4, 96, 3, [_CONV, _PIXEL], [_CONV]),
            "megabyte": _megabyte(_PIXEL),
        },
        {},
    ),
    "sound": Subject(
        "audio/mulaw_ar",
        "test/bits",
        {
            "flat": {},
            "pool 16": _chain(64, 16, 192, 4, [_SAMPLE], [_SAMPLE]),
            "sashimi": {"model.backbone.form": {"name": "sashimi", "layers": 2, "mixer": "s4d"}},
            "megabyte": _megabyte(_SAMPLE),
        },
        {"data.dataset": "foxdot", "data.length": 44100, "data.batch_size": 1, "data.eval_batch_size": 1, "model.samples": 0},
    ),
    "text": Subject(
        "text/bible_ar",
        "test/bits",
        {
            "flat": {},
            "flat, two of Mamba-2": {"model.backbone.depth": 2},
            "pool 8": {"model.backbone.parts": [_chunks("pool", 8, 2)]},
            "pool 8, four inside": {"model.backbone.parts": [_chunks("pool", 8, 4)]},
            "pool 4": {"model.backbone.parts": [_chunks("pool", 4, 2)]},
            "hnet, nothing outside": {"model.backbone.parts": [_chunks("dynamic", 6, 2)]},
            "megabyte": {
                "model.backbone.parts": [
                    {"pool": 4, "dim": 256, "parts": [{**_WIDE, "repeat": 4}]},
                    {"within": 4, "parts": [{"name": "attention", "heads": 4, "repeat": 2}]},
                ],
            },
            "megabyte, one block within 8": {
                "model.backbone.parts": [_chunks("pool", 8, 2), {"within": 8, "parts": [{"name": "attention", "heads": 4}]}],
            },
            "hnet": {
                "model.backbone.parts": [
                    _BYTE,
                    {"dynamic": 4, "dim": 192, "parts": [{**_WIDE, "repeat": 4}]},
                    _BYTE,
                ],
            },
            "hnet, Mamba-2 alone outside": {
                "model.backbone.parts": [{**_BYTE, "ffn": "none"}, _chunks("dynamic", 6, 2), {**_BYTE, "ffn": "none"}],
            },
        },
        {"model.samples": 0},
    ),
    "percussion": Subject(
        "audio/percussion",
        "test/accuracy",
        {
            "flat": {
                "model.backbone.dim": 64, "model.backbone.depth": 4, "model.backbone.pool": [], "model.backbone.mixers": [_WIDE],
            },
            "pooled stages": {},
        },
        {"data.length": 44100},
    ),
}  # fmt: skip
"""By the name that the command takes; the first form of each is the flat one."""
