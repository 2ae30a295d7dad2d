"""Which stretches samples are: every token where it must be, pure functions of (seed, epoch, sample)."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules.order import rank_batch
from mmlong.datamodules.windows import Piece, Stream, Whole

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def tokens(pieces: tuple[Piece, ...]) -> list[tuple[int, int]]:
    """(document, place) of every token, in order."""
    return [(piece.document, place) for piece in pieces for place in range(piece.start, piece.stop)]


def everything(lengths: list[int]) -> list[tuple[int, int]]:
    return [(document, place) for document, length in enumerate(lengths) for place in range(length)]


@settings(deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 60))
def test_evaluation_reads_every_token_once_in_order(lengths: list[int], length: int) -> None:
    stream = Stream(lengths, length, train=False, seed=3)
    rows = [tokens(stream.pieces(epoch=5, sample=row)) for row in range(len(stream))]
    assert [token for row in rows for token in row] == everything(lengths)
    assert all(len(row) == length for row in rows[:-1])
    assert 1 <= len(rows[-1]) <= length


@settings(deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 60), seed=st.integers(0, 5), epoch=st.integers(0, 4))
def test_training_reads_every_token_in_full_rows(lengths: list[int], length: int, seed: int, epoch: int) -> None:
    stream = Stream(lengths, length, train=True, seed=seed)
    rows = [stream.pieces(epoch, row) for row in range(len(stream))]
    counts = Counter(token for row in rows for token in tokens(row))
    assert set(counts) == set(everything(lengths))
    assert {len(tokens(row)) for row in rows} == {min(length, sum(lengths))}
    assert len(rows) <= -(-sum(lengths) // length) + 1
    for row in rows:
        assert all(len(piece) > 0 for piece in row)
        for before, after in pairwise(row):  # within a row a new piece is a new document
            assert before.stop == lengths[before.document]
            assert after.start == 0
    # The rows lie in one order of the documents: its bounds do not depend on which row was asked for first.
    again = Stream(lengths, length, train=True, seed=seed)
    assert [again.pieces(epoch, row) for row in reversed(range(len(stream)))] == rows[::-1]
    assert [pickle.loads(pickle.dumps(stream)).pieces(epoch, row) for row in range(len(stream))] == rows


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(5, 35))
    seen = {
        (seed, epoch): tuple(Stream(lengths, 16, True, seed).pieces(epoch, row) for row in range(10))
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(set(seen.values())) == 12
    phases = {Stream([1000], 16, True, 0).pieces(epoch, 1)[0].start for epoch in range(200)}
    assert phases == set(range(1, 17))  # every phase comes


@given(length=st.integers(1, 30), total=st.integers(1, 200), epoch=st.integers(0, 5))
def test_one_long_document_gives_contiguous_rows(length: int, total: int, epoch: int) -> None:
    stream = Stream([total], length, train=True, seed=1)
    for row in range(len(stream)):
        (piece,) = stream.pieces(epoch, row)
        assert 0 <= piece.start < piece.stop <= total


@settings(deadline=None)
@given(
    lengths=LENGTHS, limit=st.one_of(st.none(), st.integers(1, 50)), train=st.booleans(), epoch=st.integers(0, 5),
    crop=st.sampled_from(["head", "middle"]),
)  # fmt: skip
def test_whole_documents(lengths: list[int], limit: int | None, train: bool, epoch: int, crop: str) -> None:
    windows = Whole(lengths, limit, train, 2, crop)
    assert len(windows) == len(lengths)
    for sample, length in enumerate(lengths):
        (piece,) = windows.pieces(epoch, sample)
        assert piece.document == sample
        assert len(piece) == min(length, limit or length) <= windows.longest
        assert 0 <= piece.start <= piece.stop <= length
        assert Whole(lengths, limit, train, 2, crop).pieces(epoch, sample) == (piece,)
        if not train:
            assert piece.start == (0 if crop == "head" else (length - len(piece)) // 2)


def test_crops_of_training_lie_anywhere() -> None:
    windows = Whole([10, 10], 4, True, 0)
    starts = Counter(windows.pieces(epoch, 1)[0].start for epoch in range(700))
    assert set(starts) == set(range(7))
    assert min(starts.values()) > 60  # 100 each, were they equal
    assert [windows.pieces(epoch, 0) for epoch in range(9)] != [
        (Piece(0, piece.start, piece.stop),) for epoch in range(9) for piece in windows.pieces(epoch, 1)
    ]


def test_arguments_that_make_no_sense() -> None:
    for lengths in ([], [3, 0]):
        with pytest.raises(ValueError, match="at least one token each"):
            Whole(lengths, None, False)
    with pytest.raises(ValueError, match="a length of 0"):
        Stream([3], 0, False)
    with pytest.raises(ValueError, match="crop is 'tail'; it can be head or middle"):
        Whole([3], 2, False, 0, "tail")
    with pytest.raises(IndexError, match="row 2 of 2"):
        Stream([3], 2, False).pieces(0, 2)


@settings(deadline=None)
@given(
    lengths=LENGTHS, length=st.integers(1, 20), slots=st.integers(1, 5), seed=st.integers(0, 3), epoch=st.integers(0, 4)
)
def test_slots_read_contiguous_stretches(lengths: list[int], length: int, slots: int, seed: int, epoch: int) -> None:
    plain = Stream(lengths, length, train=True, seed=seed)
    if len(plain) < slots:
        with pytest.raises(ValueError, match="do not fill one global batch"):
            Stream(lengths, length, train=True, seed=seed, slots=slots)
        return
    stream = Stream(lengths, length, train=True, seed=seed, slots=slots)
    assert len(stream) == len(plain)
    steps = len(stream) // slots
    batches = stream.slot_order(epoch).reshape(steps, slots).tolist()
    chosen = sorted(row for batch in batches for row in batch)
    assert chosen == list(range(chosen[0], chosen[0] + steps * slots))  # only ends of the stream are left out
    assert 0 <= chosen[0] <= chosen[-1] < len(stream)
    # The documents in this epoch's order, as one list of tokens without what the inwards rows repeat.
    line = list(dict.fromkeys(token for row in range(len(stream)) for token in tokens(stream.pieces(epoch, row))))
    assert batches == pickle.loads(pickle.dumps(stream)).slot_order(epoch).reshape(steps, slots).tolist()
    for slot in range(slots):
        dropped = 0
        for step in range(steps):
            row = batches[step][slot]
            goes_on = stream.continues(epoch, row)
            if step == 0:
                assert not goes_on
                continue
            before, here = (tokens(stream.pieces(epoch, batches[s][slot])) for s in (step - 1, step))
            at = line.index(before[-1]) + 1
            assert goes_on == (line[at : at + len(here)] == here)
            dropped += not goes_on
        assert dropped <= 3  # next to the rows that were moved inwards, one at the beginning and up to two at the end


def test_slots_leave_out_another_end_each_epoch() -> None:
    stream = Stream([103], 10, True, 0, slots=4)  # 12 rows, none left out; then 11 rows, 3 left out
    assert {stream.slot_order(epoch)[0] for epoch in range(9)} == {0}
    stream = Stream([97], 10, True, 0, slots=4)
    seen = {row for epoch in range(40) for row in stream.slot_order(epoch).tolist()}
    assert len(stream) == 11
    assert seen == set(range(11))


@given(share=st.integers(1, 3), world=st.integers(1, 3), epoch=st.integers(0, 3))
def test_every_rank_keeps_its_slots(share: int, world: int, epoch: int) -> None:
    slots = share * world
    stream = Stream([400, 31, 200], 10, True, 1, slots=slots)
    order = stream.slot_order(epoch)
    for rank in range(world):
        batches = [rank_batch(order, done, slots, rank, world).tolist() for done in range(0, len(order), slots)]
        assert all(len(batch) == share for batch in batches)
        for before, after in pairwise(batches):
            assert after == [row + 1 for row in before]
