"""FASTA: indexes like samtools', any interval, and every kind of bad file with file, line and reason."""

from __future__ import annotations

import gzip
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.fasta import FaiEntry, Fasta, build_index, read_fai, write_fai

FEW = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text(records: dict[str, str], width: int = 7, ending: str = "\n", last: bool = True) -> str:
    """A FASTA file of these records."""
    lines = []
    for name, bases in records.items():
        lines.append(f">{name}")
        lines += [bases[start : start + width] for start in range(0, len(bases), width)]
    return ending.join(lines) + (ending if last else "")


def write(folder: Path, content: str | bytes, name: str = "a.fa") -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


BASES = st.text("ACGTNacgtnRYK", min_size=1, max_size=40)
RECORDS = st.dictionaries(st.sampled_from(["chr1", "chr2 two words", "X", "c|3.1"]), BASES, min_size=1)


@FEW
@given(RECORDS, st.integers(1, 12), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.data())
def test_any_interval_of_any_file(
    tmp_path: Path, records: dict[str, str], width: int, ending: str, last: bool, data: st.DataObject
) -> None:
    fasta = Fasta(write(tmp_path, text(records, width, ending, last)))
    assert fasta.lengths == {name.split()[0]: len(bases) for name, bases in records.items()}
    for name, bases in records.items():
        assert fasta.header(name.split()[0]) == name
        start = data.draw(st.integers(0, len(bases) - 1))
        stop = data.draw(st.integers(start + 1, len(bases)))
        assert bytes(fasta.fetch(name.split()[0], start, stop)).decode() == bases[start:stop]
        assert bytes(fasta.fetch(name.split()[0])).decode() == bases


@FEW
@given(RECORDS, st.integers(1, 12), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_index_is_samtools(tmp_path: Path, records: dict[str, str], width: int, ending: str, last: bool) -> None:
    pysam = pytest.importorskip("pysam")
    file = write(tmp_path, text(records, width, ending, last))
    fai = tmp_path / "a.fa.fai"
    fai.unlink(missing_ok=True)
    ours = tmp_path / "ours.fai"
    write_fai(build_index(file, file.read_bytes()), ours)
    pysam.faidx(str(file))
    assert ours.read_bytes() == fai.read_bytes()
    assert Fasta(file).index == read_fai(ours)  # samtools' own file is taken
    fai.unlink()


@FEW
@given(RECORDS, st.integers(1, 12))
def test_index_is_pyfaidx(tmp_path: Path, records: dict[str, str], width: int) -> None:
    pyfaidx = pytest.importorskip("pyfaidx")
    file = write(tmp_path, text(records, width))
    (tmp_path / "a.fa.fai").unlink(missing_ok=True)
    oracle = pyfaidx.Fasta(str(file), sequence_always_upper=False)
    assert read_fai(tmp_path / "a.fa.fai") == build_index(file, file.read_bytes())
    ours = Fasta(file)
    for name in oracle.keys():  # noqa: SIM118
        assert bytes(ours.fetch(name)).decode() == str(oracle[name][:])
    oracle.close()
    (tmp_path / "a.fa.fai").unlink()


def test_gzipped_is_the_same(tmp_path: Path) -> None:
    content = text({"a": "ACGT" * 30, "b": "NNacgtRY"})
    plain, packed = Fasta(write(tmp_path, content)), Fasta(write(tmp_path, gzip.compress(content.encode()), "a.fa.gz"))
    assert packed.index == plain.index
    assert bytes(packed.fetch("a", 3, 117)) == bytes(plain.fetch("a", 3, 117))
    cut = write(tmp_path, gzip.compress(content.encode() * 50)[:-20], "cut.fa.gz")
    with pytest.raises(DataError, match=r"cut.fa.gz: is gzipped and cannot be unpacked"):
        Fasta(cut)
    with pytest.raises(DataError, match=r"none.fa.gz: is empty"):
        Fasta(write(tmp_path, gzip.compress(b""), "none.fa.gz"))


def test_headers_are_whole(tmp_path: Path) -> None:
    fasta = Fasta(write(tmp_path, "\n>a1 of >a1 fame\nAC\n>a the other\nGT\n"))
    assert [fasta.header(name) for name in ("a1", "a")] == ["a1 of >a1 fame", "a the other"]


def test_blank_lines_may_follow_a_record(tmp_path: Path) -> None:
    fasta = Fasta(write(tmp_path, "\n>a\nACGT\nAC\n\n\n>b\nTT\n\n"))
    assert fasta.lengths == {"a": 6, "b": 2}
    assert bytes(fasta.fetch("a", 2, 6)) == b"GTAC"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a.fa: is empty"),
        ("\n\n", r"a.fa: holds no records"),
        ("ACGT\n>a\nACGT\n", r"a.fa \[line 1\]: text before the first '>': 'ACGT"),
        ("; note\n>a\nACGT\n", r"\[line 1\]: text before the first '>'"),
        (">a\nACGT\n>b\nAC\n>a\nGG\n", r"\[line 5\]: a second record named 'a'"),
        (">a one\nACGT\n>a two\nAC\n", r"\[line 3\]: a second record named 'a'"),
        (">a\nACGT\n>\nACGT\n", r"\[line 3\]: a record without a name"),
        (">a\nACGT\n> b\nACGT\n", r"\[line 3\]: a blank between '>' and the name 'b'"),
        (">a\n>b\nACGT\n", r"\[line 1\]: the record 'a' holds no bases"),
        (">a\nACGT\n>b\n", r"\[line 3\]: the record 'b' holds no bases"),
        (">a\nACGT\n>b", r"\[line 3\]: the record 'b' holds no bases"),
        (">a\nACGT\nAC\nACGT\n", r"\[line 3\]: a line of the record 'a' differs from its first, 4 bases and LF"),
        (">a\nACGT\nACGTA\n", r"\[line 3\]: a line of the record 'a' differs"),
        (">a\nACGT\nACGT\nACGTAC\n", r"\[line 4\]: a line of the record 'a' differs"),
        (">a\nACGT\n\nACGT\n", r"\[line 3\]: a line of the record 'a' differs"),
        (">a\n\nACGT\n", r"\[line 2\]: a blank line inside the record 'a'"),
        (
            ">a\r\nACGT\r\nACGT\nAC\r\n",
            r"\[line 3\]: a line of the record 'a' differs from its first, 4 bases and CRLF",
        ),
        (">a\nACGT\nACG\r\nAC\n", r"\[line 3\]: a line of the record 'a' differs"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Fasta(write(tmp_path, content))


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        ("ACGT\nA-GT\n", r"a.fa \[line 3\]: '-' at base 5 of 'b' is a gap"),
        ("ACGT\nAC.T\n", r"\[line 3\]: '\.' at base 6 of 'b' is a gap"),
        ("MKVL\nALTP\n", r"\[line 2\]: 'L' at base 3 of 'b' is no nucleotide; is this protein\?"),
        ("ACGT\nACG7\n", r"\[line 3\]: '7' at base 7 of 'b' is no nucleotide"),
        ("ACGT\nAC T\n", r"\[line 3\]: ' ' at base 6 of 'b' is no nucleotide"),
    ],
)
def test_bad_letters(tmp_path: Path, bases: str, message: str) -> None:
    fasta = Fasta(write(tmp_path, f">b x\n{bases}"))
    with pytest.raises(DataError, match=message):
        fasta.fetch("b")


