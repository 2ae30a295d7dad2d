"""Which sample goes where: the order of training and of evaluation, as pure functions.

Training. `epoch_order(shard_sizes, seed, epoch, batch)` is the whole epoch as a list of sample ids. Global batch ``g``
is ``order[g * batch : (g + 1) * batch]`` and rank ``r`` of ``world`` takes its ``r``-th part of it, so the same global
batches come whatever the number of ranks, and a run can go on with another number of them. Nothing here remembers
anything: a position in training is an epoch and a count of samples.

* *Local*: shards are permuted, then samples are permuted inside windows of a few shards, so that reading touches a few
  files at a time.
* *Alike*, where it is asked for: samples of like length share a batch (`like_lengths`).
* *Equal*: every rank has the same number of steps. What does not fill a last global batch, ``N mod batch`` samples, is
  left out of the epoch: the declared tail. Tails are consecutive stretches of one fixed permutation, epoch after epoch,
  so each sample is left out once in ``N`` left-out places: none is starved, and across any ``N // tail`` consecutive
  epochs none is left out twice.

Evaluation. `evaluation_plan` visits every sample exactly once, in order. Ranks have equal steps and equal batch sizes;
the places that are left over are filled with a repeated sample of weight 0. With one rank there are none.

Random numbers are raw words of numpy's Philox, whose stream is fixed across versions and machines; its `Generator`
methods do not promise that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 4  # shards whose samples are mixed


def random_words(count: int, *key: int) -> np.ndarray:
    """``(count,)`` uint64 words, a pure function of ``key`` (non-negative integers)."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of ``range(count)``, a pure function of ``key``."""
    return np.argsort(random_words(count, *key), kind="stable")


def steps_per_epoch(samples: int, batch: int) -> int:
    """Full global batches in an epoch.

    Raises:
        ValueError: there is not even one.
    """
    if batch < 1:
        raise ValueError(f"a global batch of {batch} samples")
    if samples < batch:
        raise ValueError(
            f"{samples} training samples do not fill one global batch of {batch} (batch size x ranks); lower data.batch_size, so that it is at most {samples}"
        )
    return samples // batch


def tail(samples: int, seed: int, epoch: int, batch: int) -> np.ndarray:
    """Ids left out of an epoch: ``(samples mod batch,)``. They rotate, see the module's docstring."""
    count = samples % batch
    places = (epoch * count + np.arange(count)) % samples
    return permutation(samples, seed, 1)[places]


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, batch: int, window: int = WINDOW) -> np.ndarray:
    """The sample ids of one epoch, in order; a multiple of ``batch`` of them, none twice.

    Args:
        shard_sizes: samples in each shard; ids count through the shards.
        seed: of the run, >= 0.
        epoch: from 0.
        batch: samples in a global batch, all ranks together.
        window: how many shards' samples are mixed.

    Returns:
        ``(steps * batch,)`` int64.

    Raises:
        ValueError: the samples do not fill one batch.
    """
    sizes = np.asarray(shard_sizes, np.int64)
    samples = int(sizes.sum())
    steps_per_epoch(samples, batch)
    starts = np.cumsum(sizes) - sizes
    shards = permutation(len(sizes), seed, 2, epoch)
    keep = np.ones(samples, bool)
    keep[tail(samples, seed, epoch, batch)] = False
    words = random_words(samples, seed, 3, epoch)
    parts = []
    for first in range(0, len(shards), window):
        ids = np.concatenate([starts[shard] + np.arange(sizes[shard]) for shard in shards[first : first + window]])
        ids = ids[keep[ids]]
        parts.append(ids[np.argsort(words[ids], kind="stable")])
    return np.concatenate(parts)


def like_lengths(order: np.ndarray, lengths: np.ndarray, batch: int, pool: int, seed: int, epoch: int) -> np.ndarray:
    """The same samples with those of like length in one batch, so that little is padded.

    ``pool`` batches at a time, as they came, are sorted by length and cut into batches again, and all batches of the epoch are then shuffled. Which samples meet is drawn anew each epoch, as long as an epoch has several pools.

    Args:
        order: of an epoch (`epoch_order`), a multiple of ``batch``.
        lengths: ``(N,)`` of each sample.
        batch: samples in a global batch.
        pool: batches that are sorted together, at least 1.
        seed, epoch: of the run, from 0.

    Returns:
        ids as long as ``order``.
    """
    size = pool * batch
    parts = [order[first : first + size] for first in range(0, len(order), size)]
    batches = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts]).reshape(-1, batch)
    return batches[permutation(len(batches), seed, 13, epoch)].reshape(-1)


def rank_batch(order: np.ndarray, done: int, batch: int, rank: int, world: int) -> np.ndarray:
    """Ids rank ``rank`` of ``world`` takes from the global batch that begins after ``done`` samples: ``(batch / world,)``."""
    share = batch // world
    return order[done + rank * share : done + (rank + 1) * share]


@dataclass(frozen=True)
class EvaluationBatch:
    """Ids of one batch on one rank, and the weight of each: 1, or 0 where it only fills a place."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def evaluation_steps(samples: int, batch_size: int, world: int) -> int:
    """Steps every rank takes to see ``samples`` once."""
    return -(-samples // (batch_size * world))


def evaluation_plan(samples: int, batch_size: int, rank: int, world: int) -> Iterator[EvaluationBatch]:
    """The batches of one rank. Over all ranks every sample has weight 1 exactly once.

    All ranks yield equally many batches, and the k-th has the same size on each. Only the last can hold fillers, at
    most ``world - 1`` in all ranks together.
    """
    for step in range(evaluation_steps(samples, batch_size, world)):
        first = step * batch_size * world
        share = min(batch_size, -(-(samples - first) // world))
        places = [first + rank * share + place for place in range(share)]
        yield EvaluationBatch(
            ids=tuple(min(place, samples - 1) for place in places),
            weights=tuple(float(place < samples) for place in places),
        )
