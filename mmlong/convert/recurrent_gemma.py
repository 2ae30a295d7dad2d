"""RecurrentGemma (De et al. 2024, "Griffin", arXiv 2402.19427; Botev et al. 2024, arXiv 2404.07839): RG-LRU blocks and local attention, two to one.

Embeddings are multiplied by the root of the width, rounded to bfloat16 as theirs is; the window counts a token itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from mmlong.convert.contract import Converter, ConvertError, Published, causal_config, register_converter
from mmlong.convert.table import TAPS, Row
from mmlong.models import Config


@register_converter("recurrent_gemma")
class RecurrentGemma(Converter):
    """``RecurrentGemmaForCausalLM``."""

    reads = "RecurrentGemma"
    note = "exact"
    prefix = "model."
    kinds = ("autoregressive", "plain")

    def config(self, p: Published, kind: str) -> Config:
        dim = p["hidden_size"]
        width = p.get("intermediate_size", 3 * dim) // 2
        backbone = {
            "dim": dim,
            "depth": p["num_hidden_layers"],
            "mixers": [self.mixer(p, recurrent) for recurrent in self.recurrent(p)],
            "ffn": {"name": "glu", "activation": p.activation("hidden_activation", "gelu_pytorch_tanh")},
            "ffn_ratio": width / dim,
            "norm": "rms_offset",
            "norm_eps": p.get("rms_norm_eps", 1e-6),
        }
        scale = float(torch.tensor(dim**0.5, dtype=torch.bfloat16))
        head = {"tied": self.tied(p), "softcap": p.get("logits_soft_cap", 30.0)}
        return causal_config(p, kind, p.get("bos_token_id", None), {"scale": scale}, backbone, head)

    def recurrent(self, p: Published) -> list[bool]:
        """Of each layer, whether it is recurrent.

        Raises:
            ConvertError: a third kind of layer.
        """
        kinds = p.get("block_types", ["recurrent", "recurrent", "attention"])
        if odd := sorted(set(kinds) - {"recurrent", "attention"}):
            raise ConvertError(f"config.json: block_types has {odd[0]!r}; known are recurrent and attention")
        depth = p["num_hidden_layers"]
        return [kind == "recurrent" for kind in (kinds * depth)[:depth]]

    def mixer(self, p: Published, recurrent: bool) -> dict[str, Any]:
        """The mixer's name and options."""
        dim, heads = p["hidden_size"], p["num_attention_heads"]
        if recurrent:
            return {
                "name": "rg_lru",
                "expand": p.get("lru_width", dim) / dim,
                "blocks": heads,
                "d_conv": p.get("conv1d_width", 4),
                "bias": True,
                "activation": p.activation("hidden_activation", "gelu_pytorch_tanh"),
            }
        rope = p.get("rope_parameters", {})
        if rope.get("rope_type", "default") != "default":
            raise ConvertError(f"config.json: rope_type is {rope['rope_type']!r}, and only 'default' can be converted")
        # Older files have both beside.
        base = rope.get("rope_theta", p.get("rope_theta", 10000.0))
        fraction = rope.get("partial_rotary_factor", p.get("partial_rotary_factor", 0.5))
        return {
            "name": "local",
            "window": p.get("attention_window_size", 2048) - 1,
            "heads": heads,
            "kv_heads": p.get("num_key_value_heads", heads),
            "head_dim": p.get("head_dim", dim // heads),
            "position_options": {"base": base, "fraction": fraction},
            "bias": p.get("attention_bias", False),
            "out_bias": True,
        }

    def tied(self, p: Published) -> bool:
        """Whether the head is the table of codes."""
        return bool(p.get("tie_word_embeddings", True))

    def rows(self, p: Published) -> Iterable[Row]:
        yield Row("model.embed_tokens.weight", "modality.code.weight")
        for i, recurrent in enumerate(self.recurrent(p)):
            theirs, ours = f"model.layers.{i}", f"backbone.stages.0.{i}"
            yield Row(f"{theirs}.temporal_pre_norm.weight", f"{ours}.norm1.weight")
            yield Row(f"{theirs}.channel_pre_norm.weight", f"{ours}.norm2.weight")
            block = f"{theirs}.temporal_block"
            if recurrent:
                yield from self.recurrent_rows(block, f"{ours}.mixer")
            else:
                kinds = ("weight", "bias") if p.get("attention_bias", False) else ("weight",)
                for name in "qkv":
                    for kind in kinds:
                        yield Row(f"{block}.{name}_proj.{kind}", f"{ours}.mixer.{name}_proj.{kind}")
                for kind in ("weight", "bias"):
                    yield Row(f"{block}.o_proj.{kind}", f"{ours}.mixer.out_proj.{kind}")
            for kind in ("weight", "bias"):
                gates = (f"{theirs}.mlp_block.gate_proj.{kind}", f"{theirs}.mlp_block.up_proj.{kind}")
                yield Row(gates, f"{ours}.ffn.w_in.{kind}")
                yield Row(f"{theirs}.mlp_block.down_proj.{kind}", f"{ours}.ffn.w_out.{kind}")
        yield Row("model.final_norm.weight", "backbone.norm.weight")
        if not self.tied(p):
            yield Row("lm_head.weight", "head.linear.weight")

    def recurrent_rows(self, theirs: str, ours: str) -> Iterator[Row]:
        """Of one recurrent block."""
        for kind in ("weight", "bias"):
            yield Row((f"{theirs}.linear_y.{kind}", f"{theirs}.linear_x.{kind}"), f"{ours}.in_proj.{kind}")
            yield Row(f"{theirs}.linear_out.{kind}", f"{ours}.out_proj.{kind}")
            gates = (f"{theirs}.rg_lru.recurrent_gate_{kind}", f"{theirs}.rg_lru.input_gate_{kind}")
            yield Row(gates, f"{ours}.gate_{kind}", axis=-1)
        yield Row(f"{theirs}.conv_1d.weight", f"{ours}.conv_weight", TAPS)
        yield Row(f"{theirs}.conv_1d.bias", f"{ours}.conv_bias")
        yield Row(f"{theirs}.rg_lru.recurrent_param", f"{ours}.Lambda")

    def same(self, p: Published) -> Mapping[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.tied(p) else {}
