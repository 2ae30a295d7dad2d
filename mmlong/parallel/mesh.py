"""Which rank holds what: ranks in rows and columns, data x sequence.

Of ``world`` ranks every ``sequence`` neighbours hold one batch together, each a piece of every sequence; the ``world / sequence`` such groups hold different batches, as data parallelism does.
Neighbours, because states go along the sequence at every step and machines are usually filled one after another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmlong.layout import Layout


class SequenceMesh:
    """This rank's place among all of them. Needs an initialised default process group.

    Args:
        sequence: ranks that share a sequence, dividing the number of ranks.
        device_type: ``cpu`` or ``cuda``.
        rows: how many rows of a batch go through the ranks of a sequence together.
        layers: run every layer on all pieces at once instead; see :mod:`mmlong.parallel.layers`.

    Attributes:
        mesh: torch's device mesh, with axes ``data`` and ``sequence``.
        sequence_group, data_group: process groups of the ranks that share this one's sequences, and of those that hold the same piece of other sequences.
        sequence_rank, sequence_size: which piece of how many.
        data_rank, data_size: which batch of how many.

    Raises:
        ValueError: ``sequence`` does not divide the number of ranks.
    """

    def __init__(self, sequence: int, device_type: str = "cpu", rows: int = 1, layers: bool = False) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        world = dist.get_world_size()
        check_ranks(sequence, world)
        self.rows, self.layers = rows, layers
        self.mesh = init_device_mesh(device_type, (world // sequence, sequence), mesh_dim_names=("data", "sequence"))
        self.sequence_group = self.mesh.get_group("sequence")
        self.data_group = self.mesh.get_group("data")
        self.sequence_rank, self.sequence_size = self.mesh.get_local_rank("sequence"), sequence
        self.data_rank, self.data_size = self.mesh.get_local_rank("data"), world // sequence

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceMesh:
        # Averaged weights are kept in a deep copy of the task; process groups belong to the process.
        return self


def check_ranks(sequence: int, world: int) -> None:
    """Raise ``ValueError`` unless ``sequence`` ranks a sequence divide ``world`` ranks."""
    if sequence < 1 or world % sequence:
        raise ValueError(
            f"{world} ranks cannot be shared out in groups of sequence_ranks = {sequence}: it must divide trainer.devices x trainer.num_nodes"
        )


def piece_bounds(length: int, size: int, rank: int) -> tuple[int, int]:
    """Where a rank's piece of ``length`` positions begins and ends: ``ceil(length / size)`` each; the last ones may be shorter, or empty."""
    share = -(-length // size)
    return min(rank * share, length), min((rank + 1) * share, length)


def take_piece(inputs: list[Tensor], layout: Layout | None, size: int, rank: int) -> tuple[list[Tensor], Layout | None]:
    """A rank's piece of inputs ``(B, L, ...)`` that every rank has whole, and its layout."""
    start, stop = piece_bounds(inputs[0].shape[1], size, rank)
    return [t[:, start:stop] for t in inputs], None if layout is None else layout.slice(start, stop)


def rows_of(layout: Layout | None, start: int, stop: int) -> Layout | None:
    """The layout of some rows of a batch."""
    if layout is None:
        return None
    positions = layout.positions
    return replace(
        layout,
        lengths=None if layout.lengths is None else layout.lengths[start:stop],
        resets=None if layout.resets is None else layout.resets[start:stop],
        positions=positions if positions is None or len(positions) == 1 else positions[start:stop],
    )
