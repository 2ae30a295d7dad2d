"""Other people's modules of recurrent mechanisms: gated linear attention, delta rules, diagonal recurrences.

They are the modules that the tests hold ours against, as wide as a benchmark wants them, weights copied across. See :mod:`mmlong.bench.peer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.bench.peer import Pair, Projected, copy_weights, register_peer
from mmlong.mixers import create_mixer

TRANSFORMERS = {"package": "transformers", "module": "transformers"}


def in_torch(code: Any, *functions: str) -> None:
    """Let a module of transformers call its own torch code, in place of kernels that need a GPU, should their package be installed."""
    for name in functions:
        setattr(code, name, inspect.unwrap(getattr(code, name)))


@register_peer(
    "linear-attention-transformer",
    mixer="linear_transformer",
    package="linear-attention-transformer",
    module="linear_attention_transformer",
    title="linear-attention-transformer SelfAttention",
    options={},
    same=False,
)
def _linear_attention_transformer(dim: int, options: dict[str, Any]) -> Pair:
    """Normalised linear attention with other features (a softmax over a query's channels, the exponentials of keys), every token from those before it."""
    from linear_attention_transformer.linear_attention_transformer import SelfAttention

    ours: Any = create_mixer("linear_transformer", dim, **options)
    theirs: Any = SelfAttention(dim, ours.heads, causal=True)
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


def _performer(causal: bool) -> Callable[[int, dict[str, Any]], Pair]:
    """The same drawn features; its constant in them is 0, as ours is."""

    def build(dim: int, options: dict[str, Any]) -> Pair:
        from performer_pytorch import performer_pytorch as code

        ours: Any = create_mixer("performer", dim, causal=causal, **options)
        projection = ours.projection

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (
                code.softmax_kernel(t, projection_matrix=projection.to(t.device), is_query=query, eps=0)
                for t, query in ((q, True), (k, False))
            )
            y: Tensor = (
                code.causal_linear_attention_noncuda(q, k, v, eps=0) if causal else code.linear_attention(q, k, v)
            )
            return y

        theirs = Projected(ours, attend)
        return Pair(ours, theirs, lambda x: ours(x)[0], theirs)

    return build


PERFORMER = {"mixer": "performer", "package": "performer-pytorch", "module": "performer_pytorch", "options": {}}
register_peer("performer-pytorch", title="performer-pytorch FastAttention", **PERFORMER)(_performer(True))
register_peer(
    "performer-pytorch-two-sided", title="performer-pytorch FastAttention, two-sided", direction="both", **PERFORMER
)(_performer(False))


@register_peer("minimax", mixer="lightning", title="transformers MiniMaxLightningAttention", options={}, **TRANSFORMERS)
def _minimax(dim: int, options: dict[str, Any]) -> Pair:
    """The first of two layers."""
    from transformers.models.minimax import modeling_minimax as code

    ours: Any = create_mixer("lightning", dim, **{"depth": 0.0, "norm_eps": 1e-6, **options})
    heads = ours.heads
    config = code.MiniMaxConfig(hidden_size=dim, num_attention_heads=heads, num_hidden_layers=2, head_dim=dim // heads)
    theirs: Any = code.MiniMaxLightningAttention(config, 0)
    parts = [p.weight.view(heads, -1, dim) for p in (ours.q_proj, ours.k_proj, ours.v_proj)]
    copy_weights(
        [
            (theirs.qkv_proj.weight, torch.cat(parts, 1).flatten(0, 1)),
            (theirs.output_gate.weight, ours.gate_proj.weight),
            (theirs.out_proj.weight, ours.out_proj.weight),
            (theirs.norm.weight, ours.norm_weight),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], lambda x: theirs(x, None, None)[0])


@register_peer("xlstm", mixer="mlstm", title="transformers xLSTMLayer", options={}, **TRANSFORMERS)
def _xlstm(dim: int, options: dict[str, Any]) -> Pair:
    """Its chunked torch path; rows are filled up to whole chunks."""
    from transformers.models.xlstm import modeling_xlstm as code

    ours: Any = create_mixer("mlstm", dim, **options)
    config = code.xLSTMConfig(
        hidden_size=dim, num_heads=ours.heads, num_hidden_layers=1, weight_mode="single", norm_eps=ours.norm_eps,
        chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native",
        mode="train", autocast_kernel_dtype="float32", return_last_states=True,
    )  # fmt: skip
    theirs: Any = code.xLSTMLayer(config)
    names = {
        "q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "output_gate", "igate_preact": "input_gate",
        "fgate_preact": "forget_gate", "out_proj": "out_proj",
    }  # fmt: skip
    for other, mine in names.items():
        pairs = zip(getattr(theirs, other).parameters(), getattr(ours, mine).parameters(), strict=True)
        copy_weights(list(pairs))
    copy_weights([(theirs.multihead_norm.weight, ours.norm_weight)])

    def run_theirs(x: Tensor) -> Tensor:
        short = -x.shape[1] % config.chunk_size
        y: Tensor = theirs(nn.functional.pad(x, (0, 0, 0, short)))[0]
        return y[:, : x.shape[1]]

    return Pair(ours, theirs, lambda x: ours(x)[0], run_theirs)


@register_peer(
    "qwen3-next", mixer="gated_deltanet", title="transformers Qwen3NextGatedDeltaNet", options={}, **TRANSFORMERS
)
def _qwen3_next(dim: int, options: dict[str, Any]) -> Pair:
    """Its torch path."""
    from transformers.models.qwen3_next import modeling_qwen3_next as code

    in_torch(code, "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    ours: Any = create_mixer("gated_deltanet", dim, **options)
    H = ours.heads
    config = code.Qwen3NextConfig(
        hidden_size=dim, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=ours.N,
        linear_value_head_dim=ours.P, linear_conv_kernel_dim=ours.d_conv, rms_norm_eps=ours.norm_eps,
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs: Any = code.Qwen3NextGatedDeltaNet(config, layer_idx=0)

    def heads_together(*parts: Tensor) -> Tensor:
        """Theirs lists a head's queries, keys, values and gates, then the next head's."""
        return torch.cat([t.unflatten(0, (H, -1)) for t in parts], 1).flatten(0, 1)

    q, k, v = ours.qkv_proj.weight.split([ours.keys, ours.keys, ours.values])
    copy_weights(
        [
            (theirs.in_proj_qkvz.weight, heads_together(q, k, v, ours.gate_proj.weight)),
            (theirs.in_proj_ba.weight, heads_together(ours.beta_proj.weight, ours.decay_proj.weight)),
            (theirs.conv1d.weight, ours.conv_weight[:, None]),
            (theirs.dt_bias, ours.dt_bias),
            (theirs.A_log, ours.A_log),
            (theirs.norm.weight, ours.norm_weight),
            (theirs.out_proj.weight, ours.out_proj.weight),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer("kimi-linear", mixer="kda", title="transformers KimiLinearDeltaAttention", options={}, **TRANSFORMERS)
def _kimi_linear(dim: int, options: dict[str, Any]) -> Pair:
    """Its torch path."""
    from transformers.models.kimi_linear import modeling_kimi_linear as code

    in_torch(code, "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    ours: Any = create_mixer("kda", dim, **options)
    config = code.KimiLinearConfig(
        hidden_size=dim, linear_num_heads=ours.heads, linear_head_dim=ours.N, linear_conv_kernel_dim=ours.d_conv,
        rms_norm_eps=ours.norm_eps, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs: Any = code.KimiLinearDeltaAttention(config, layer_idx=0)
    q, k, v = ours.qkv_proj.weight.split([ours.keys, ours.keys, ours.values])
    copy_weights(
        [
            (theirs.q_proj.weight, q),
            (theirs.k_proj.weight, k),
            (theirs.v_proj.weight, v),
            (theirs.b_proj.weight, ours.beta_proj.weight),
            (theirs.forget_gate.f_a_proj.weight, ours.decay_down.weight),
            (theirs.forget_gate.f_b_proj.weight, ours.decay_up.weight),
            (theirs.g_a_proj.weight, ours.gate_down.weight),
            (theirs.g_b_proj.weight, ours.gate_up.weight),
            (theirs.o_proj.weight, ours.out_proj.weight),
            (theirs.conv1d.weight, ours.conv_weight[:, None]),
            (theirs.forget_gate.dt_bias, ours.dt_bias),
            (theirs.forget_gate.A_log, ours.A_log.view(1, 1, -1, 1)),
            (theirs.o_norm.weight, ours.norm_weight),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer("mambapy", mixer="mamba", package="mambapy", module="mambapy", title="mambapy MambaBlock", options={})
def _mambapy(dim: int, options: dict[str, Any]) -> Pair:
    """Its parallel scan."""
    from mambapy.mamba import MambaBlock, MambaConfig

    ours: Any = create_mixer("mamba", dim, **options)
    theirs: Any = MambaBlock(MambaConfig(d_model=dim, n_layers=1, dt_rank=ours.dt_rank))
    copy_weights(
        [
            *[
                (getattr(theirs, name).weight, getattr(ours, name).weight)
                for name in ("in_proj", "x_proj", "out_proj", "dt_proj")
            ],
            (theirs.dt_proj.bias, ours.dt_bias),
            (theirs.conv1d.weight, ours.conv_weight[:, None]),
            (theirs.conv1d.bias, ours.conv_bias),
            (theirs.A_log, ours.A_log),
            (theirs.D, ours.D),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer(
    "s5-pytorch", mixer="s5", package="s5-pytorch", module="s5", title="s5-pytorch S5", options={}, same=False
)
def _s5(dim: int, options: dict[str, Any]) -> Pair:
    """The same mechanism by an associative scan, with weights of its own and no layer after it, which ours has."""
    from s5 import S5

    ours: Any = create_mixer("s5", dim, **options)
    theirs: Any = S5(dim)
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)
