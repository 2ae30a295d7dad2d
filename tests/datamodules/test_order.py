"""Exactly once: the order of training and evaluation, as properties."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmlong.datamodules.order import (
    epoch_order,
    evaluation_plan,
    evaluation_steps,
    like_lengths,
    permutation,
    rank_batch,
    steps_per_epoch,
    tail,
)

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@settings(deadline=None)
@given(
    sizes=SIZES, seed=st.integers(0, 2**40), share=st.integers(1, 9), world=st.integers(1, 5), window=st.integers(1, 5)
)
def test_each_sample_once_but_the_declared_tail(
    sizes: list[int], seed: int, share: int, world: int, window: int
) -> None:
    samples, batch = sum(sizes), share * world
    assume(samples >= batch)
    orders = []
    for epoch in range(3):
        order = epoch_order(sizes, seed, epoch, batch, window)
        seen = [
            int(sample)
            for first in range(0, len(order), batch)
            for rank in range(world)
            for sample in rank_batch(order, first, batch, rank, world)
        ]
        left_out = tail(samples, seed, epoch, batch).tolist()
        assert len(seen) == steps_per_epoch(samples, batch) * batch
        assert sorted(seen + left_out) == list(range(samples))
        orders.append(order)
    if samples > 40 and batch < 20:
        assert not np.array_equal(orders[0], orders[1])


@settings(deadline=None)
@given(st.data(), st.integers(1, 30), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_like_lengths_share_a_batch(data: st.DataObject, batches: int, batch: int, pool: int, seed: int) -> None:
    """No sample is lost, and within a pool no batch has a length between those of another."""
    lengths = np.array(data.draw(st.lists(st.integers(1, 9), min_size=batches * batch, max_size=batches * batch)))
    order = epoch_order([len(lengths)], seed, 0, batch)
    found = like_lengths(order, lengths, batch, pool, seed, 0)
    assert sorted(found.tolist()) == sorted(order.tolist())
    of_batches = {frozenset(ids.tolist()): lengths[ids] for ids in found.reshape(-1, batch)}
    for first in range(0, len(order), pool * batch):
        here = set(order[first : first + pool * batch].tolist())
        spans = sorted((both.min(), both.max()) for ids, both in of_batches.items() if ids <= here)
        assert len(spans) == len(here) // batch
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
    if batches >= 20 and pool < 5:
        assert (
            found.tolist()
            != like_lengths(epoch_order([len(lengths)], seed, 1, batch), lengths, batch, pool, seed, 1).tolist()
        )


@settings(deadline=None)
@given(samples=st.integers(1, 200), batch=st.integers(1, 50), seed=st.integers(0, 99))
def test_the_tail_rotates_and_starves_nobody(samples: int, batch: int, seed: int) -> None:
    assume(samples >= batch)
    count = samples % batch
    assume(count > 0)
    epochs = samples // count
    left_out = np.concatenate([tail(samples, seed, epoch, batch) for epoch in range(epochs)])
    assert len(set(left_out.tolist())) == len(left_out)  # nobody twice while there is somebody who never was
    whole_rounds = np.concatenate([tail(samples, seed, epoch, batch) for epoch in range(samples)])
    assert set(np.bincount(whole_rounds, minlength=samples).tolist()) == {count}


@given(sizes=SIZES, seed=st.integers(0, 99), share=st.integers(1, 4))
def test_global_batches_do_not_depend_on_the_number_of_ranks(sizes: list[int], seed: int, share: int) -> None:
    batch = share * 6
    assume(sum(sizes) >= batch)
    order = epoch_order(sizes, seed, 1, batch)
    parts = [
        np.concatenate([rank_batch(order, 0, batch, rank, world) for rank in range(world)]) for world in (1, 2, 3, 6)
    ]
    assert all(np.array_equal(part, parts[0]) for part in parts)


@settings(deadline=None)
@given(samples=st.integers(1, 150), batch_size=st.integers(1, 17), world=st.integers(1, 6))
def test_evaluation_counts_each_sample_once(samples: int, batch_size: int, world: int) -> None:
    plans = [list(evaluation_plan(samples, batch_size, rank, world)) for rank in range(world)]
    steps = evaluation_steps(samples, batch_size, world)
    assert all(len(plan) == steps for plan in plans)
    for step in zip(*plans, strict=True):
        assert len({len(batch.ids) for batch in step}) == 1
        assert 1 <= len(step[0].ids) <= batch_size
    counted = [
        sample
        for plan in plans
        for batch in plan
        for sample, weight in zip(batch.ids, batch.weights, strict=True)
        if weight
    ]
    assert sorted(counted) == list(range(samples))
    fillers = sum(weight == 0 for plan in plans for batch in plan for weight in batch.weights)
    assert fillers < world


def test_order_stays_inside_windows_of_shards() -> None:
    sizes = [10] * 8
    order = epoch_order(sizes, 0, 0, 1, window=2)
    shard_of = order // 10
    for first in range(0, 80, 20):
        assert len(set(shard_of[first : first + 20].tolist())) == 2


def test_order_is_the_same_on_every_machine() -> None:
    # Philox words are fixed by numpy's compatibility policy; a change here would break the resume of every old run.
    assert permutation(8, 1, 2, 3).tolist() == PINNED
    assert permutation(8, 1, 2, 4).tolist() != PINNED


PINNED = [1, 2, 4, 6, 5, 0, 7, 3]


def test_too_few_samples_is_said() -> None:
    with pytest.raises(ValueError, match="5 training samples do not fill one global batch of 6"):
        epoch_order([2, 3], 0, 0, 6)
