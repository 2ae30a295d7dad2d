"""Loaders whose position is theirs: `TrainLoader` can be stopped after any batch and started again there, to the bit.

Three things make a resume exact, and each is here for a reason that cost somebody days:

* The position counts batches *handed out*, in the main process. Workers run ahead; what they have fetched and nobody
  has seen is not progress.
* The loader has a length, the full epoch's. Lightning prefetches one batch from a loader without one, and would lose
  it at every resume. It also means that nobody ever runs the iterator to its end, so "next epoch" is decided when an
  iteration begins, never after its last batch.
* The workers' base seed comes from a generator of the loader's own, so that making an iterator consumes nothing from
  the global generator that dropout uses.

A dataset here is anything with ``fetch(places) -> (batch, problems)``: a place is ``(epoch, sample id, weight)``, a
batch is a dict of tensors, and a problem is a bad sample that was skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from .errors import DataError
from .order import evaluation_plan, evaluation_steps, rank_batch, steps_per_epoch

Batch = dict[str, Any]
Place = tuple[int, int, float]


class Samples(Protocol):
    """What a loader reads from."""

    def __len__(self) -> int: ...

    def fetch(self, places: list[Place]) -> tuple[Batch, list[DataError]]:
        """Read, decode and stack the samples at ``places``."""
        ...


@dataclass
class Position:
    """Where training is: ``done`` samples of all ranks together into ``epoch``.

    ``begun`` is false until the first batch after creation or a restore has been handed out.
    """

    epoch: int = 0
    done: int = 0
    begun: bool = False

    def begin(self) -> None:
        """An iteration begins: the rest of an epoch that was restored, else the next epoch."""
        if self.begun:
            self.epoch, self.done = self.epoch + 1, 0
        self.begun = True


Fetched = tuple[Batch, list[DataError]] | DataError


def fetched(fetch: Callable[[], tuple[Batch, list[DataError]]]) -> Fetched:
    """What ``fetch`` gives, or the fault it met, as a value.

    Raised in a worker, it would reach the main process as a ``RuntimeError`` that holds a printed traceback.
    """
    try:
        return fetch()
    except DataError as error:
        return error


def handed_out(result: Fetched, report: Callable[[list[DataError]], None]) -> Batch:
    """The batch of what was fetched, in the main process: raises the fault, or reports what was skipped."""
    if isinstance(result, DataError):
        raise result
    batch, problems = result
    if problems:
        report(problems)
    return batch


class _Fetching:
    """`Samples` as a dataset of torch's `DataLoader`: one item is one whole batch."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, places: list[Place]) -> Fetched:
        return fetched(lambda: self.samples.fetch(places))


class _Plan:
    """A sampler that yields whatever batches were last put in it, so that workers can outlive an epoch."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Place]] = ()

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return 0


def _as_is(result: Fetched) -> Fetched:
    return result


class _Loader:
    def __init__(
        self, samples: Samples, num_workers: int, pin_memory: bool, report: Callable[[list[DataError]], None]
    ) -> None:
        self._plan = _Plan()
        self._report = report
        self._inner: DataLoader[Any] = DataLoader(
            _Fetching(samples),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._plan,  # type: ignore[arg-type]
            collate_fn=_as_is,  # type: ignore[arg-type]
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
        )

    def _run(self, batches: Iterable[list[Place]]) -> Iterator[Batch]:
        self._plan.batches = batches
        for result in self._inner:
            yield handed_out(result, self._report)

    def close(self) -> None:
        """End the worker processes now; the next iteration starts new ones.

        Left to the garbage collector, the queues to the workers may be taken down before the workers have been told to
        end, and each is then waited for in vain for five seconds.
        """
        iterator: Any = self._inner._iterator
        self._inner._iterator = None
        self._plan.batches = ()
        if iterator is not None:
            iterator._shutdown_workers()


class Positioned:
    """A loader whose position is in the datamodule's state, which Lightning restores earlier than a loader's own."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing; that there is such a method tells Lightning that a resume in mid-epoch is taken care of."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing; the position was put back before this loader was made."""


class TrainLoader(_Loader, Positioned):
    """One rank's training batches, epoch after epoch; an iteration is one epoch, or the rest of a resumed one.

    Args:
        samples: what to read.
        order: epoch -> the ids of that epoch in order, a multiple of ``batch_size * world`` of them.
        batch_size: samples of this rank in a step.
        rank, world: which rank of how many.
        position: shared with whoever saves it; the loader moves it.
        num_workers: worker processes.
        pin_memory: hand out batches in page-locked memory (for CUDA).
        report: called with the bad samples that were skipped.

    Raises:
        ValueError: the samples do not fill one global batch.
    """

    def __init__(
        self,
        samples: Samples,
        order: Callable[[int], np.ndarray],
        batch_size: int,
        rank: int,
        world: int,
        position: Position,
        num_workers: int = 0,
        pin_memory: bool = False,
        report: Callable[[list[DataError]], None] = lambda problems: None,
    ) -> None:
        super().__init__(samples, num_workers, pin_memory, report)
        self._order, self._rank, self._world = order, rank, world
        self.global_batch = batch_size * world
        self.position = position
        self._steps = steps_per_epoch(len(samples), self.global_batch)

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below runs, and the position does not move, until the first batch is asked for.
        here = self.position
        here.begin()
        for batch in self._run(self._batches(here.epoch, here.done)):
            here.done += self.global_batch
            yield batch

    def _batches(self, epoch: int, done: int) -> Iterator[list[Place]]:
        order = self._order(epoch)
        for first in range(done, len(order), self.global_batch):
            ids = rank_batch(order, first, self.global_batch, self._rank, self._world)
            yield [(epoch, int(sample), 1.0) for sample in ids]


class EvaluationLoader(_Loader):
    """One rank's evaluation batches: every sample once over all ranks, fillers with weight 0. See `TrainLoader`."""

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        rank: int,
        world: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        report: Callable[[list[DataError]], None] = lambda problems: None,
    ) -> None:
        super().__init__(samples, num_workers, pin_memory, report)
        self._args = (len(samples), batch_size, rank, world)
        self._steps = evaluation_steps(len(samples), batch_size, world)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        yield from self._run(
            [(0, sample, weight) for sample, weight in zip(batch.ids, batch.weights, strict=True)]
            for batch in evaluation_plan(*self._args)
        )
