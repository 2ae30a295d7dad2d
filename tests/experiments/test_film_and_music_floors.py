"""The floors of films and of music, against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mmlong.datamodules.musicxml import HOLD, REST
from mmlong.experiments.floors import voices
from mmlong.experiments.floors.lossless_clips import CODERS, H264, coded, differences


def test_what_a_voice_sounds() -> None:
    piece = np.array([[REST, 60, HOLD, 62, REST, HOLD], [48, HOLD, HOLD, HOLD, 50, HOLD]], np.uint8)
    assert voices.sounding(piece).tolist() == [[REST, 60, 60, 62, REST, REST], [48, 48, 48, 48, 50, 50]]


def test_counts_of_contexts_by_hand() -> None:
    """a b a b a c: after a came b twice and c once; a context that was never seen counts nothing."""
    codes, before = np.array([1, 2, 1, 2, 1, 3]), np.array([130, 1, 2, 1, 2, 1])
    model = voices.Model([np.zeros(6, int), before], codes)
    hits, totals = model.seen([np.zeros(3, int), np.array([1, 1, 9])], np.array([2, 3, 1]))
    assert hits.tolist() == [[2, 1, 3], [2, 1, 0]]
    assert totals.tolist() == [[6, 6, 6], [3, 3, 0]]


def test_bits_are_those_of_the_smoothed_counts() -> None:
    seen = (np.array([[2.0, 0.0]]), np.array([[4.0, 0.0]]))
    ((val, test),) = voices.bits_by_depth(seen, seen)
    each = [[(h + a / 130) / (t + a) for h, t in ((2, 4), (0, 0))] for a in voices.ADDED]
    assert val == test == pytest.approx(min(-(math.log2(x) + math.log2(y)) / 2 for x, y in each))


def test_contexts_of_parts_know_nothing_of_what_is_to_come() -> None:
    """Another event changes no context up to its own."""
    draw = np.random.default_rng(0)
    piece = draw.integers(40, 80, (4, 12)).astype(np.uint8)
    piece[draw.random(piece.shape) < 0.5] = HOLD
    for contexts in (voices.token_contexts, voices.part_contexts):
        plain = np.stack(contexts(piece))
        for at in (0, 13, 30, 47):
            other = piece.copy()
            other[at % 4, at // 4] = 90
            changed = np.stack(contexts(other))
            assert np.array_equal(changed[:, : at + 1], plain[:, : at + 1])
            assert at == 47 or not np.array_equal(changed, plain)


def test_film_coders_are_without_loss_and_smaller_where_nothing_moves() -> None:
    av = pytest.importorskip("av", reason='needs PyAV: pip install "mmlong[video]"')
    still = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 32, 32), dtype=np.uint8), 8, 0)
    assert not differences(still)[1:].any()
    context = av.CodecContext.create("h264", "r")
    packets = [*map(av.Packet, coded(still, *H264)), None]
    planes = [frame.planes[0] for packet in packets for frame in context.decode(packet)]
    found = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :32] for plane in planes]
    assert np.array_equal(np.stack(found), still)
    one = CODERS["H.264 lossless"](still[:1])
    assert CODERS["H.264 lossless"](still) < 1.2 * one
    assert CODERS["PNG of differences"](still) < 0.3 * CODERS["PNG"](np.random.default_rng(1).integers(0, 256, still.shape, dtype=np.uint8))  # fmt: skip
