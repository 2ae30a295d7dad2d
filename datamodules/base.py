"""`PackedDataModule`: what the datamodules of all modalities share. Splits to loaders, and a position that is saved.

The position is in the datamodule's own state, which Lightning restores before it builds anything. (The state of the
loader itself is restored later, and silently lost if something asked for the number of steps in between.) It is made of
integers and strings only, counts samples of all ranks together, and so fits another number of ranks as long as the
global batch, batch size x ranks, is the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch

from .errors import ON_BAD, AlreadyPackedError, DataError
from .indexed import IndexedReader
from .loader import Batch, EvaluationLoader, Position, Samples, TrainLoader
from .order import WINDOW, epoch_order, steps_per_epoch
from .packed import PackedDataset
from .shards import MANIFEST
from .streaming import StreamingLoader

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)

READERS = ("indexed", "streaming")
_STATE_FORMAT = 1
_ALWAYS = {"format", "epoch", "samples_done", "global_batch", "seed", "dataset", "reader"}
"""What every position says; the rest are a datamodule's own settings."""


class Described(Protocol):
    """What every known source says of itself, see `mmlong.datamodules.sources.Known`."""

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def source(self) -> str: ...
    @property
    def licence(self) -> str: ...


class PackedDataModule(pl.LightningDataModule):
    """Base of the datamodules. A modality gives `samples(split, train)`, and `pack` and `known_names` for the sources it knows.

    Args:
        name: of the dataset: a known source's, or its folder.
        folder: the packed dataset.
        known: what is true of the known source; ``None`` if it is not one.
        label: which label field; the dataset's default if ``None``.
        batch_size: samples a step *of one rank*.
        num_workers: worker processes of each rank.
        seed: decides order and augmentation, together with epoch and sample.
        reader: ``"indexed"`` (every sample once an epoch, resumes exactly) or ``"streaming"`` (training reads the tars
            front to back with resampling; resumes statistically, at an epoch). Evaluation is always indexed.
        on_bad: a damaged sample: ``"stop"`` with an error, or ``"skip"``: its place is kept with weight 0, it is named
            and counted (`skipped`).
        eval_batch_size: batch size of evaluation; ``batch_size`` if not given.

    Attributes:
        modality: what the dataset must hold.
        packs: what `mmlong pack` calls the usual input of it, where that is not the modality's name.
        of_dataset: options that speak of the dataset that is named, and not of whichever is read: a recipe's are left out where the command line names another one.
        skipped: ``"file [member]: reason"`` of every sample skipped so far, by what was said of it, with how often.
    """

    modality: str = ""
    packs: str = ""
    of_dataset: tuple[str, ...] = ("label",)

    def __init__(
        self,
        name: str,
        folder: Path,
        known: Described | None,
        label: str | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        reader: str,
        on_bad: str,
        eval_batch_size: int | None,
    ) -> None:
        super().__init__()
        for option, value, choices in (("reader", reader, READERS), ("on_bad", on_bad, ON_BAD)):
            if value not in choices:
                raise ValueError(f"{option} is {value!r}; it can be {' or '.join(choices)}")
        if batch_size < 1 or num_workers < 0 or seed < 0:
            raise ValueError(
                f"batch_size {batch_size} (at least 1), num_workers {num_workers}, seed {seed} (at least 0)"
            )
        if known is not None and label is not None and label not in known.labels:
            raise ValueError(f"{name} has labels {', '.join(known.labels) or '(none)'}, not {label!r}")
        self.dataset_name = name
        self.folder = folder
        self.known = known
        self._label = label
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
        self._readers: dict[str, IndexedReader] = {}

    def samples(self, split: str, train: bool) -> Samples:
        """The samples of a split, decoded; with augmentation if ``train``."""
        raise TypeError(f"{type(self).__name__} does not say how to read samples")

    def pack(self, progress: Progress) -> None:
        """Pack the known source into `folder`."""
        raise TypeError(f"{type(self).__name__} does not say how to pack {self.dataset_name}")

    def known_names(self) -> Sequence[str]:
        """Names of the sources that can be packed on first use."""
        return ()

    def modality_options(self) -> dict[str, Any]:
        """Options of the modality that the data fixes."""
        return {}

    def info(self) -> dict[str, Any]:
        """What the data fixes for a model: ``modality`` (options of the modality), and for labelled data ``num_classes`` and ``class_names``.

        Needs no packed data if the dataset is a known one.
        """
        labelled = {"num_classes": self.num_classes, "class_names": list(self.class_names)} if self.label else {}
        return {"modality": self.modality_options(), **labelled}

    def prepare_data(self) -> None:
        """Pack a known dataset if it is not there, saying where it comes from and under which licence."""
        if (self.folder / MANIFEST).is_file():
            return
        if self.known is None:
            raise DataError(
                self.folder, f"is not a packed dataset (no {MANIFEST}); make one with `mmlong pack {self.packs or self.modality} IN "
                f"{self.folder}`, or name one of {', '.join(self.known_names())}"
            )  # fmt: skip
        from .progress import packing

        print(f"{self.dataset_name}: {self.known.source}\n  licence: {self.known.licence}")
        # Of two runs that begin at once, one waits until the other has packed, and finds the data there.
        with (
            packing(f"packing {self.dataset_name} into {self.folder}") as progress,
            contextlib.suppress(AlreadyPackedError),
        ):
            self.pack(progress)
        self._dataset = None

    @property
    def dataset(self) -> PackedDataset:
        """The packed dataset, opened when first asked for.

        Raises:
            BadShardError: it is not there, or not whole.
            DataError: it is of another modality.
        """
        if self._dataset is None:
            dataset = PackedDataset(self.folder)
            if (found := dataset.manifest["modality"]) != self.modality:
                raise DataError(
                    self.folder, f"holds {found}; {type(self).__name__} reads {self.modality}: take a recipe of {found} "
                    "(`mmlong recipes` lists them)"
                )  # fmt: skip
            self._dataset = dataset
        return self._dataset

    @property
    def label(self) -> str | None:
        """The label field in use; ``None`` for data without labels."""
        if self._label is not None:
            return self._label
        fields: Sequence[str] = tuple(self.known.labels) if self.known is not None else self.dataset.fields
        return fields[0] if fields else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by class id; empty for data without labels."""
        label = self.label
        if label is None:
            return ()
        return self.known.labels[label] if self.known is not None else self.dataset.classes(label)

    @property
    def num_classes(self) -> int:
        """How many classes."""
        return len(self.class_names)

    @property
    def source(self) -> str:
        """Where the data come from."""
        return self.known.source if self.known is not None else str(self.dataset.manifest["source"])

    @property
    def licence(self) -> str:
        """Under which terms."""
        return self.known.licence if self.known is not None else str(self.dataset.manifest["licence"])

    @property
    def class_counts(self) -> torch.Tensor:
        """``(num_classes,)`` int64: training samples of each class. Needs the packed data.

        Raises:
            DataError: the data has no labels.
        """
        if self.label is None:
            raise DataError(self.folder, "has no labels")
        labels = torch.from_numpy(self.dataset.split("train").labels[self.label])
        return torch.bincount(labels, minlength=self.num_classes)

    @property
    def class_weights(self) -> torch.Tensor:
        """``(num_classes,)`` float32: inverse frequency in training, 1 on average over its samples. Needs the packed data."""
        counts = self.class_counts
        return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()

    def setup(self, stage: str | None = None) -> None:
        """Open the splits the stage needs, so that a fault is told before anything is built."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in needed.get(stage or "", self.dataset.splits):
            if split in self.dataset.splits:
                self.dataset.split(split)

    def sample_name(self, split: str, sample: int) -> str:
        """What a sample was made of, as its source calls it: a file in its folder, a record; empty where that is not one thing, or was not noted."""
        return ""

    def packed_name(self, split: str, sample: int) -> str:
        """`sample_name` of the packed dataset: what packing wrote beside the sample.

        Raises:
            DataError: no such split, or the sample is damaged.
        """
        if split not in self._readers:
            self._readers[split] = IndexedReader(self.dataset.split(split))
        reader = self._readers[split]
        if "json" not in reader.split.size:
            return ""
        return str(json.loads(reader.read(sample, "json")).get("file", ""))

    def teardown(self, stage: str | None = None) -> None:
        """End the worker processes of the loaders that were made."""
        while self._loaders:
            self._loaders.pop().close()

    def _ranks(self) -> tuple[int, int]:
        # Not the trainer's own rank: ranks that share a sequence share its batches.
        place = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if place is None else (place["rank"], place["num_replicas"])

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
        loader = TrainLoader(
            samples, self.train_order(self.batch_size * world), self.batch_size, rank, world, self.position,
            self.num_workers, self._pins(), self._report,
        )  # fmt: skip
        self._loaders.append(loader)
        return loader

    def train_order(self, batch: int) -> Callable[[int], np.ndarray]:
        """Epoch -> its sample ids in order, for global batches of ``batch``."""
        sizes = self.train_sizes()
        return lambda epoch: epoch_order(sizes, self.seed, epoch, batch, WINDOW)

    def typical_batches(self) -> list[Batch] | None:
        """Training batches that on average cost what those of an epoch do; ``None`` where any does. For measuring: where training is does not change."""
        return None

    def train_sizes(self) -> tuple[int, ...]:
        """How many training samples there are in each part of the data that is best read together: in each shard."""
        return self.dataset.split("train").shard_sizes

    def fixed_settings(self) -> dict[str, str]:
        """What else decides which samples there are and what they hold, by option: in mid-epoch it must stay as it is."""
        return {}

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
            limit = steps_per_epoch(sum(self.train_sizes()), batch)
            if self.trainer is not None:
                # A batch that was handed out and not trained on (the run was interrupted inside it) comes again.
                progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
                done -= batch * (progress.ready - progress.processed)
                limit = min(limit, int(min(self.trainer.num_training_batches, limit)))
            if done >= limit * batch:
                epoch, done = epoch + 1, 0
        return {
            "format": _STATE_FORMAT, "epoch": epoch, "samples_done": done, "global_batch": batch, "seed": self.seed,
            "dataset": self.dataset.fingerprint, "reader": self.reader, **self.fixed_settings(),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a position from a checkpoint; it is held against the present settings when training begins."""
        self._restored = dict(state_dict)

    def _place(self, batch: int) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        if state["samples_done"] > 0:  # at an epoch's beginning any setting may be new
            fixed = self.fixed_settings()
            changed = {
                "global_batch": (state["global_batch"], batch, "batch size x ranks"),
                "seed": (state["seed"], self.seed, "data.seed"),
                "dataset": (state["dataset"], self.dataset.fingerprint, f"the bytes of {self.folder}"),
                "reader": (state["reader"], self.reader, "data.reader"),
                **{
                    name: (state.get(name), fixed.get(name), f"data.{name}")
                    for name in sorted({*fixed, *state} - _ALWAYS)
                },
            }
            for was, now, what in changed.values():
                if was != now:
                    raise ValueError(
                        f"cannot go on inside epoch {state['epoch']} (after {state['samples_done']} samples): {what} was "
                        f"{was} when the checkpoint was written and is {now} now, so samples would come twice or never. "
                        f"Set it back to {was}, or go on from a checkpoint of an epoch's end"
                    )
        self.position.epoch, self.position.done, self.position.begun = state["epoch"], state["samples_done"], False
