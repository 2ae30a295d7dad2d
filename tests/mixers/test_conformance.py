"""Every registered mixer keeps the contract, in each form that its traits claim; one test for each property, so that a failure names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mmlong.mixers import MIXERS, list_mixers
from mmlong.testing import PROPERTY_NAMES, check_mixer


@dataclass(frozen=True)
class Nearer:
    """A variant that brings windows, chunks, blocks and several heads within the lengths and widths that are checked.

    Attributes:
        options: for the mixer.
        constants: module-level sizes (``module.NAME``) to set for the test.
    """

    options: dict[str, Any]
    constants: dict[str, int] = field(default_factory=dict)


TILES = {
    "mmlong.ops.attention_backends.MASK_ELEMENTS": 64,
    "mmlong.ops.tiled_attention.TILE_ELEMENTS": 1 << 12,
    "mmlong.ops.tiled_attention.MAX_KEYS": 32,
}

BLOCKS = {
    "mmlong.mixers.blocks.BLOCK_ELEMENTS": 1,
    "mmlong.mixers.blocks.BLOCK_TOKENS": 100,
    "mmlong.ops.blockwise.STRETCH": 50,
}
SCANNED = {"mmlong.ops.scan.CHUNK": 8, **BLOCKS}
CHUNKED = {"mmlong.ops.chunk_forms.BLOCK_ELEMENTS": 1 << 14, **BLOCKS}
SCALAR = {"mmlong.ops.linear_attention.BLOCK_ELEMENTS": 1 << 13, **BLOCKS}
SLOTTED = {**SCALAR, **CHUNKED, **SCANNED}
LEARNING = {"mmlong.mixers.learning_memory.BLOCK_TOKENS": 20}
TWO_SIDED = {"mmlong.mixers.kernelised.TWO_SIDED_TOKENS": 50, **SCALAR}

NEARER: dict[str, Nearer] = {
    "abc": Nearer({"heads": 2, "slots": 5, "chunk": 8}, SLOTTED),
    "attention": Nearer({"heads": 4, "kv_heads": 2}, TILES),
    "deltanet": Nearer({"heads": 2, "chunk": 16, "steps": 2, "negative_eigenvalues": True}, CHUNKED),
    "gated_deltanet": Nearer({"heads": 2, "chunk": 16}, CHUNKED),
    "kda": Nearer({"heads": 2, "chunk": 16}, CHUNKED),
    "rwkv7": Nearer({"heads": 2, "chunk": 16, "decay_rank": 4}, CHUNKED),
    "gsa": Nearer({"heads": 2, "slots": 5, "chunk": 8}, SLOTTED),
    "gla": Nearer({"heads": 2, "chunk": 8}, CHUNKED),
    "hgrn": Nearer({"lower_bound": 0.2}, SCANNED),
    "h3": Nearer({"d_state": 6, "head_dim": 4, "chunk": 8}),
    "hgrn2": Nearer({"heads": 2, "chunk": 8, "lower_bound": 0.2}, CHUNKED),
    "hydra": Nearer({"headdim": 8, "ngroups": 2, "d_conv": 5, "chunk": 12}, SCALAR),
    "hyena": Nearer({"max_length": 100, "order": 3}, {"mmlong.ops.long_conv.BLOCK_ELEMENTS": 1 << 12}),
    "lightning": Nearer({"heads": 2, "chunk": 8, "depth": 0.5}, SCALAR),
    "local": Nearer({"window": 10, "heads": 4, "kv_heads": 2}, {"mmlong.ops.local_attention.MIN_BLOCK": 4, **TILES}),
    "log_linear": Nearer(
        {"headdim": 8, "ngroups": 2, "levels": 6, "chunk": 8}, {"mmlong.mixers.log_linear.BLOCK_TOKENS": 100, **BLOCKS}
    ),
    "long_conv": Nearer(
        {"max_length": 100, "smooth": 5, "dropout": 0.2}, {"mmlong.ops.long_conv.BLOCK_ELEMENTS": 1 << 12}
    ),
    "mamba": Nearer({"d_state": 4}, {"mmlong.ops.selective_scan.BLOCK_ELEMENTS": 1 << 11}),
    "mamba2": Nearer(
        {"headdim": 8, "ngroups": 2, "chunk": 16},
        {
            "mmlong.mixers.mamba2.BLOCK_ELEMENTS": 1 << 13,
            "mmlong.ops.linear_attention.BLOCK_ELEMENTS": 1 << 13,
            "mmlong.ops.short_conv.BLOCK_ELEMENTS": 1 << 13,
        },
    ),
    "mamba3": Nearer({"headdim": 8, "ngroups": 2, "rank": 3, "norm": True, "chunk": 12}, SCALAR),
    "lru": Nearer({"d_state": 5}, SCANNED),
    "mega": Nearer({"chunk": 16, "ema_dim": 3}, TILES),
    "min_gru": Nearer({}, SCANNED),
    "min_lstm": Nearer({"candidate": "positive", "expand": 1.5}, SCANNED),
    "mlstm": Nearer({"heads": 2, "chunk": 8}, SCALAR),
    "performer": Nearer({"heads": 2, "chunk": 8}, TWO_SIDED),
    "retnet": Nearer({"heads": 2, "chunk": 8}, SCALAR),
    "rfa": Nearer({"heads": 2, "chunk": 8}, SCALAR),
    "rwkv6": Nearer({"heads": 2, "chunk": 8}, CHUNKED),
    "rg_lru": Nearer({"blocks": 2}, SCANNED),
    "rwkv4": Nearer({"place": 0.2}, SCANNED),
    "sgconv": Nearer(
        {"max_length": 100, "kernel_dim": 4, "decay_max": 3.0}, {"mmlong.ops.long_conv.BLOCK_ELEMENTS": 1 << 12}
    ),
    "s5": Nearer({"d_state": 12, "blocks": 3}, SCANNED),
    "s4": Nearer({"chunk": 8, "d_state": 6}),
    "stripedhyena2": Nearer({"form": "mr", "taps": 40}, {"mmlong.ops.toeplitz_conv.BLOCK_ELEMENTS": 1 << 11, **BLOCKS}),
    "tcn": Nearer({"dilations": [1, 5, 2], "kernel_size": 3, "channels": 3}, BLOCKS),
    "titans": Nearer({"heads": 2, "mini_batch": 6}, LEARNING),
    "ttt_linear": Nearer({"heads": 2, "mini_batch": 5}, LEARNING),
    "ttt_mlp": Nearer({"heads": 2, "mini_batch": 8, "share_qk": False, "gate": False}, LEARNING),
    "s4d": Nearer({"chunk": 8, "d_state": 6, "init": "legs"}),
    "s4nd": Nearer({"chunk": 8, "d_state": 6, "axes": 3, "bandlimit": 0.7}, {"mmlong.mixers.s4nd.MATRIX": 8}),
    "vmamba": Nearer(
        {"d_state": 4, "dt_rank": 3, "expand": 1.5}, {"mmlong.ops.selective_scan.BLOCK_ELEMENTS": 1 << 11}
    ),
}

SLOW = ("compile", "export")
DEFAULT_ONLY = ("cost", "compile", "export")
"""What says little about a mixer cut down to tiny blocks."""
ELSEWHERE = ("stress",)
"""What test_stress.py checks, with strong decays where they are parameters."""


def cases() -> list[Any]:
    """(name, options, constants, property), as test parameters."""
    found = []
    for name in list_mixers():
        traits = MIXERS[name].traits
        for variant in (None, NEARER[name]) if name in NEARER else (None,):
            for causal in (True, False):
                if not (traits.causal if causal else traits.bidirectional):
                    continue
                form = "-".join([name, "causal" if causal else "two-sided", *(["nearer"] if variant else [])])
                for prop in PROPERTY_NAMES:
                    if prop in (DEFAULT_ONLY if variant else ELSEWHERE):
                        continue
                    options = {"causal": causal, **(variant.options if variant else {})}
                    constants = variant.constants if variant else {}
                    slow = prop in SLOW or (variant and prop == "causality")
                    marks = pytest.mark.slow if slow else ()
                    found.append(pytest.param(name, options, constants, prop, id=f"{form}-{prop}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "options", "constants", "prop"), cases())
def test_conformance(
    name: str, options: dict[str, Any], constants: dict[str, int], prop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, value in constants.items():
        monkeypatch.setattr(place, value)
    # A mixer with a nearer variant is seen at the other width by that.
    nearer = constants or len(options) > 1
    dims = (16,) if nearer else (32,) if name in NEARER else (16, 32)
    if not check_mixer(name, options=options, only=prop, dims=dims):
        pytest.skip(f"the traits of {name} exclude {prop!r} here")


def test_nearer_variants_are_of_registered_mixers() -> None:
    assert set(NEARER) <= set(list_mixers())
