"""GPT-2 (Radford et al. 2019) and Image GPT (Chen et al. 2020): dense attention, learned places, GELU feed-forwards.

Nothing departs. Their attention is told by ``scale_attn_by_inverse_layer_idx`` to be another one, which is refused. Image GPT's last code says where a picture begins and is never predicted; its norms are RMSNorms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from mmlong.convert.contract import Converter, Published, causal_config, register_converter
from mmlong.convert.table import TRANSPOSED, Row
from mmlong.models import Config


@register_converter("gpt2")
class GPT2(Converter):
    """``GPT2LMHeadModel``, and ``GPT2Model``, whose head is its table of codes."""

    reads = "GPT-2"
    note = "exact; autoregressive: predictions of [bos, tokens], the bos code where ours has its start"
    prefix = "transformer."
    kinds = ("autoregressive", "plain")
    unused: ClassVar[Mapping[str, str]] = {
        "*h.*.attn.bias": "a mask that older files hold",
        "*h.*.attn.masked_bias": "a mask that older files hold",
    }
    norm: ClassVar[str] = "layer"
    gelu: ClassVar[str] = "gelu_new"

    def config(self, p: Published, kind: str) -> Config:
        return causal_config(
            p,
            kind,
            p.get("bos_token_id", None),
            {"places": p["n_positions"]},
            self.backbone(p),
            {"tied": p.get("tie_word_embeddings", True)},
        )

    def backbone(self, p: Published) -> dict[str, Any]:
        """The backbone's configuration."""
        why = "scores are divided by the root of a head's width alone"
        p.must("scale_attn_weights", True, why)
        p.must("scale_attn_by_inverse_layer_idx", False, why)
        p.must("add_cross_attention", False, "there is no other sequence to attend to")
        dim = p["n_embd"]
        return {
            "dim": dim,
            "depth": p["n_layer"],
            "mixers": [{"name": "attention", "heads": p["n_head"], "positions": "none", "bias": True}],
            "ffn": {"name": "mlp", "activation": p.activation("activation_function", self.gelu)},
            "ffn_ratio": p.get("n_inner", 4 * dim) / dim,
            "norm": self.norm,
            "norm_eps": p.get("layer_norm_epsilon", 1e-5),
        }

    def rows(self, p: Published) -> Iterable[Row]:
        yield Row("transformer.wte.weight", "modality.code.weight")
        yield Row("transformer.wpe.weight", "modality.place.weight")
        kinds = ("weight", "bias") if self.norm == "layer" else ("weight",)
        for i in range(p["n_layer"]):
            theirs, ours = f"transformer.h.{i}", f"backbone.stages.0.{i}"
            for a, b in (("ln_1", "norm1"), ("ln_2", "norm2")):
                yield from (Row(f"{theirs}.{a}.{kind}", f"{ours}.{b}.{kind}") for kind in kinds)
            heads = [f"{ours}.mixer.{name}_proj" for name in "qkv"]
            yield from _conv1d(f"{theirs}.attn.c_attn", *heads)
            yield from _conv1d(f"{theirs}.attn.c_proj", f"{ours}.mixer.out_proj")
            yield from _conv1d(f"{theirs}.mlp.c_fc", f"{ours}.ffn.0")
            yield from _conv1d(f"{theirs}.mlp.c_proj", f"{ours}.ffn.2")
        yield from (Row(f"transformer.ln_f.{kind}", f"backbone.norm.{kind}") for kind in kinds)
        if not self.tied(p):
            yield Row("lm_head.weight", "head.linear.weight")

    def tied(self, p: Published) -> bool:
        """Whether the head is the table of codes."""
        return bool(p.get("tie_word_embeddings", True))

    def same(self, p: Published) -> Mapping[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"} if self.tied(p) else {}


def _conv1d(theirs: str, *ours: str) -> Iterator[Row]:
    """Their ``Conv1D``, a linear layer with its matrix the other way round, as one or several of ours."""
    yield Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), TRANSPOSED)
    yield Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))


@register_converter("imagegpt")
class ImageGPT(GPT2):
    """``ImageGPTForCausalImageModeling``."""

    reads = "Image GPT"
    note = "exact; the code that begins a picture is special: read, never predicted"
    norm = "rms"
    gelu = "quick_gelu"

    def config(self, p: Published, kind: str) -> Config:
        p.must("tie_word_embeddings", False, "the head has a code less than the table")
        codes = p["vocab_size"] - 1
        modality = {"name": "tokens", "codes": codes, "special": 1, "places": p["n_positions"]}
        return causal_config(p, kind, codes, modality, self.backbone(p), {})

    def tied(self, p: Published) -> bool:
        return False
