"""xLSTM-7B (Beck et al. 2025, arXiv 2503.13427): mLSTM layers and SwiGLU, RMSNorm, capped logits.

Both of its ``weight_mode`` are read. Gates are capped at 15, which is what :mod:`mmlong.mixers.mlstm` has; another bound is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from mmlong.convert.contract import Converter, ConvertError, Published, causal_config, register_converter
from mmlong.convert.table import Row
from mmlong.mixers.mlstm import CAP, EPS
from mmlong.models import Config

GATES = (("igate_preact", "input_gate"), ("fgate_preact", "forget_gate"))
HEADS = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("ogate_preact", "output_gate"))


@register_converter("xlstm")
class XLSTM(Converter):
    """``xLSTMForCausalLM``."""

    reads = "xLSTM (mLSTM layers)"
    note = "exact; theirs runs its recurrence in autocast_kernel_dtype, bfloat16 by default"
    prefix = "backbone."
    kinds = ("autoregressive", "plain")

    def config(self, p: Published, kind: str) -> Config:
        p.must("use_bias", False, "projections are without biases")
        p.must("gate_soft_cap", CAP, "gates are capped")
        p.must("eps", EPS, "so much is added to the denominator")
        p.must("add_out_norm", True, "there is a norm behind the last block")
        dim = p["hidden_size"]
        p.must("embedding_dim", dim, "tokens are as wide as the blocks")
        if p.get("weight_mode", "single") not in ("single", "fused"):
            raise ConvertError(f"config.json: weight_mode is {p['weight_mode']!r}; known are single and fused")
        step = p.get("ffn_round_up_to_multiple_of", 64)
        hidden = int(-(-dim * p.get("ffn_proj_factor", 2.667) // step) * step)
        eps = p.get("norm_eps", 1e-6)
        keys, values = p.get("qk_dim_factor", 0.5), p.get("v_dim_factor", 1.0)
        mixer = {"name": "mlstm", "heads": p["num_heads"], "expand_k": keys, "expand_v": values, "norm_eps": eps}
        backbone = {
            "dim": dim,
            "depth": p.get("num_hidden_layers", p.get("num_blocks", None)),
            "mixers": [mixer],
            "ffn": {"name": "swiglu", "bias": False}
            if hidden % 8 == 0
            else {"name": "glu", "activation": "silu", "bias": False},
            "ffn_ratio": hidden / dim,
            "norm": "rms",
            "norm_eps": eps,
        }
        head = {"tied": self.tied(p), "softcap": p.get("output_logit_soft_cap", 30.0)}
        return causal_config(p, kind, p.get("bos_token_id", None), {}, backbone, head)

    def tied(self, p: Published) -> bool:
        """Whether the head is the table of codes."""
        return bool(p.get("tie_word_embeddings", False))

    def rows(self, p: Published) -> Iterable[Row]:
        yield Row("backbone.embeddings.weight", "modality.code.weight")
        fused = p.get("weight_mode", "single") == "fused"
        for i in range(p.get("num_hidden_layers", p.get("num_blocks", None))):
            theirs, ours = f"backbone.blocks.{i}", f"backbone.stages.0.{i}"
            yield Row(f"{theirs}.norm_mlstm.weight", f"{ours}.norm1.weight")
            yield Row(f"{theirs}.norm_ffn.weight", f"{ours}.norm2.weight")
            yield from _fused_rows(theirs, ours) if fused else _single_rows(theirs, ours)
            yield Row(f"{theirs}.mlstm_layer.multihead_norm.weight", f"{ours}.mixer.norm_weight")
            yield Row(f"{theirs}.mlstm_layer.out_proj.weight", f"{ours}.mixer.out_proj.weight")
            yield Row(f"{theirs}.ffn.proj_down.weight", f"{ours}.ffn.w_out.weight")
        yield Row("backbone.out_norm.weight", "backbone.norm.weight")
        if not self.tied(p):
            yield Row("lm_head.weight", "head.linear.weight")

    def same(self, p: Published) -> Mapping[str, str]:
        return {"lm_head.weight": "backbone.embeddings.weight"} if self.tied(p) else {}


def _single_rows(theirs: str, ours: str) -> Iterator[Row]:
    for a, b in (*HEADS, *GATES):
        yield Row(f"{theirs}.mlstm_layer.{a}.weight", f"{ours}.mixer.{b}.weight")
    for a, b in GATES:
        yield Row(f"{theirs}.mlstm_layer.{a}.bias", f"{ours}.mixer.{b}.bias")
    yield Row((f"{theirs}.ffn.proj_up_gate.weight", f"{theirs}.ffn.proj_up.weight"), f"{ours}.ffn.w_in.weight")


def _fused_rows(theirs: str, ours: str) -> Iterator[Row]:
    yield Row(f"{theirs}.mlstm_layer.qkv_opreact.weight", tuple(f"{ours}.mixer.{b}.weight" for _, b in HEADS))
    for kind in ("weight", "bias"):
        yield Row(f"{theirs}.mlstm_layer.ifgate_preact.{kind}", tuple(f"{ours}.mixer.{b}.{kind}" for _, b in GATES))
    yield Row(f"{theirs}.ffn.proj_up_gate_z.weight", f"{ours}.ffn.w_in.weight")
