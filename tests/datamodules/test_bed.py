"""BED intervals: what is read, and what is refused with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules.bed import Interval, read_bed
from mmlong.datamodules.errors import DataError

LENGTHS = {"chr1": 1000, "chr2": 50}


def write(folder: Path, content: str | bytes) -> Path:
    file = folder / "a.bed"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_what_is_read(tmp_path: Path) -> None:
    content = (
        "# made by hand\ntrack name=x\nbrowser position chr1\nchr1\t0\t10\n\nchr1\t5\t1000\tgene a\t0\t-\textra\tmore\r\n"
        "chr2 1 50 b\nchr1\t7\t9\tc\t.\t+"
    )
    expected = [
        Interval("chr1", 0, 10, "", ".", 4), Interval("chr1", 5, 1000, "gene a", "-", 6),
        Interval("chr2", 1, 50, "b", ".", 7), Interval("chr1", 7, 9, "c", "+", 8),
    ]  # fmt: skip
    assert read_bed(write(tmp_path, content), LENGTHS) == expected
    assert read_bed(write(tmp_path, gzip.compress(content.encode()))) == expected
    assert [str(each) for each in expected[:2]] == ["chr1:0-10", "chr1:5-1000(-)"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 100), st.sampled_from("+-.")), min_size=1, max_size=20))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, str]]) -> None:
    lines = [f"chr1\t{start}\t{start + size}\tn\t0\t{strand}" for start, size, strand in rows]
    file = write(tmp_path_factory.mktemp("bed"), "\n".join(lines))
    assert [(each.start, each.end - each.start, each.strand) for each in read_bed(file, LENGTHS)] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("chr1\t0\t10\nchr1\t5\n", r"a.bed \[line 2\]: has 2 columns; an interval needs chromosome, start and end"),
        ("chr1\tx\t10\n", r"\[line 1\]: the start 'x' is not a whole number"),
        ("chr1\t1\t1e3\n", r"\[line 1\]: the end '1e3' is not a whole number"),
        ("chr1\t-1\t10\n", r"\[line 1\]: the start '-1' is not a whole number"),
        ("chr1\t10\t10\n", r"\[line 1\]: start 10 is not before end 10"),
        ("chr1\t11\t10\n", r"\[line 1\]: start 11 is not before end 10"),
        ("chr1\t0\t9\tn\t0\t*\n", r"\[line 1\]: the strand '\*' is none of"),
        ("chr3\t0\t9\n", r"\[line 1\]: unknown chromosome 'chr3'; did you mean 'chr\d'\?"),
        ("#\nchr2\t0\t51\n", r"\[line 2\]: 0-51 goes beyond the end of 'chr2', which has 50 bases"),
        ("# nothing\n", r"a.bed: holds no intervals"),
        (b"\xff\xfe\x00", r"a.bed: is no text"),
        (b"\x1f\x8b\x00", r"a.bed: is no text"),
    ],
)
def test_bad_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_bed(write(tmp_path, content), LENGTHS)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        read_bed(tmp_path / "none.bed")
