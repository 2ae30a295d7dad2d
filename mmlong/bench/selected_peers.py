"""Other people's modules of attention that the data selects: hashed, routed and sorted.

Two-sided, since there ours are the papers'; causal, ours let nothing of the future in, which theirs do. What they select is random or learned, and what fills up their last chunk takes part in it, so two sides are not the same function at any length;
the tests hold ours to theirs where they are, with what selects handed over. Sizes are the same. See :mod:`mmlong.bench.peer`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmlong.bench.peer import Pair, copy_weights, like, register_peer
from mmlong.mixers import create_mixer

LONGEST = 65_536
"""Tokens that a peer with a table of a fixed size is built for."""


def filled(run: Any, multiple: int) -> Any:
    """``run`` on sequences filled up with zeros to a multiple."""

    def call(x: Tensor) -> Tensor:
        y: Tensor = run(nn.functional.pad(x, (0, 0, 0, -x.shape[1] % multiple)))
        return y[:, : x.shape[1]]

    return call


REFORMER = {
    "mixer": "reformer",
    # As the published codes have it.
    "options": {"across_buckets": True},
    "direction": "both",
    "same": False,
}


@register_peer(
    "reformer-transformers",
    package="transformers",
    module="transformers",
    title="transformers Reformer LSHSelfAttention",
    **REFORMER,
)
def _reformer(dim: int, options: dict[str, Any]) -> Pair:
    """Its buckets for the length it meets first, which are as many as ours."""
    from transformers.models.reformer import modeling_reformer as code

    ours: Any = create_mixer("reformer", dim, causal=False, **options)
    config = code.ReformerConfig(
        hidden_size=dim, num_attention_heads=ours.heads, attention_head_size=ours.head_dim, num_hashes=ours.rounds,
        lsh_attn_chunk_length=ours.chunk, lsh_num_chunks_before=1, lsh_num_chunks_after=0, num_buckets=ours.buckets,
        is_decoder=False, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    class Theirs(nn.Module):
        """With the last projection, which is a module of its own there."""

        def __init__(self) -> None:
            super().__init__()
            self.attend: Any = code.LSHSelfAttention(config)
            self.out = like(ours.out_proj)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.attend(x).hidden_states)
            return y

    theirs: Any = Theirs()
    copy_weights(
        [
            (theirs.attend.query_key.weight, ours.qk_proj.weight),
            (theirs.attend.value.weight, ours.v_proj.weight),
            (theirs.out.weight, ours.out_proj.weight),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], filled(theirs, ours.chunk))


@register_peer(
    "reformer-pytorch",
    package="reformer-pytorch",
    module="reformer_pytorch",
    title="reformer-pytorch LSHSelfAttention",
    **REFORMER,
)
def _reformer_pytorch(dim: int, options: dict[str, Any]) -> Pair:
    """One hash tells all of its buckets apart, half as many as ours."""
    from reformer_pytorch.reformer_pytorch import LSHSelfAttention

    ours: Any = create_mixer("reformer", dim, causal=False, **options)
    theirs: Any = LSHSelfAttention(dim, ours.heads, bucket_size=ours.chunk, n_hashes=ours.rounds)
    copy_weights(
        [
            (theirs.toqk.weight, ours.qk_proj.weight),
            (theirs.tov.weight, ours.v_proj.weight),
            (theirs.to_out.weight, ours.out_proj.weight),
        ]
    )
    return Pair(ours, theirs, lambda x: ours(x)[0], filled(theirs, 2 * ours.chunk))


@register_peer(
    "routing-transformer",
    mixer="routing",
    package="routing-transformer",
    module="routing_transformer",
    title="routing-transformer SelfAttention",
    options={"clusters": 256, "window": 256},
    direction="both",
    same=False,
)
def _routing_transformer(dim: int, options: dict[str, Any]) -> Pair:
    """Its local heads see their block of ``window`` and the two beside it, with relative positions; its queries and keys are not normalised."""
    from routing_transformer.routing_transformer import SelfAttention

    ours: Any = create_mixer("routing", dim, causal=False, **options)
    theirs: Any = SelfAttention(
        dim, 1, max(LONGEST, ours.clusters * ours.window), ours.heads, ours.local_heads, ours.window
    )
    if theirs.global_attn.num_clusters == ours.clusters:
        copy_weights([(theirs.global_attn.kmeans.means, ours.centroids.means)])
        theirs.global_attn.kmeans.initted.fill_(True)
    return Pair(ours, theirs, lambda x: ours(x)[0], filled(lambda x: theirs(x)[0], ours.window))


@register_peer(
    "sinkhorn-transformer",
    mixer="sinkhorn",
    package="sinkhorn-transformer",
    module="sinkhorn_transformer",
    title="sinkhorn-transformer SinkhornSelfAttention",
    options={"block": 256},
    direction="both",
    same=False,
)
def _sinkhorn_transformer(dim: int, options: dict[str, Any]) -> Pair:
    """The paper's balancing (its default takes the best block in place of it), with noise in eval too; it sorts keys where it should sort values."""
    from sinkhorn_transformer.sinkhorn_transformer import SinkhornSelfAttention

    ours: Any = create_mixer("sinkhorn", dim, causal=False, **options)
    theirs: Any = SinkhornSelfAttention(
        dim, ours.block, LONGEST, ours.heads, dim_head=ours.head_dim, non_permutative=False,
        sinkhorn_iter=ours.iterations, temperature=ours.temperature,
    )  # fmt: skip
    return Pair(ours, theirs, lambda x: ours(x)[0], filled(theirs, ours.block))
