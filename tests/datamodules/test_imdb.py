"""IMDb as its authors pack it: the official test, reviews to the byte, and a validation split that is not the test."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmlong.datamodules import imdb
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.splits import split_items


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    for split, count in (("train", 7), ("test", 4)):
        for kind in ("pos", "neg"):
            folder = tmp_path / "aclImdb" / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}_{9 if kind == 'pos' else 2}.txt").write_bytes(
                    f"{split} {kind} {number}<br />caf\xe9".encode()
                )
    (tmp_path / "aclImdb" / "train" / "unsup").mkdir()
    (tmp_path / "aclImdb" / "train" / "pos" / "urls.txt").write_text("not a review")
    return tmp_path


@pytest.mark.parametrize("below", ["", "aclImdb"])
def test_reviews(reviews: Path, below: str) -> None:
    source = imdb.load(str(reviews / below))
    assert len(source.records) == 22
    parts = split_items(source.records, {"val": 4}, 0)
    assert {split: len(part) for split, part in parts.items()} == {"train": 10, "val": 4, "test": 8}
    assert all(record.name.startswith("test/") == (split == "test") for split, part in parts.items() for record in part)
    for record in source.records:
        kind, number = record.name.split("/")[1], record.name.split("/")[2].split("_")[0]
        assert record.labels["sentiment"] == (kind == "pos")
        assert record.load() == f"{record.name.split('/')[0]} {kind} {number}<br />caf\xe9".encode()


def test_what_is_missing_is_told(reviews: Path) -> None:
    with pytest.raises(DataError, match="--data.source_path aclImdb"):
        imdb.load()
    with pytest.raises(DataError, match="has no train/pos"):
        imdb.load(str(reviews / "aclImdb" / "train"))
    for file in (reviews / "aclImdb" / "test" / "neg").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="holds no reviews"):
        imdb.load(str(reviews))
