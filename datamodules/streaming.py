"""Training on webdataset itself: shards read front to back, as a stream, with resampling.

For shards that are better read in sequence than by offset. What is given up, compared with the indexed reader:

* Shards are drawn *with replacement*. An epoch is a number of steps, ``samples // global batch``; in it some samples
  come twice and some not at all. In expectation all come equally often.
* A resume is *statistical*: the epoch's remaining steps are made with a new draw. The stream is a pure function of
  (seed, epoch, samples done when it began, rank, worker count).

webdataset would run ``pipe:`` URLs in a shell and unpickle members by default. Here it never opens anything: its tar and
grouping stages are handed files opened by us (its `enforce_security`, set on import of this module, would refuse even a
local path), none of its decoders are used, and members are refused by name as well. Bytes are checked by the shard's
size when opened, and each member by the decoder; there is no checksum on this path.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from .errors import BadShardError, DataError
from .loader import Batch, Fetched, Position, Positioned, Samples, handed_out
from .order import random_words, steps_per_epoch
from .packed import Split
from .shards import why_refused

wds.utils.enforce_security = True

SHUFFLE = 512  # samples in the shuffle buffer of each worker


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else int(info.id)


class _Guard:
    """Refuses a member by its name before it is read, and says which shard holds it."""

    def __call__(self, member: str) -> bool:
        if reason := why_refused(member):
            raise BadShardError("(stream)", reason, member)
        return True


class StreamingLoader(Positioned):
    """One rank's training batches of a resampled stream; an iteration is one epoch of ``len(self)`` steps.

    Args:
        split: the shards.
        samples: decodes; must have ``fetch_members(epoch, members)``, see `mmlong.datamodules.image_samples`.
        batch_size, rank, world, seed, position, num_workers, pin_memory, report: as in `TrainLoader`.
    """

    def __init__(
        self,
        split: Split,
        samples: Samples,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        position: Position,
        num_workers: int = 0,
        pin_memory: bool = False,
        report: Callable[[list[DataError]], None] = lambda problems: None,
    ) -> None:
        self._split, self._samples = split, samples
        self._batch_size, self._rank, self._world, self._seed = batch_size, rank, world, seed
        self._num_workers, self._pin_memory, self._report = num_workers, pin_memory, report
        self.position = position
        self.global_batch = batch_size * world
        self._steps = steps_per_epoch(len(split), self.global_batch)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        here = self.position
        here.begin()
        for result in self._stream(here.epoch, here.done):
            batch = handed_out(result, self._report)
            here.done += self.global_batch
            yield batch

    def _stream(self, epoch: int, done: int) -> Iterator[Fetched]:
        draw, mix = (int(word >> 1) for word in random_words(2, self._seed, 5, epoch, done, self._rank))
        pipeline = wds.DataPipeline(
            wds.ResampledShards(
                [str(path) for path in self._split.shards], seed=draw, worker_seed=_worker, deterministic=True
            ),
            _Samples({str(path): size for path, size in zip(self._split.shards, self._split.shard_sizes, strict=True)}),
            _Shuffle(mix),
            wds.batched(self._batch_size, collation_fn=_Fetch(self._samples, epoch), partial=False),
            _Caught(),
        )
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            generator=torch.Generator().manual_seed(0),
        )
        yield from loader.with_epoch(self._steps - done // self.global_batch)


class _Samples:
    """Shard names to samples, with errors that name the shard.

    A tar that was cut short between members is a shorter tar to a sequential reader, so samples are counted.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def __call__(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            count = 0
            try:
                with open(shard["url"], "rb") as stream:
                    members = wds.tariterators.tar_file_expander([{**shard, "stream": stream}], select_files=_Guard())
                    for sample in wds.tariterators.group_by_keys(members):
                        count += 1
                        yield sample
            except FileNotFoundError as error:
                raise BadShardError(shard["url"], "is missing") from error
            except BadShardError as error:
                raise BadShardError(shard["url"], error.reason, error.member) from error
            except (tarfile.TarError, EOFError) as error:
                raise BadShardError(shard["url"], f"is not a whole tar file: {error}") from error
            if count != self.sizes[shard["url"]]:
                raise BadShardError(
                    shard["url"], f"is cut short: {count} samples, should be {self.sizes[shard['url']]}"
                )


class _Shuffle:
    """A shuffle buffer whose draw depends on the worker, and not on the process id and the clock."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return wds.shuffle(SHUFFLE, initial=SHUFFLE, seed=self.seed + _worker())(samples)


class _Caught:
    """The stream, with a fault as its last value instead of an exception. See `mmlong.datamodules.loader.fetched`."""

    def __call__(self, batches: Iterator[tuple[Batch, list[DataError]]]) -> Iterator[Fetched]:
        try:
            yield from batches
        except DataError as error:
            yield error


class _Fetch:
    """A list of raw samples to a batch."""

    def __init__(self, samples: Any, epoch: int) -> None:
        self.samples, self.epoch = samples, epoch

    def __call__(self, raw: list[dict[str, Any]]) -> tuple[Batch, list[DataError]]:
        return self.samples.fetch_members(self.epoch, raw)
