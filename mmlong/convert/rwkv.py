"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): time mixing and channel mixing, each a block of ours without a feed-forward.

``rescale_every``, by which ``transformers`` halves activations and weights now and then in half precision, changes nothing but what the norms' epsilon weighs, and is not done here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mmlong.convert.contract import Converter, Published, causal_config, register_converter
from mmlong.convert.table import ROW, Row
from mmlong.models import Config


@register_converter("rwkv")
class RWKV(Converter):
    """``RwkvForCausalLM``."""

    reads = "RWKV-4"
    note = "exact up to rescale_every, which halves activations at inference and is not done here (the norms' epsilon feels it)"
    prefix = "rwkv."
    kinds = ("autoregressive", "plain")

    def config(self, p: Published, kind: str) -> Config:
        dim = p["hidden_size"]
        p.must("attention_hidden_size", dim, "time mixing is as wide as the tokens")
        backbone = {
            "dim": dim,
            "depth": 2 * p["num_hidden_layers"],
            "mixers": [
                {"name": "rwkv4"},
                {"name": "rwkv4_channel", "ratio": p.get("intermediate_size", 4 * dim) / dim},
            ],
            "ffn": "none",
            "norm_eps": p.get("layer_norm_epsilon", 1e-5),
            "norm_in": True,
        }
        return causal_config(p, kind, p.get("bos_token_id", None), {}, backbone, {"tied": self.tied(p)})

    def tied(self, p: Published) -> bool:
        """Whether the head is the table of codes."""
        return bool(p.get("tie_word_embeddings", False))

    def rows(self, p: Published) -> Iterable[Row]:
        yield Row("rwkv.embeddings.weight", "modality.code.weight")
        for kind in ("weight", "bias"):
            yield Row(f"rwkv.blocks.0.pre_ln.{kind}", f"backbone.norm_in.{kind}")
            yield Row(f"rwkv.ln_out.{kind}", f"backbone.norm.{kind}")
        for i in range(p["num_hidden_layers"]):
            theirs = f"rwkv.blocks.{i}"
            mixes = (
                ("ln1", "attention", ("receptance", "key", "value")),
                ("ln2", "feed_forward", ("receptance", "key")),
            )
            for j, (norm, part, shifted) in enumerate(mixes):
                ours = f"backbone.stages.0.{2 * i + j}"
                yield from (Row(f"{theirs}.{norm}.{kind}", f"{ours}.norm1.{kind}") for kind in ("weight", "bias"))
                a, b = f"{theirs}.{part}", f"{ours}.mixer"
                yield Row(tuple(f"{a}.time_mix_{name}" for name in shifted), f"{b}.shift", ROW)
                for name in ("receptance", "key", "value"):
                    yield Row(f"{a}.{name}.weight", f"{b}.{name[0]}_proj.weight")
            a, b = f"{theirs}.attention", f"backbone.stages.0.{2 * i}.mixer"
            yield Row(f"{a}.time_decay", f"{b}.decay")
            yield Row(f"{a}.time_first", f"{b}.bonus")
            yield Row(f"{a}.output.weight", f"{b}.out_proj.weight")
        if not self.tied(p):
            yield Row("head.weight", "head.linear.weight")

    def same(self, p: Published) -> Mapping[str, str]:
        return {"head.weight": "rwkv.embeddings.weight"} if self.tied(p) else {}
