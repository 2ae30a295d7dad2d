"""Caduceus (Schiff et al. 2024, arXiv 2403.03234), the form that is not equivariant by itself (Caduceus-Ph): Mamba both ways, added.

It has no class in ``transformers``: names, shapes and the configuration are those of its authors' files for that library (``kuleshov-group/caduceus-ph_*``, model_type ``caduceus``). The projections in and out of both ways are one tensor
there (``bidirectional_weight_tie``); here there are two that begin alike, and a model goes back only while they are alike.

Caduceus-PS (``rcps``) is refused: its head reads the other strand by the complement of each code, where ours says the same of both strands, and its published code exchanges the two strands in every block if norms are fused
(``fused_add_norm``), and not otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmlong.convert.contract import Converter, Published, register_converter
from mmlong.convert.hyena_dna import padded
from mmlong.convert.mamba import mamba_rows
from mmlong.convert.table import Row
from mmlong.models import Config

TABLE = "caduceus.backbone.embeddings.word_embeddings.weight"


@register_converter("caduceus")
class Caduceus(Converter):
    """``CaduceusForMaskedLM`` without ``rcps``."""

    reads = "Caduceus-Ph"
    note = "exact by its published names and formula (no class in transformers); back only while both ways have the same projections; Caduceus-PS is refused"
    prefix = "caduceus."

    def config(self, p: Published, kind: str) -> Config:
        p.must("rcps", False, "a head that reads the other strand by the complement of each code is not among ours")
        p.must("bidirectional", True, "there are two ways")
        p.must("bidirectional_strategy", "add", "both ways are added")
        p.must("rms_norm", True, "norms are RMSNorm")
        s = Published(p.get("ssm_cfg", {}))
        s.must("bias", False, "projections are without biases")
        s.must("conv_bias", True, "the convolution has a bias")
        rank = s.get("dt_rank", "auto")
        mixer: dict[str, Any] = {
            "name": "mamba",
            "expand": s.get("expand", 2),
            "d_state": s.get("d_state", 16),
            "dt_rank": None if rank == "auto" else rank,
            "d_conv": s.get("d_conv", 4),
        }
        codes = padded(p)
        return {
            "kind": kind,
            "modality": {"name": "tokens", "codes": codes},
            "backbone": {
                "dim": p["d_model"],
                "depth": p["n_layer"],
                "mixers": [mixer],
                "direction": "both",
                "ffn": "none",
                "norm": "rms",
                "norm_eps": p.get("norm_epsilon", 1e-5),
            },
            "head": {"name": "categorical", "num_classes": codes, "bias": False, "tied": self.tied(p)},
        }

    def tied(self, p: Published) -> bool:
        """Whether the head is the table of codes."""
        return bool(p.get("tie_word_embeddings", True))

    def rows(self, p: Published) -> Iterable[Row]:
        yield Row(TABLE, "modality.code.weight")
        for i in range(p["n_layer"]):
            theirs, ours = f"caduceus.backbone.layers.{i}", f"backbone.stages.0.{i}"
            yield Row(f"{theirs}.norm.weight", f"{ours}.norm1.weight")
            yield from mamba_rows(f"{theirs}.mixer.mamba_fwd", f"{ours}.mixer.forwards")
            yield from mamba_rows(f"{theirs}.mixer.mamba_rev", f"{ours}.mixer.backwards.mixer")
        yield Row("caduceus.backbone.norm_f.weight", "backbone.norm.weight")
        if not self.tied(p):
            yield Row("lm_head.weight", "head.linear.weight")

    def same(self, p: Published) -> Mapping[str, str]:
        found = {"lm_head.weight": TABLE} if self.tied(p) else {}
        if p.get("bidirectional_weight_tie", True):
            for i in range(p["n_layer"]):
                at = f"caduceus.backbone.layers.{i}.mixer"
                for name in ("in_proj.weight", "out_proj.weight"):
                    found[f"{at}.mamba_rev.{name}"] = f"{at}.mamba_fwd.{name}"
        return found
