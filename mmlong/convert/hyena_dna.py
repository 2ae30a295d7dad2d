"""HyenaDNA (Nguyen et al. 2023, arXiv 2306.15794): Hyena operators of order 2 and GELU feed-forwards over letters of DNA.

It has no class in ``transformers``: names, shapes and the configuration are those of its authors' files for that library (``LongSafari/hyenadna-*-hf``, model_type ``hyenadna``), whose code computes what is converted here: filters of
the lag over ``max_seq_len``, a window shifted by 0.05, no places. Codes are its tokenizer's (A, C, G, T, N are 7 .. 11), padded to a multiple of 8.

The features of the lag, the lag itself and the rates of the window are in the files too; the features could have been trained, at a rate of 1e-5. Ours are made by the formula, so files in which they are others are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mmlong.convert.contract import Converter, ConvertError, Published, causal_config, register_converter
from mmlong.convert.table import ROW, TAPS, Change, Row
from mmlong.mixers.hyena import FAST, SLOW, TARGET
from mmlong.models import Config

FIRST = Change(lambda t: t.unsqueeze(0), lambda t: t.squeeze(0))
"""``(D,)`` as ``(1, D)``."""

NEAR = 1e-5
"""How far stored features may be from their formula."""


def padded(p: Published) -> int:
    """Codes, with those that fill them up to a multiple."""
    step = p.get("pad_vocab_size_multiple", 8)
    return -(-int(p["vocab_size"]) // step) * step


@register_converter("hyenadna")
class HyenaDNA(Converter):
    """``HyenaDNAForCausalLM``."""

    reads = "HyenaDNA"
    note = "exact by its published names and formula (no class in transformers), up to max_seq_len; refused if the features of the lag were trained"
    prefix = "hyena."
    kinds = ("autoregressive", "plain")
    unused: ClassVar[Mapping[str, str]] = {
        "*filter_fn.pos_emb.z": "features of the lag, which have a formula",
        "*filter_fn.pos_emb.t": "the lag",
        "*filter_fn.modulation.deltas": "rates of the window, which have a formula",
    }

    def config(self, p: Published, kind: str) -> Config:
        p.must("hyena_order", 2, "a filter's network has one output a channel")
        p.must("short_filter_order", 3, "the short convolution has three taps")
        p.must("train_freq", True, "frequencies are parameters")
        p.must("layer_norm_epsilon", 1e-5, "all norms have one epsilon, and those of the blocks 1e-5")
        dim = p["d_model"]
        mixer = {
            "name": "hyena",
            "max_length": p["max_seq_len"],
            "filter_width": p.get("filter_order", 64),
            "filter_layers": p.get("num_inner_mlps", 2),
            "bands": (p["emb_dim"] - 1) // 2,
            "endpoint": True,
        }
        backbone = {
            "dim": dim,
            "depth": p["n_layer"],
            "mixers": [mixer],
            "ffn": {"name": "mlp", "activation": "gelu_tanh"},
            "ffn_ratio": p.get("d_inner", 4 * dim) / dim,
        }
        modality = {"name": "tokens", "codes": padded(p)}
        return causal_config(p, kind, p.get("bos_token_id", None), modality, backbone, {"tied": self.tied(p)})

    def tied(self, p: Published) -> bool:
        """Whether the head is the table of codes."""
        return bool(p.get("tie_word_embeddings", True))

    def rows(self, p: Published) -> Iterable[Row]:
        table = "hyena.backbone.embeddings.word_embeddings.weight"
        yield Row(table, "modality.code.weight")
        for i in range(p["n_layer"]):
            theirs, ours = f"hyena.backbone.layers.{i}", f"backbone.stages.0.{i}"
            for kind in ("weight", "bias"):
                yield Row(f"{theirs}.norm1.{kind}", f"{ours}.norm1.{kind}")
                yield Row(f"{theirs}.norm2.{kind}", f"{ours}.norm2.{kind}")
                yield Row(f"{theirs}.mlp.fc1.{kind}", f"{ours}.ffn.0.{kind}")
                yield Row(f"{theirs}.mlp.fc2.{kind}", f"{ours}.ffn.2.{kind}")
            yield from self.mixer_rows(f"{theirs}.mixer", f"{ours}.mixer", p.get("num_inner_mlps", 2))
        for kind in ("weight", "bias"):
            yield Row(f"hyena.backbone.ln_f.{kind}", f"backbone.norm.{kind}")
        if not self.tied(p):
            yield Row("lm_head.weight", "head.linear.weight")

    def mixer_rows(self, theirs: str, ours: str, layers: int) -> Iterator[Row]:
        """Of one operator, whose filter's network has so many hidden layers after the first."""
        for kind in ("weight", "bias"):
            yield Row(f"{theirs}.in_proj.{kind}", f"{ours}.in_proj.{kind}")
            yield Row(f"{theirs}.out_proj.{kind}", f"{ours}.out_proj.{kind}")
            for n in range(layers + 1):
                yield Row(f"{theirs}.filter_fn.implicit_filter.{2 * n}.{kind}", f"{ours}.filter_hidden.{n}.{kind}")
        yield Row(f"{theirs}.short_filter.weight", f"{ours}.conv_weight", TAPS)
        yield Row(f"{theirs}.short_filter.bias", f"{ours}.conv_bias")
        yield Row(f"{theirs}.filter_fn.bias", f"{ours}.bias", FIRST)
        yield Row(f"{theirs}.filter_fn.implicit_filter.1.freq", f"{ours}.sine_frequency", ROW)
        yield Row(f"{theirs}.filter_fn.implicit_filter.{2 * layers + 2}.weight", f"{ours}.filter_out.weight")

    def same(self, p: Published) -> Mapping[str, str]:
        # All sines of a filter have one frequency.
        found: dict[str, str] = {}
        for i in range(p["n_layer"]):
            at = f"hyena.backbone.layers.{i}.mixer.filter_fn.implicit_filter"
            found |= {f"{at}.{2 * n + 3}.freq": f"{at}.1.freq" for n in range(p.get("num_inner_mlps", 2))}
        if self.tied(p):
            found["lm_head.weight"] = "hyena.backbone.embeddings.word_embeddings.weight"
        return found

    def check(self, p: Published, theirs: Mapping[str, Tensor]) -> None:
        made = features(p)
        for name, found in theirs.items():
            wanted = made.get(name.rpartition("filter_fn.")[2])
            if wanted is not None and (
                found.shape != wanted.shape or float((found.double() - wanted).abs().max()) > NEAR
            ):
                raise ConvertError(
                    f"{name} is not what its formula makes of config.json (a trained one is not converted: ours has the formula)"
                )


def features(p: Published) -> dict[str, Tensor]:
    """What files hold beside parameters, by their formula, in float64."""
    L, bands = p["max_seq_len"], (p["emb_dim"] - 1) // 2
    t = torch.linspace(0, 1, L, dtype=torch.float64)[None, :, None]
    turns = torch.arange(L, dtype=torch.float64)[None, :, None] / L
    angles = 2 * math.pi * turns * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    slow, fast = math.log(TARGET) / SLOW, math.log(TARGET) / FAST
    return {
        "pos_emb.z": torch.cat([t, angles.cos(), -angles.sin()], -1),
        "pos_emb.t": t,
        "modulation.deltas": torch.linspace(slow, fast, p["d_model"], dtype=torch.float64)[None, None],
    }