def test_bad_intervals(tmp_path: Path) -> None:
    fasta = Fasta(write(tmp_path, text({"chr1": "ACGT" * 5, "chr2": "AC"})))
    for start, stop in ((0, 21), (5, 5), (6, 5), (-1, 4), (20, None)):
        with pytest.raises(DataError, match=r"in 'chr1', which has 20 bases"):
            fasta.fetch("chr1", start, stop)
    with pytest.raises(DataError, match=r"has no record 'chr'; did you mean 'chr\d'\? \(it has chr1, chr2\)"):
        fasta.fetch("chr")
    with pytest.raises(DataError, match="is missing"):
        Fasta(tmp_path / "nowhere.fa")


def test_an_index_of_another_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, text({"a": "ACGT" * 5, "b": "ACGTACG"}))
    fai = tmp_path / "a.fa.fai"
    write_fai(build_index(file, file.read_bytes()), fai)
    assert Fasta(file).lengths == {"a": 20, "b": 7}
    write(tmp_path, text({"a": "ACGT" * 6, "b": "ACGTACG"}))
    with pytest.raises(DataError, match=r"a.fa.fai \[b\]: is not the index of .*a.fa as it is now"):
        Fasta(file)
    fai.write_text("a\t20\t3\n")
    with pytest.raises(DataError, match=r"a.fa.fai \[line 1\]: is no line of an index"):
        Fasta(file)
    fai.write_text("a\t20\t3\t0\t0\n")
    with pytest.raises(DataError, match="makes no sense"):
        Fasta(file)
    assert FaiEntry(20, 3, 7, 8).place(8) == 12


def _fetch(fasta: Fasta) -> bytes:
    return bytes(fasta.fetch("a", 10, 30))


@pytest.mark.parametrize("zipped", [False, True])
def test_shared_by_processes(tmp_path: Path, zipped: bool) -> None:
    content = text({"a": "ACGTT" * 20}).encode()
    fasta = Fasta(write(tmp_path, gzip.compress(content) if zipped else content))
    assert _fetch(pickle.loads(pickle.dumps(fasta))) == _fetch(fasta) == (b"ACGTT" * 20)[10:30]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_fetch_inherited(fasta), range(8)) == [_fetch(fasta)] * 8


class _fetch_inherited:  # noqa: N801
    def __init__(self, fasta: Fasta) -> None:
        self.fasta = fasta

    def __call__(self, _: int) -> bytes:
        return _fetch(self.fasta)


def test_large_records_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlong.datamodules import fasta as module

    monkeypatch.setattr(module, "_SCAN", 64)
    bases = np.random.default_rng(0).choice(list("ACGT"), 1000)
    fasta = Fasta(write(tmp_path, text({"a": "".join(bases)}, 11)))
    assert bytes(fasta.fetch("a", 5, 990)).decode() == "".join(bases[5:990])
    content = text({"a": "".join(bases)}, 11).split("\n")
    content[50] = content[50][:-1]
    with pytest.raises(DataError, match=r"\[line 51\]: a line of the record 'a' differs"):
        Fasta(write(tmp_path, "\n".join(content), "b.fa"))
