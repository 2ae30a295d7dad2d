"""`MixedDataModule`: batches of several datasets, one dataset a batch, for training that alternates between modalities.

Whose a training batch is, and which of its samples, is a pure function of seed, epoch, step and rank (`mmlong.datamodules.mixing`): the ``k``-th batch that a dataset gives in the run is batch ``k mod n`` of its own epoch
``k div n``, of ``n`` batches in its own order. So each of its samples comes once in each pass over it, whatever the shares, and a run goes on to the bit from any step, with another number of ranks too.

Evaluation counts every sample of every dataset once.

A batch says of each dataset that it has samples of what those have::

    parts    {name: {raw, lengths, rows}}   `rows` int64 (n,), in which rows of the batch they stand; left out where that is all of them, as in training
    index    int64   (B,)                   sample id; datasets are counted through
    weight   float32 (B,)                   1, or 0 for a filler of evaluation and for a skipped sample
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import PackedDataModule
from .by_name import open_data
from .errors import DataError
from .loader import Batch, Place, Samples, TrainLoader
from .mixing import count_steps, mix_shares, parts_of_epoch
from .order import epoch_order, rank_batch, steps_per_epoch


class MixedSamples:
    """Samples of several datasets, their ids counted through.

    Args:
        parts: by name.
    """

    def __init__(self, parts: Mapping[str, Samples]) -> None:
        self.parts = dict(parts)
        self.ends = np.cumsum([len(samples) for samples in self.parts.values()])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fetch(self, places: list[Place]) -> tuple[Batch, list[DataError]]:
        """The batch at ``places`` and what was skipped in it."""
        whose = np.searchsorted(self.ends, [sample for _, sample, _ in places], side="right")
        batch: Batch = {
            "parts": {},
            "index": torch.tensor([sample for _, sample, _ in places], dtype=torch.int64),
            "weight": torch.zeros(len(places)),
        }
        problems: list[DataError] = []
        for number, (name, samples) in enumerate(self.parts.items()):
            rows = np.flatnonzero(whose == number)
            if len(rows) == 0:
                continue
            before = int(self.ends[number]) - len(samples)
            here = [places[row] for row in rows]
            found, faults = samples.fetch([(epoch, sample - before, weight) for epoch, sample, weight in here])
            problems += faults
            part = {key: found[key] for key in ("raw", "lengths", "resets") if key in found}
            if "resets" in part:
                raise ValueError(f"{name} is a stream of several documents a row; mixed batches are of whole documents")
            at = torch.from_numpy(rows)
            if len(rows) < len(places):
                part["rows"] = at
            batch["parts"][name] = part
            batch["weight"][at] = found["weight"]
        return batch, problems


class MixedLoader(TrainLoader):
    """Training batches of one rank; see `TrainLoader`.

    Args:
        orders: of each dataset, its epoch -> its sample ids in order, a multiple of the global batch.
        own_steps: batches in an epoch of each.
        counts: batches of each in an epoch of the mix.
        seed: of the mix.
        samples, options: see `TrainLoader`.
    """

    def __init__(
        self,
        samples: MixedSamples,
        orders: Sequence[Callable[[int], np.ndarray]],
        own_steps: Sequence[int],
        counts: Sequence[int],
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(samples, lambda epoch: np.zeros(0, np.int64), **options)
        self._orders, self._own_steps, self._counts, self._seed = list(orders), list(own_steps), list(counts), seed
        self._starts = samples.ends - np.array([len(part) for part in samples.parts.values()])
        self._steps = int(sum(counts))

    def _batches(self, epoch: int, done: int) -> Iterator[list[Place]]:
        whose = parts_of_epoch(self._counts, self._seed, epoch)
        begin = done // self.global_batch
        given = epoch * np.asarray(self._counts) + np.bincount(whose[:begin], minlength=len(self._counts))
        known: dict[int, tuple[int, np.ndarray]] = {}
        for part in whose[begin:].tolist():
            own, place = divmod(int(given[part]), self._own_steps[part])
            given[part] += 1
            if part not in known or known[part][0] != own:
                known[part] = own, self._orders[part](own)
            ids = rank_batch(known[part][1], place * self.global_batch, self.global_batch, self._rank, self._world)
            yield [(own, int(sample) + int(self._starts[part]), 1.0) for sample in ids]


class _Together:
    """What `PackedDataModule` asks of its dataset, of several."""

    def __init__(self, parts: Mapping[str, PackedDataModule]) -> None:
        self.parts = parts

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that any of them has."""
        return tuple(dict.fromkeys(split for part in self.parts.values() for split in part.dataset.splits))

    @property
    def fingerprint(self) -> str:
        """Of all their bytes."""
        each = [f"{name} {part.dataset.fingerprint}" for name, part in self.parts.items()]
        return hashlib.sha256("\n".join(each).encode()).hexdigest()[:16]


