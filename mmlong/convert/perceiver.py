"""Perceiver IO's masked language model, of bytes (Jaegle et al. 2021, arXiv 2107.14795, section 4.1).

Tokens with learned places are read by latents, layers run on those, and a learned query for each place reads them; the head is the table of codes. Of its classes in ``transformers`` this is ``PerceiverForMaskedLM``,
whose answers are for all of its places, however short the text; here there are as many as tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from mmlong.convert.contract import Converter, ConvertError, Published, register_converter
from mmlong.convert.table import Row
from mmlong.models import Config

DECODER_HEADS, DECODER_QK = 8, 256
"""Of the last read, which no configuration says: they stand in the class."""

PARTS = {
    "attention.self.layernorm1": "norm_queries",
    "attention.self.layernorm2": "norm_source",
    "attention.self.query": "q_proj",
    "attention.self.key": "k_proj",
    "attention.self.value": "v_proj",
    "attention.output.dense": "out_proj",
    "layernorm": "norm",
    "mlp.dense1": "ffn.0",
    "mlp.dense2": "ffn.2",
}
"""Of a read."""
BLOCK = {
    "attention.self.layernorm1": "norm1",
    "attention.self.query": "mixer.q_proj",
    "attention.self.key": "mixer.k_proj",
    "attention.self.value": "mixer.v_proj",
    "attention.output.dense": "mixer.out_proj",
    "layernorm": "norm2",
    "mlp.dense1": "ffn.0",
    "mlp.dense2": "ffn.2",
}
"""Of a layer on the latents."""


@register_converter("perceiver")
class Perceiver(Converter):
    """``PerceiverForMaskedLM``; models of other kinds have no table of codes and are refused for it."""

    reads = "Perceiver IO"
    note = "PerceiverForMaskedLM, exact for its first tokens, as many as there are; theirs answers for all places. Its other classes (images, flow, several modalities) have stems of their own and are refused"
    kinds: ClassVar[tuple[str, ...]] = ("plain",)

    def config(self, p: Published, kind: str) -> Config:
        named = p.get("architectures", ["PerceiverForMaskedLM"])
        if named != ["PerceiverForMaskedLM"]:
            raise ConvertError(
                f"config.json: architectures are {named}, and only PerceiverForMaskedLM can be converted: the others have stems and decoders of their own"
            )
        p.must("num_blocks", 1, "each layer on the latents has weights of its own")
        p.must("hidden_act", "gelu", "feed-forwards of reads are GELU's")
        p.must("use_query_residual", True, "latents are added to what they read")
        latent, dim, places = p["d_latents"], p["d_model"], p["max_position_embeddings"]
        shape = p.get("cross_attention_shape_for_attention", "kv")
        qk = p.get("qk_channels", None)
        # Their layers on the latents fall back to the latents' width, the first read to what the configuration says.
        v = p.get("v_channels", None)
        read_qk = qk or (latent if shape == "q" else dim)
        heads = p.get("num_self_attention_heads", 8)
        inner_qk = qk or latent
        inner_v = v or inner_qk
        if inner_v != latent:
            raise ConvertError(
                f"config.json: v_channels is {inner_v} and d_latents {latent}: layers on the latents would change their width"
            )
        block = {
            "name": "attention",
            "heads": heads,
            "head_dim": inner_qk // heads,
            "value_dim": inner_v // heads,
            "positions": "none",
            "bias": True,
            "repeat": p.get("num_self_attends_per_block", 26),
        }
        part = {
            "perceiver_io": p["num_latents"],
            "dim": latent,
            "heads": p.get("num_cross_attention_heads", 8),
            "ratio": float(p.get("cross_attention_widening_factor", 1)),
            "qk_dim": read_qk,
            "v_dim": v or read_qk,
            "residual": False,
            "queries": places,
            "ask": {"heads": DECODER_HEADS, "qk_dim": DECODER_QK, "v_dim": dim, "ratio": 1.0},
            "parts": [block],
        }
        return {
            "kind": kind,
            "modality": {"name": "tokens", "codes": p["vocab_size"], "places": places},
            "backbone": {
                "dim": dim,
                "parts": [part],
                "direction": "both",
                "ffn": {"name": "mlp", "activation": "gelu"},
                "ffn_ratio": float(p.get("self_attention_widening_factor", 1)),
                "norm_out": False,
            },
            "head": {"name": "categorical", "num_classes": p["vocab_size"], "tied": True},
        }

    def rows(self, p: Published) -> Iterable[Row]:
        at, ours = "perceiver.", "backbone.stages.0.0"
        yield Row(f"{at}input_preprocessor.embeddings.weight", "modality.code.weight")
        yield Row(f"{at}input_preprocessor.position_embeddings.weight", "modality.place.weight")
        yield Row(f"{at}embeddings.latents", f"{ours}.latents")
        yield Row(f"{at}decoder.output_position_encodings.position_embeddings", f"{ours}.queries")
        yield Row("embedding_decoder.bias", "head.linear.bias")
        reads = (("encoder.cross_attention", "read.0"), ("decoder.decoding_cross_attention", "ask"))
        layers = [
            (f"encoder.self_attends.{i}", f"inner.parts.{i}") for i in range(p.get("num_self_attends_per_block", 26))
        ]
        for pairs, parts in ((reads, PARTS), (layers, BLOCK)):
            for theirs, mine in pairs:
                for a, b in parts.items():
                    for kind in ("weight", "bias"):
                        yield Row(f"{at}{theirs}.{a}.{kind}", f"{ours}.{mine}.{b}.{kind}")
