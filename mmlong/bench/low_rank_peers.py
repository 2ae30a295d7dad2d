"""Other people's modules of low-rank and fixed mixing: landmarks, projections along the sequence, Fourier transforms.

They are the modules that the tests hold ours against, as wide as a benchmark wants them, weights copied across. See :mod:`mmlong.bench.peer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.bench.peer import Pair, copy_weights, register_peer
from mmlong.mixers import create_mixer

TRANSFORMERS = {"package": "transformers", "module": "transformers"}


@register_peer(
    "nystrom-attention",
    mixer="nystromformer",
    package="nystrom-attention",
    module="nystrom_attention",
    title="nystrom-attention NystromAttention",
    options={},
    direction="both",
    same=False,
)
def _nystrom_attention(dim: int, options: dict[str, Any]) -> Pair:
    """The same, but for the first matrix of its iteration, which it divides by the largest norms of all heads and rows, and lengths that its landmarks do not divide, which it fills up with zeros."""
    from nystrom_attention import NystromAttention

    ours: Any = create_mixer("nystromformer", dim, causal=False, **options)
    taps = ours.kernel_size
    theirs: Any = NystromAttention(
        dim, dim_head=ours.head_dim, heads=ours.heads, num_landmarks=ours.landmarks, pinv_iterations=ours.steps,
        residual=taps is not None, residual_conv_kernel=taps or 33,
    )  # fmt: skip
    copy_weights(
        [
            (theirs.to_qkv.weight, torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)])),
            (theirs.to_out[0].weight, ours.out_proj.weight),
            (theirs.to_out[0].bias, torch.zeros(dim)),
        ]
    )
    if taps is not None:
        copy_weights([(theirs.res_conv.weight, ours.conv_weight[:, None, :, None])])
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer(
    "nystromformer",
    mixer="nystromformer",
    title="transformers NystromformerSelfAttention",
    options={},
    direction="both",
    # Landmarks of 262,144 tokens are averages that hardly differ, and the inverse of their weights enlarges what two orders of summation differ by.
    tolerance=5e-3,
    **TRANSFORMERS,
)
def _nystromformer(dim: int, options: dict[str, Any]) -> Pair:
    """The same where the landmarks divide the length (others are filled up with zeros), its iteration begun with each head's own norm; it has no last projection."""
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerConfig, NystromformerSelfAttention

    ours: Any = create_mixer("nystromformer", dim, causal=False, **options)
    config = NystromformerConfig(
        hidden_size=dim, num_attention_heads=ours.heads, num_landmarks=ours.landmarks,
        conv_kernel_size=ours.kernel_size, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs: Any = NystromformerSelfAttention(config)
    theirs.init_option = "exact"
    for mine, other in ((theirs.query, ours.q_proj), (theirs.key, ours.k_proj), (theirs.value, ours.v_proj)):
        copy_weights([(mine.weight, other.weight), (mine.bias, torch.zeros(dim))])
    if ours.kernel_size is not None:
        copy_weights([(theirs.conv.weight, ours.conv_weight[:, None, :, None])])
    with torch.no_grad():
        # Ours does this product too; with the unit matrix it changes nothing.
        ours.out_proj.weight.copy_(torch.eye(dim))

    def run_theirs(x: Tensor) -> Tensor:
        # It is told the length, and that there are as many landmarks as tokens where there would be more.
        L = x.shape[1]
        theirs.num_landmarks = min(ours.landmarks, L)
        x = nn.functional.pad(x, (0, 0, 0, -L % theirs.num_landmarks))
        theirs.seq_len = x.shape[1]
        y: Tensor = theirs(x)[0]
        return y[:, :L]

    return Pair(ours, theirs, lambda x: ours(x)[0], run_theirs)


@register_peer(
    "linformer",
    mixer="linformer",
    package="linformer",
    module="linformer",
    title="linformer LinformerSelfAttention",
    options={"max_length": 1 << 16},
    direction="both",
)
def _linformer(dim: int, options: dict[str, Any]) -> Pair:
    """Heads share the matrices, as ours do by default; documents up to 65,536 tokens, unless an option says otherwise."""
    from linformer.linformer import LinformerSelfAttention

    ours: Any = create_mixer("linformer", dim, causal=False, **options)
    theirs: Any = LinformerSelfAttention(dim, ours.max_length, k=ours.rank, heads=ours.heads, dim_head=ours.head_dim)
    copy_weights(
        [
            (theirs.to_q.weight, ours.q_proj.weight),
            (theirs.to_k.weight, ours.k_proj.weight),
            (theirs.to_v.weight, ours.v_proj.weight),
            (theirs.to_out.weight, ours.out_proj.weight),
            (theirs.to_out.bias, torch.zeros(dim)),
            (theirs.proj_k, ours.E.mT),
            (theirs.proj_v, ours.F.mT),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], theirs)


@register_peer(
    "fnet",
    mixer="fnet",
    title="transformers FNetBasicFourierTransform",
    options={"norm": "backward"},
    direction="both",
    **TRANSFORMERS,
)
def _fnet(dim: int, options: dict[str, Any]) -> Pair:
    """Its FFT; there are no weights."""
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform, FNetConfig

    ours: Any = create_mixer("fnet", dim, causal=False, **options)
    theirs: Any = FNetBasicFourierTransform(FNetConfig(hidden_size=dim))
    return Pair(ours, theirs, lambda x: ours(x)[0], lambda x: theirs(x)[0])
