"""``strategy: sequence_parallel``: Lightning's DDP in which neighbouring ranks share each sequence.

Ranks stand in rows and columns (:mod:`mmlong.parallel.mesh`). Those of one sequence get the same batch, each trains on its piece, and the loss is the same on all of them; DDP's average over all
ranks then is the sum over pieces and the average over batches, since each rank gives its part times the number of pieces. Everything else is DDP's: checkpoints by the first rank, accumulation, clipping, averaged weights, resuming. Every
rank reads the raw batch whole (bytes or samples of sound, small beside activations) and cuts its piece from the tokens.

The data must ask Lightning which batch is this rank's (``trainer.distributed_sampler_kwargs``), as mmlong's datamodules do, and the task must know of pieces: it has an attribute ``ranks``, which this sets.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from mmlong.mixers import require_streaming
from mmlong.parallel.mesh import SequenceMesh, check_ranks

NAME = "sequence_parallel"


class SequenceParallelStrategy(DDPStrategy):
    """DDP over data x sequence.

    Args:
        sequence_ranks: ranks that share a sequence, dividing the number of ranks; ``None``: all of them.
        rows: how many rows of a batch go through the ranks of a sequence together; see :func:`mmlong.parallel.sequence_parallel_loss`.
        layers: run every layer on all pieces at once, the activations of a piece kept, instead of row after row in segments; see :mod:`mmlong.parallel.layers`. Not with ``model.segment``.
        options: as for Lightning's ``DDPStrategy``.

    Raises:
        ValueError: at training, a task or model that cannot run in pieces, or a number of ranks that ``sequence_ranks`` does not divide.
    """

    strategy_name = NAME

    def __init__(self, sequence_ranks: int | None = None, rows: int = 1, layers: bool = False, **options: Any) -> None:
        if (sequence_ranks is not None and sequence_ranks < 1) or rows < 1:
            raise ValueError(f"sequence_ranks {sequence_ranks} and rows {rows} must be at least 1")
        super().__init__(**options)
        self._asked, self._rows, self._layers = sequence_ranks, rows, layers

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share a sequence."""
        return self._asked or self.num_nodes * self.num_processes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which batch of how many is this rank's: the same for all ranks of a sequence."""
        return {
            "num_replicas": self.num_nodes * self.num_processes // self.sequence_ranks,
            "rank": self.global_rank // self.sequence_ranks,
        }

    def connect(self, model: pl.LightningModule) -> None:
        """Refuse what cannot run in pieces, before any rank waits for another."""
        check_task(model)
        if self._layers and not getattr(model, "ranks_take_layers", True):
            raise ValueError(
                f"strategy: {NAME} with layers is not for {type(model).__name__}: leave layers out, and its rows go through the ranks in segments"
            )
        if self._layers and getattr(model, "compile_blocks", False):
            raise ValueError(
                f"strategy: {NAME} with layers speaks with other ranks inside blocks, which model.compile cannot take: set one of them"
            )
        if self._layers and getattr(model, "segment", None) is not None:
            raise ValueError(
                f"strategy: {NAME} with layers keeps the activations of a piece, and model.segment is {model.segment}: set one of them"  # type: ignore[attr-defined]
            )
        check_ranks(self.sequence_ranks, self.num_nodes * self.num_processes)
        super().connect(model)

    def setup(self, trainer: pl.Trainer) -> None:
        """Tell the task where its rank stands."""
        task: Any = self.lightning_module
        task.ranks = SequenceMesh(self.sequence_ranks, self.root_device.type, self._rows, self._layers)
        super().setup(trainer)

    def teardown(self) -> None:
        """Leave the task as it was: a process alone."""
        task: Any = self.lightning_module
        if task is not None:
            task.ranks = None
        super().teardown()


def check_task(task: Any) -> None:
    """Raise ``ValueError`` when a task cannot train on pieces of its sequences."""
    if hasattr(task, "model"):
        require_streaming(task.model, f"strategy: {NAME}")
    if not hasattr(task, "ranks"):
        raise ValueError(
            f"strategy: {NAME} needs an objective that is a sum over positions (AutoregressTask, JointTask), but {type(task).__name__} looks at a sequence as a whole: use strategy: ddp"
        )
    if getattr(task, "carry", False):
        raise ValueError(
            f"strategy: {NAME} begins every batch anew, and model.carry goes on from the batch before: set one of them"
        )


StrategyRegistry.register(
    NAME, SequenceParallelStrategy, description="DDP in which neighbouring ranks share a sequence"
)
