"""`PackedDataModule`: what the datamodules of all modalities share. Splits to loaders, and a position that is saved.

The position is in the datamodule's own state, which Lightning restores before it builds anything. (The state of the
loader itself is restored later, and silently lost if something asked for the number of steps in between.) It is made of
integers and strings only, counts samples of all ranks together, and so fits another number of ranks as long as the
global batch, batch size x ranks, is the same.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from .errors import DataError
from .loader import EvaluationLoader, Position, Samples, TrainLoader
from .order import WINDOW, epoch_order
from .packed import PackedDataset
from .streaming import StreamingLoader

log = logging.getLogger(__name__)

READERS = ("indexed", "streaming")
ON_BAD = ("stop", "skip")
_STATE_FORMAT = 1


class PackedDataModule(pl.LightningDataModule):
    """Base of the datamodules. A modality gives `samples(split, train)` and, if it can pack for itself, `prepare_data`.

    Args:
        folder: the packed dataset.
        batch_size: samples a step *of one rank*.
        num_workers: worker processes of each rank.
        seed: decides order and augmentation, together with epoch and sample.
        reader: ``"indexed"`` (every sample once an epoch, resumes exactly) or ``"streaming"`` (training reads the tars
            front to back with resampling; resumes statistically, at an epoch). Evaluation is always indexed.
        on_bad: a damaged sample: ``"stop"`` with an error, or ``"skip"``: its place is kept with weight 0, it is named
            and counted (`skipped`).
        eval_batch_size: batch size of evaluation; ``batch_size`` if not given.

    Attributes:
        skipped: ``"file [member]: reason"`` of every sample skipped so far, by what was said of it, with how often.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        num_workers: int,
        seed: int,
        reader: str,
        on_bad: str,
        eval_batch_size: int | None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("reader", reader, READERS), ("on_bad", on_bad, ON_BAD)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it can be {' or '.join(choices)}")
        if batch_size < 1 or num_workers < 0 or seed < 0:
            raise ValueError(
                f"batch_size {batch_size} (at least 1), num_workers {num_workers}, seed {seed} (at least 0)"
            )
        self.folder = folder
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.reader = reader
        self.on_bad = on_bad
        self.skipped: dict[str, int] = {}
        self.position = Position()
        self._restored: dict[str, Any] | None = None
        self._dataset: PackedDataset | None = None
        self._samples: dict[tuple[str, bool], Samples] = {}
        self._loaders: list[TrainLoader | EvaluationLoader] = []

    def samples(self, split: str, train: bool) -> Samples:
        """The samples of a split, decoded; with augmentation if ``train``."""
        raise TypeError(f"{type(self).__name__} does not say how to read samples")

    def info(self) -> dict[str, Any]:
        """What the data fixes for a model: ``modality`` (options of the modality), and for labelled data ``num_classes`` and ``class_names``."""
        return {"modality": {}}

    @property
    def dataset(self) -> PackedDataset:
        """The packed dataset, opened when first asked for.

        Raises:
            BadShardError: it is not there, or not whole.
        """
        if self._dataset is None:
            self._dataset = PackedDataset(self.folder)
        return self._dataset

    def setup(self, stage: str | None = None) -> None:
        """Open the splits the stage needs, so that a fault is told before anything is built."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in needed.get(stage or "", self.dataset.splits):
            if split in self.dataset.splits:
                self.dataset.split(split)

    def teardown(self, stage: str | None = None) -> None:
        """End the worker processes of the loaders that were made."""
        while self._loaders:
            self._loaders.pop().close()

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _cached_samples(self, split: str, train: bool) -> Samples:
        if (split, train) not in self._samples:
            self._samples[split, train] = self.samples(split, train)
        return self._samples[split, train]

    def _report(self, problems: list[DataError]) -> None:
        for problem in problems:
            said = str(problem)
            if said not in self.skipped:
                log.warning("skipped a bad sample (%d so far): %s", len(self.skipped) + 1, said)
            self.skipped[said] = self.skipped.get(said, 0) + 1

    def train_dataloader(self) -> TrainLoader | StreamingLoader:
        """Training batches of this rank, from the restored position if there is one."""
        rank, world = self._ranks()
        self._place(self.batch_size * world)
        samples = self._cached_samples("train", True)
        if self.reader == "streaming":
            return StreamingLoader(
                self.dataset.split("train"), samples, self.batch_size, rank, world, self.seed, self.position,
                self.num_workers, self._pins(), self._report,
            )  # fmt: skip
        sizes, batch = self.dataset.split("train").shard_sizes, self.batch_size * world
        loader = TrainLoader(
            samples, lambda epoch: epoch_order(sizes, self.seed, epoch, batch, WINDOW), self.batch_size, rank, world,
            self.position, self.num_workers, self._pins(), self._report,
        )  # fmt: skip
        self._loaders.append(loader)
        return loader

    def _evaluation(self, split: str) -> EvaluationLoader | list[Any]:
        if split not in self.dataset.splits:
            return []
        rank, world = self._ranks()
        loader = EvaluationLoader(
            self._cached_samples(split, False),
            self.eval_batch_size,
            rank,
            world,
            self.num_workers,
            self._pins(),
            self._report,
        )
        self._loaders.append(loader)
        return loader

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Every validation sample once over all ranks (no batches if there is no such split)."""
        return self._evaluation("val")

    def test_dataloader(self) -> EvaluationLoader | list[Any]:
        """Every test sample once over all ranks."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationLoader | list[Any]:
        """The test samples."""
        return self._evaluation("test")

    def _pins(self) -> bool:
        return torch.cuda.is_available()

    def state_dict(self) -> dict[str, Any]:
        """Where training is, in primitives. The epoch's end is written as the next one's beginning."""
        _, world = self._ranks()
        batch = self.batch_size * world
        epoch, done = self.position.epoch, self.position.done
        if self.position.begun:
            steps = self.dataset.split("train").shard_sizes
            limit = sum(steps) // batch
            if self.trainer is not None:
                # A batch that was handed out and not trained on (the run was interrupted inside it) comes again.
                progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
                done -= batch * (progress.ready - progress.processed)
                limit = min(limit, int(min(self.trainer.num_training_batches, limit)))
            if done >= limit * batch:
                epoch, done = epoch + 1, 0
        return {
            "format": _STATE_FORMAT, "epoch": epoch, "samples_done": done, "global_batch": batch, "seed": self.seed,
            "dataset": self.dataset.fingerprint, "reader": self.reader,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a position from a checkpoint; it is held against the present settings when training begins."""
        self._restored = dict(state_dict)

    def _place(self, batch: int) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        if state["samples_done"] > 0:  # at an epoch's beginning any setting may be new
            changed = {
                "global_batch": (state["global_batch"], batch, "batch size x ranks"),
                "seed": (state["seed"], self.seed, "data.seed"),
                "dataset": (state["dataset"], self.dataset.fingerprint, f"the bytes of {self.folder}"),
                "reader": (state["reader"], self.reader, "data.reader"),
            }
            for was, now, what in changed.values():
                if was != now:
                    raise ValueError(
                        f"cannot go on inside epoch {state['epoch']} (after {state['samples_done']} samples): {what} was "
                        f"{was} when the checkpoint was written and is {now} now, so samples would come twice or never. "
                        f"Set it back to {was}, or go on from a checkpoint of an epoch's end"
                    )
        self.position.epoch, self.position.done, self.position.begun = state["epoch"], state["samples_done"], False
