"""Every registered mixer keeps the contract, in each form that its traits claim; one test for each property, so that a failure names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mmlong.mixers import MIXERS, list_mixers
from mmlong.testing import PROPERTY_NAMES, check_mixer
from mmlong.testing.subject import PROBED


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
SCALAR = {"mmlong.ops.linear_attention_blocks.BLOCK_ELEMENTS": 1 << 13, **BLOCKS}
SLOTTED = {**SCALAR, **CHUNKED, **SCANNED}
LEARNING = {"mmlong.mixers.learning_memory.BLOCK_TOKENS": 20}
TWO_SIDED = {"mmlong.mixers.kernelised.TWO_SIDED_TOKENS": 50, **SCALAR}
CHOSEN = {
    "mmlong.mixers.selecting.GATE_ELEMENTS": 1 << 13,
    "mmlong.ops.chosen_blocks.TILE_ELEMENTS": 1 << 11,
    **TILES,
}
SELECTED = {"mmlong.ops.block_attention.TILE_ELEMENTS": 1 << 9, "mmlong.ops.members.FEW": 3, **TILES}

NEARER: dict[str, Nearer] = {
    "hardcoded_gaussian": Nearer({"heads": 4, "sigma": 1.5}),
    "mixer_mlp": Nearer({"hidden": 5, "max_length": 2100}),
    "gmlp": Nearer({"expand": 2, "max_length": 2100}, {"mmlong.ops.position_mixing.ROWS": 20}),
    "poolingformer": Nearer({"window": 5, "pooled_window": 20, "kernel": 3, "heads": 2}, TILES),
    "long_short": Nearer({"window": 10, "segment": 5, "rank": 2, "heads": 2}, TILES),
    "h_transformer": Nearer({"block": 2, "heads": 2}, {"mmlong.ops.block_attention.TILE_ELEMENTS": 1 << 10}),
    "abc": Nearer({"heads": 2, "slots": 5, "chunk": 8}, SLOTTED),
    "adaptive_span": Nearer({"max_span": 20, "ramp": 6, "initial_span": 0.3, "heads": 2}, TILES),
    "expire_span": Nearer(
        {"max_span": 20, "ramp": 6, "initial_span": 0.3, "near": 9, "heads": 2, "kv_heads": 1},
        {"mmlong.ops.expiring_attention.SCORES": 1 << 13},
    ),
    "attention": Nearer({"heads": 4, "kv_heads": 2, "value_dim": 5}, TILES),
    "diff_attention": Nearer({"heads": 4, "kv_heads": 2}, TILES),
    "forgetting_attention": Nearer({"heads": 4, "kv_heads": 2, "qk_norm": True, "gate": True}, TILES),
    "mla": Nearer({"heads": 2, "q_rank": 12, "kv_rank": 10, "v_dim": 6}, TILES),
    "bigbird": Nearer({"heads": 2, "block": 4, "random": 2}, {"mmlong.ops.block_attention.TILE_ELEMENTS": 1 << 10}),
    "dilated": Nearer({"heads": 2, "segments": [4, 16, 64], "rates": [1, 2, 2]}, TILES),
    "etc": Nearer(
        {"heads": 2, "window": 9, "globals": 3, "max_distance": 4}, {"mmlong.ops.labelled_attention.BLOCK": 8, **TILES}
    ),
    "longformer": Nearer({"heads": 2, "window": 5, "dilation": [1, 3]}, TILES),
    "sparse_fixed": Nearer({"heads": 2, "stride": 7, "summary": 2}, TILES),
    "sparse_strided": Nearer({"heads": 2, "stride": 7, "split": True}, TILES),
    "clusterformer": Nearer({"heads": 2, "clusters": 5, "chunk": 12}, TILES),
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
            "mmlong.ops.linear_attention_blocks.BLOCK_ELEMENTS": 1 << 13,
            "mmlong.ops.short_conv.BLOCK_ELEMENTS": 1 << 13,
        },
    ),
    "mamba3": Nearer({"headdim": 8, "ngroups": 2, "rank": 3, "norm": True, "chunk": 12}, SCALAR),
    "lru": Nearer({"d_state": 5}, SCANNED),
    "mega": Nearer({"chunk": 16, "ema_dim": 3}, TILES),
    "efficient_attention": Nearer({"heads": 2}),
    "fnet": Nearer({"norm": "backward"}),
    "linformer": Nearer({"heads": 2, "rank": 5, "max_length": 1100, "sharing": "none"}),
    "luna": Nearer({"heads": 2, "packed": 5, "tied": True, "activation": "elu"}, SCALAR),
    "memory_compressed": Nearer(
        {"heads": 2, "factor": 2, "grouped": True},
        {
            "mmlong.mixers.memory_compressed.QUERIES": 8,
            "mmlong.mixers.memory_compressed.KEYS": 4,
            "mmlong.ops.block_attention.TILE_ELEMENTS": 1 << 10,
        },
    ),
    "nystromformer": Nearer({"heads": 2, "landmarks": 7, "kernel_size": 5}),
    "set_transformer": Nearer({"heads": 2, "points": 3, "inner_block": False}),
    "synthesizer_dense": Nearer(
        {"heads": 2, "hidden": 3, "max_length": 2080, "factors": (65, 32)},
        {"mmlong.ops.given_scores.BLOCK_ELEMENTS": 1 << 12},
    ),
    "synthesizer_random": Nearer(
        {"heads": 2, "rank": None, "max_length": 2080}, {"mmlong.ops.given_scores.BLOCK_ELEMENTS": 1 << 12}
    ),
    "xcit": Nearer({"heads": 2}),
    "axial": Nearer({"heads": 2, "join": "chain"}, TILES),
    "axial_decoder": Nearer({"heads": 2, "width": 7}, TILES),
    "image_local_1d": Nearer({"heads": 2, "block": 6, "memory": 4}, TILES),
    "image_local_2d": Nearer(
        {"heads": 2, "width": 9, "block": [3, 4], "memory": [2, 2]},
        {"mmlong.ops.grid_blocks.MASK_ELEMENTS": 64, "mmlong.ops.block_attention.TILE_ELEMENTS": 1 << 10},
    ),
    "neighborhood_2d": Nearer(
        {"heads": 2, "kernel": 3, "dilation": 2}, {"mmlong.ops.grid_windows.TILE_ELEMENTS": 1 << 10}
    ),
    "neighborhood_3d": Nearer(
        {"heads": 2, "kernel": [1, 3, 5], "dilation": 2}, {"mmlong.ops.grid_windows.TILE_ELEMENTS": 1 << 10}
    ),
    "swin_2d": Nearer({"heads": 2, "window": 4, "shift": 2}, {"mmlong.ops.grid_windows.TILE_ELEMENTS": 1 << 9}),
    "min_gru": Nearer({}, SCANNED),
    "min_lstm": Nearer({"candidate": "positive", "expand": 1.5}, SCANNED),
    "mlstm": Nearer({"heads": 2, "chunk": 8}, SCALAR),
    "performer": Nearer({"heads": 2, "chunk": 8}, TWO_SIDED),
    "reformer": Nearer({"heads": 2, "rounds": 2, "chunk": 8, "buckets": 6}, SELECTED),
    "retnet": Nearer({"heads": 2, "chunk": 8}, SCALAR),
    "rfa": Nearer({"heads": 2, "chunk": 8}, SCALAR),
    "routing": Nearer({"heads": 4, "clusters": 5, "window": 9, "local_window": 7}, SELECTED),
    "rwkv6": Nearer({"heads": 2, "chunk": 8}, CHUNKED),
    "rg_lru": Nearer({"blocks": 2}, SCANNED),
    "rwkv4": Nearer({"place": 0.2}, SCANNED),
    "sgconv": Nearer(
        {"max_length": 100, "kernel_dim": 4, "decay_max": 3.0}, {"mmlong.ops.long_conv.BLOCK_ELEMENTS": 1 << 12}
    ),
    "s5": Nearer({"d_state": 12, "blocks": 3}, SCANNED),
    "s4": Nearer({"chunk": 8, "d_state": 6}),
    "sinkhorn": Nearer({"heads": 2, "block": 8}, TILES),
    "memorizing": Nearer(
        {"segment": 12, "near": 7, "topk": 20, "heads": 2, "kv_heads": 1},
        {"mmlong.ops.best_keys.TILE_ELEMENTS": 1 << 12, "mmlong.ops.best_keys.LEAST": 5, **TILES},
    ),
    "block_recurrent": Nearer({"window": 6, "states": 3, "heads": 2, "gate": "lstm"}, TILES),
    "infini_attention": Nearer({"heads": 4, "kv_heads": 2, "segment": 6, "delta": True}, TILES),
    "transformer_xl": Nearer({"heads": 2, "segment": 6, "memory": 10, "exact": True}, TILES),
    "compressive": Nearer(
        {"heads": 2, "segment": 6, "memory": 9, "compressed": 4, "rate": 3, "compression": "dilated_conv"}, TILES
    ),
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
    # Selections of single tokens change with the last bits: so many keys that bfloat16 changes little, and, of each, a number with which no finite
    # difference crosses such a change.
    "dsa": Nearer(
        {"topk": 48, "index_heads": 3, "heads": 2, "kv_heads": 1},
        {"mmlong.ops.best_keys.TILE_ELEMENTS": 1 << 12, "mmlong.ops.best_keys.LEAST": 5},
    ),
    "moba": Nearer({"block": 16, "topk": 4, "heads": 2, "kv_heads": 1}, CHOSEN),
    "nsa": Nearer(
        {"compress": 4, "stride": 2, "block": 8, "blocks": 5, "window": 10, "heads": 4, "kv_heads": 2}, CHOSEN
    ),
    "topk": Nearer(
        {"topk": 20, "heads": 2, "kv_heads": 1},
        {"mmlong.ops.best_keys.TILE_ELEMENTS": 1 << 12, "mmlong.ops.best_keys.LEAST": 5},
    ),
}

USUAL: dict[str, dict[str, Any]] = {"sparse_strided": {"stride": 16}}
"""Options in place of defaults that are meant for long sequences: of its 128 strides each is a graph of its own when exported."""

SLOW = ("compile", "export")
DEFAULT_ONLY = ("cost", "compile", "export")
"""What says little about a mixer cut down to tiny blocks."""
NEARER_PROBED = 127
"""Tokens that are probed for leaks one by one: many of a nearer variant's blocks."""
OF_THE_NEARER = ("padding", "resets", "gradients", "segments", "causality")
"""What a nearer variant shows better, and what takes the most time beside compilers: not looked at a second time with the sizes that are usual (whole is held against pieces in those too)."""
ELSEWHERE = ("stress",)
"""What test_stress.py checks, with strong decays where they are parameters."""
GIVEN = ("synthesizer_dense", "synthesizer_random", "gmlp")
"""Weights over positions, which have no chunks that stress could show more in: their nearer variants hold thousands of positions, and take half a minute."""
COMPILED = (
    "attention", "bigbird", "deltanet", "fnet", "gla", "hyena", "linformer", "local", "longformer", "mamba", "mamba2", "memorizing", "nsa", "performer",
    "reformer", "rg_lru", "s4d", "ttt_linear", "xcit",
)  # fmt: skip
"""Of which ``torch.compile`` is asked, in one form: a mixer over each op. It is the dearest property of all; every mixer is exported, which traces the same code."""


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
                    if variant is None and name in NEARER and prop in OF_THE_NEARER:
                        continue
                    if (variant and name in GIVEN and prop == "stress") or (
                        prop == "compile" and (name not in COMPILED or (not causal and traits.causal))
                    ):
                        continue
                    options = {"causal": causal, **(variant.options if variant else USUAL.get(name, {}))}
                    constants = variant.constants if variant else {}
                    slow = prop in SLOW or (variant and prop == "causality")
                    marks = pytest.mark.slow if slow else ()
                    found.append(pytest.param(name, options, constants, prop, id=f"{form}-{prop}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "options", "constants", "prop"), cases())
def test_conformance(
    name: str,
    options: dict[str, Any],
    constants: dict[str, int],
    prop: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    for place, value in constants.items():
        monkeypatch.setattr(place, value)
    # A mixer with a nearer variant is seen at the other width by that.
    nearer = request.node.callspec.id.endswith(f"-nearer-{prop}")
    dims = (16,) if nearer else (32,) if name in NEARER else (16, 32)
    probed = NEARER_PROBED if nearer else PROBED
    if not check_mixer(name, options=options, only=prop, dims=dims, probed=probed):
        pytest.skip(f"the traits of {name} exclude {prop!r} here")


def test_nearer_variants_are_of_registered_mixers() -> None:
    assert set(NEARER) <= set(list_mixers())
