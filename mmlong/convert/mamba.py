"""Mamba (Gu & Dao 2023, arXiv 2312.00752) and Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): blocks of a mixer alone, RMSNorm. Nothing departs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmlong.convert.contract import Converter, ConvertError, Published, causal_config, register_converter
from mmlong.convert.table import TAPS, Row
from mmlong.models import Config


@register_converter("mamba")
class Mamba(Converter):
    """``MambaForCausalLM``."""

    reads = "Mamba"
    note = "exact"
    prefix = "backbone."
    kinds = ("autoregressive", "plain")
    default_tied = True

    def config(self, p: Published, kind: str) -> Config:
        p.must("use_bias", False, "projections are without biases")
        p.must("use_conv_bias", True, "the convolution has a bias")
        p.must("hidden_act", "silu", "the gate is a silu")
        backbone = {
            "dim": p["hidden_size"],
            "depth": p["num_hidden_layers"],
            "mixers": [self.mixer(p)],
            "ffn": "none",
            "norm": "rms",
            "norm_eps": p.get("layer_norm_epsilon", 1e-5),
        }
        return causal_config(p, kind, p.get("bos_token_id", None), {}, backbone, {"tied": self.tied(p)})

    def mixer(self, p: Published) -> dict[str, Any]:
        """The mixer's name and options."""
        rank = p.get("time_step_rank", "auto")
        return {
            "name": "mamba",
            "expand": p.get("expand", 2),
            "d_state": p.get("state_size", 16),
            "dt_rank": None if rank == "auto" else rank,
            "d_conv": p.get("conv_kernel", 4),
        }

    def tied(self, p: Published) -> bool:
        """Whether the head is the table of codes."""
        return bool(p.get("tie_word_embeddings", self.default_tied))

    def rows(self, p: Published) -> Iterable[Row]:
        yield Row("backbone.embeddings.weight", "modality.code.weight")
        for i in range(p["num_hidden_layers"]):
            theirs, ours = f"backbone.layers.{i}", f"backbone.stages.0.{i}"
            yield Row(f"{theirs}.norm.weight", f"{ours}.norm1.weight")
            yield from self.mixer_rows(f"{theirs}.mixer", f"{ours}.mixer")
        yield Row("backbone.norm_f.weight", "backbone.norm.weight")
        if not self.tied(p):
            yield Row("lm_head.weight", "head.linear.weight")

    def mixer_rows(self, theirs: str, ours: str) -> Iterator[Row]:
        """Of one mixer."""
        yield from mamba_rows(theirs, ours)

    def same(self, p: Published) -> Mapping[str, str]:
        return {"lm_head.weight": "backbone.embeddings.weight"} if self.tied(p) else {}


def mamba_rows(theirs: str, ours: str) -> Iterator[Row]:
    """A Mamba mixer, as everybody names its tensors, and ours."""
    for name in ("in_proj.weight", "out_proj.weight", "x_proj.weight", "dt_proj.weight", "A_log", "D"):
        yield Row(f"{theirs}.{name}", f"{ours}.{name}")
    yield Row(f"{theirs}.dt_proj.bias", f"{ours}.dt_bias")
    yield Row(f"{theirs}.conv1d.weight", f"{ours}.conv_weight", TAPS)
    yield Row(f"{theirs}.conv1d.bias", f"{ours}.conv_bias")


@register_converter("mamba2")
class Mamba2(Mamba):
    """``Mamba2ForCausalLM``."""

    reads = "Mamba-2"
    default_tied = False

    def mixer(self, p: Published) -> dict[str, Any]:
        limit = p.get("time_step_limit", [0.0, "Infinity"])
        # JSON has no infinity: a file may have it as a number of Python's, a word, or transformers' {"__float__": "Infinity"}.
        high = limit[1].get("__float__", 0) if isinstance(limit[1], dict) else limit[1]
        if limit[0] != 0 or float(high) != float("inf"):
            raise ConvertError(
                f"config.json: time_step_limit is {limit!r}, and only 0 to infinity can be converted: steps are not bounded"
            )
        return {
            "name": "mamba2",
            "expand": p.get("expand", 2),
            "d_state": p.get("state_size", 128),
            "headdim": p.get("head_dim", 64),
            "ngroups": p.get("n_groups", 8),
            "d_conv": p.get("conv_kernel", 4),
            "norm_eps": p.get("layer_norm_epsilon", 1e-5),
        }

    def mixer_rows(self, theirs: str, ours: str) -> Iterator[Row]:
        for name in ("in_proj.weight", "out_proj.weight", "A_log", "D", "dt_bias"):
            yield Row(f"{theirs}.{name}", f"{ours}.{name}")
        yield Row(f"{theirs}.conv1d.weight", f"{ours}.conv_weight", TAPS)
        yield Row(f"{theirs}.conv1d.bias", f"{ours}.conv_bias")
        yield Row(f"{theirs}.norm.weight", f"{ours}.norm_weight")
