"""Sequences that lie on several ranks: who holds what, how states travel, and the loss that trains on them."""

from mmlong.parallel.exchange import Chain
from mmlong.parallel.experts import (
    clip_grad_norm_over_ranks,
    expert_parallel,
    leave_experts_to_their_ranks,
    own_expert_names,
    whole_experts,
)
from mmlong.parallel.layers import layered_loss, over_ranks, parallel_form
from mmlong.parallel.loss import sequence_parallel_loss
from mmlong.parallel.mesh import SequenceMesh, check_ranks, piece_bounds, rows_of, take_piece

__all__ = [
    "Chain",
    "SequenceMesh",
    "check_ranks",
    "clip_grad_norm_over_ranks",
    "expert_parallel",
    "layered_loss",
    "leave_experts_to_their_ranks",
    "over_ranks",
    "own_expert_names",
    "parallel_form",
    "piece_bounds",
    "rows_of",
    "sequence_parallel_loss",
    "take_piece",
    "whole_experts",
]