class MixedDataModule(PackedDataModule):
    """Several datasets in turn.

    Args:
        parts: ``{NAME: {dataset: ..., option: ...}}``, names as the model has them, options of each one's datamodule.
        temperature: a dataset of ``n`` samples has a share of batches in proportion to ``n^(1 / temperature)``: 1 in proportion to its size, more evens them out.
        weights: fixed shares by name instead, in proportion.
        root, source_path: of known sources, see `PairDataModule`.
        batch_size, num_workers, seed, on_bad, eval_batch_size: see `PackedDataModule`.

    Raises:
        DataError: at use, if a dataset is neither known nor packed.
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        parts: dict[str, dict[str, Any]],
        temperature: float = 1.0,
        weights: dict[str, float] | None = None,
        root: str | None = None,
        source_path: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: str = "stop",
        eval_batch_size: int | None = None,
    ) -> None:
        if not parts:
            raise ValueError("parts is empty: name at least one dataset, {NAME: {dataset: ...}}")
        shared = {"root": root, "source_path": source_path, "seed": seed, "on_bad": on_bad, "batch_size": batch_size}
        self.parts: dict[str, PackedDataModule] = {}
        for name, options in parts.items():
            if "dataset" not in options:
                raise ValueError(f"parts.{name} names no dataset")
            self.parts[name] = open_data(**{**shared, **options})
        self.temperature, self.weights = temperature, weights
        mix_shares(dict.fromkeys(parts, 1), temperature, weights)  # refuses what makes no sense, now
        self.settings = f"{parts} temperature {temperature} weights {weights}"
        self._together = _Together(self.parts)
        title = "+".join(part.dataset_name for part in self.parts.values())
        super().__init__(
            title, Path(title), None, None, batch_size, num_workers, seed, "indexed", on_bad, eval_batch_size
        )

    def prepare_data(self) -> None:
        """Pack what is known and not there."""
        for part in self.parts.values():
            part.prepare_data()

    def info(self) -> dict[str, Any]:
        """``modalities``: by name, options that the data fixes."""
        return {"modalities": {name: part.modality_options() for name, part in self.parts.items()}}

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs of each."""
        for part in self.parts.values():
            part.setup(stage)

    @property
    def dataset(self) -> Any:
        """All of them, as far as a position and a split are concerned."""
        return self._together

    @property
    def label(self) -> str | None:
        """None: each has its own."""
        return None

    def samples(self, split: str, train: bool) -> MixedSamples:
        """The samples of a split of those that have it."""
        return MixedSamples(
            {name: part.samples(split, train) for name, part in self.parts.items() if split in part.dataset.splits}
        )

    def counts(self, batch: int) -> dict[str, tuple[int, int]]:
        """By name, batches in an epoch of its own and in an epoch of the mix, for global batches of ``batch``."""
        sizes = {name: sum(part.train_sizes()) for name, part in self.parts.items()}
        own = {name: steps_per_epoch(size, batch) for name, size in sizes.items()}
        shares = mix_shares(sizes, self.temperature, self.weights)
        return dict(zip(sizes, zip(own.values(), count_steps(sum(own.values()), shares), strict=True), strict=True))

    def train_dataloader(self) -> MixedLoader:
        """Training batches of this rank, from the restored position if there is one."""
        rank, world = self._ranks()
        batch = self.batch_size * world
        self._place(batch)
        counts = self.counts(batch)
        sizes = {name: part.train_sizes() for name, part in self.parts.items()}

        def order(name: str) -> Callable[[int], np.ndarray]:
            return lambda epoch: epoch_order(sizes[name], self.seed, epoch, batch)

        samples = self._cached_samples("train", True)
        assert isinstance(samples, MixedSamples)
        loader = MixedLoader(
            samples, [order(name) for name in counts], [own for own, _ in counts.values()], [n for _, n in counts.values()],
            self.seed, batch_size=self.batch_size, rank=rank, world=world, position=self.position,
            num_workers=self.num_workers, pin_memory=self._pins(), report=self._report,
        )  # fmt: skip
        self._loaders.append(loader)
        return loader

    def train_sizes(self) -> tuple[int, ...]:
        """What an epoch of the mix has."""
        batch = self.batch_size * self._ranks()[1]
        return (batch * sum(n for _, n in self.counts(batch).values()),)

    def fixed_settings(self) -> dict[str, str]:
        """The datasets' options and the shares."""
        return {"parts": self.settings}
