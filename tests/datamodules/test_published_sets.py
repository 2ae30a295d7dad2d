"""Readers of sets that a user brings: miniatures in the published form are packed and read back; what is not the published form is refused."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from mmlong.datamodules import corpora, genome_benchmarks
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.genome_tasks import GENOMIC_BENCHMARKS, NUCLEOTIDE_TRANSFORMER
from mmlong.datamodules.known import MODULES, known_sequences
from mmlong.datamodules.pack_sequences import pack_known_sequences
from mmlong.datamodules.packed import verify

from mmlong.cli.pack import run_pack


def counts(dataset: object) -> dict[str, int]:
    return {name: split["samples"] for name, split in dataset.manifest["splits"].items()}  # type: ignore[attr-defined]


# text


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A thousand letters in place of 10^8."""
    text = bytes(97 + (7 * i) % 26 for i in range(1000))
    monkeypatch.setattr(corpora, "STRETCHES", {"train": (0, 900), "val": (900, 950), "test": (950, 1000)})
    monkeypatch.setitem(corpora.MD5, "text8", hashlib.md5(text).hexdigest())
    corpora._whole.cache_clear()
    return text


@pytest.mark.parametrize("form", ["file", "zip", "folder", "folder with the zip"])
def test_a_stretch_is_cut_where_everybody_cuts_it(form: str, small: bytes, tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    (place / "text8").write_bytes(small)
    if "zip" in form:
        with zipfile.ZipFile(place / "text8.zip", "w") as archive:
            archive.write(place / "text8", "text8")
        (place / "text8").unlink()
    given = {"file": place / "text8", "zip": place / "text8.zip"}.get(form, place)
    dataset = pack_known_sequences("text8", tmp_path / "out", given)
    assert counts(dataset) == {"train": 1, "val": 1, "test": 1}
    parts = {r.split: r.load() for r in corpora.load_stretch("text8", given).records}
    assert parts["train"] + parts["val"] + parts["test"] == small
    assert verify(tmp_path / "out") == []


def test_a_stretch_that_is_not_the_published_one(small: bytes, tmp_path: Path) -> None:
    (tmp_path / "text8").write_bytes(small[:-1] + b"!")
    with pytest.raises(DataError, match=r"is not the published text8: 1,000 bytes with MD5 \w+, should be 100,000,000"):
        corpora.load_stretch("text8", tmp_path / "text8")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(DataError, match="holds no text8, but readme"):
        corpora.load_stretch("text8", tmp_path / "other.zip")
    with pytest.raises(DataError, match="is missing; give enwik8 or enwik8.zip"):
        corpora.load_stretch("enwik8", tmp_path / "nowhere")
    with pytest.raises(DataError, match="is in no package"):
        corpora.load_stretch("enwik8", None)


def test_books_have_their_own_splits_and_words(tmp_path: Path) -> None:
    for number, folder in enumerate(("train", "train", "validation", "test")):
        file = tmp_path / "pg19" / folder / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("one  two\nthree" * (number + 1))
    dataset = pack_known_sequences("pg19", tmp_path / "out", tmp_path / "pg19")
    assert counts(dataset) == {"train": 2, "val": 1, "test": 1}
    assert {r.name: r.extra["words"] for r in corpora.load_books(tmp_path / "pg19").records} == {
        "train/0.txt": 3, "train/1.txt": 5, "validation/2.txt": 7, "test/3.txt": 9,
    }  # fmt: skip
    (tmp_path / "pg19" / "test" / "3.txt").unlink()
    with pytest.raises(DataError, match=r"test: holds no \.txt"):
        corpora.load_books(tmp_path / "pg19")


# DNA


def benchmark(folder: Path, parts: dict[str, dict[str, list[str]]]) -> Path:
    for part, classes in parts.items():
        for name, sequences in classes.items():
            for number, letters in enumerate(sequences):
                file = folder / part / name / f"{number}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(letters + "\n")
    return folder


def drawn(seed: int, count: int) -> list[str]:
    digest = "".join(hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(count))
    return [digest[64 * i : 64 * i + 64].translate(str.maketrans("0123456789abcdef", "ACGT" * 4)) for i in range(count)]


def test_genomic_benchmarks(tmp_path: Path) -> None:
    a, b = drawn(1, 12), drawn(2, 12)
    twin = a[0][::-1].translate(str.maketrans("ACGT", "TGCA"))  # its other strand
    place = benchmark(
        tmp_path / "all" / "human_enhancers_cohn",
        {
            "train": {"negative": [*a[:8], twin, b[9]], "positive": b[:8]},
            "test": {"negative": a[8:10], "positive": b[8:10]},
        },
    )
    for given in (place, tmp_path / "all"):
        source = known_sequences("gb-human_enhancers_cohn").load(str(given))
        assert source.labels == {"label": ("negative", "positive")}
        assert Counter((r.split, r.labels["label"]) for r in source.records) == {
            (None, 0): 10, (None, 1): 8, ("test", 0): 2, ("test", 1): 2,
        }  # fmt: skip
        assert source.about == {"in_both": 2}
        groups = {r.name: r.group for r in source.records}
        assert groups["train/negative/0.txt"] == groups["train/negative/8.txt"]
    dataset = pack_known_sequences("gb-human_enhancers_cohn", tmp_path / "out", place, splits={"val": 4})
    assert counts(dataset) == {"train": 14, "val": 4, "test": 4}
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("form", ["fna", "csv"])
def test_nucleotide_transformer_tasks(form: str, tmp_path: Path) -> None:
    place = tmp_path / "enhancers_types"
    place.mkdir()
    for part, count in (("train", 9), ("test", 3)):
        rows = [(letters, i % 3) for i, letters in enumerate(drawn(len(part), count))]
        if form == "fna":
            (place / f"{part}.fna").write_text("".join(f">seq{i}|{y}\n{x}\n" for i, (x, y) in enumerate(rows)))
        else:
            (place / f"{part}.csv").write_text("name,sequence,label\n" + "".join(f"s,{x},{y}\n" for x, y in rows))
    source = known_sequences("nt-enhancers_types").load(str(tmp_path))
    assert [r.labels["label"] for r in source.records] == [*(i % 3 for i in range(9)), 0, 1, 2]
    assert [r.load().decode() for r in source.records if r.split == "test"] == drawn(4, 3)
    assert run_pack(["nt-enhancers_types", str(tmp_path / "out"), "--source-path", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]["test"]["samples"] == 3


def test_tasks_that_are_not_as_published(tmp_path: Path) -> None:
    gb, nt = (known_sequences(name) for name in ("gb-human_ocr_ensembl", "nt-H3"))
    for known in (gb, nt):
        with pytest.raises(DataError, match="is in no package"):
            known.load(None)
    with pytest.raises(DataError, match=r"holds no CLASS/\*\.txt"):
        gb.load(str(tmp_path))
    with pytest.raises(DataError, match=r"holds neither train\.fna nor train\.csv"):
        nt.load(str(tmp_path))
    place = benchmark(tmp_path / "gb", {"train": {"maybe": ["ACGT"]}, "test": {"negative": ["ACGA"]}})
    with pytest.raises(DataError, match=r"\[train/maybe/0\.txt\]: has a class 'maybe'; human_ocr_ensembl has negative"):
        gb.load(str(place))
    wrong = benchmark(tmp_path / "w", {p: {"negative": ["ACGT", "ACEF", ""]} for p in ("train", "test")})
    records = gb.load(str(wrong)).records
    for record, message in zip(records[1:3], ("'E' is no nucleotide", "is empty"), strict=True):
        with pytest.raises(DataError, match=message):
            record.load()
    (tmp_path / "train.csv").write_text("letters,label\nACGT,0\n")
    with pytest.raises(DataError, match="needs columns sequence and label; it has letters, label"):
        nt.load(str(tmp_path))


def test_every_task_has_a_name() -> None:
    names = {*(f"gb-{task}" for task in GENOMIC_BENCHMARKS), *(f"nt-{task}" for task in NUCLEOTIDE_TRANSFORMER)}
    assert names == set(genome_benchmarks.KNOWN) == {name for name, at in MODULES.items() if at == "genome_benchmarks"}
    assert (len(GENOMIC_BENCHMARKS), len(NUCLEOTIDE_TRANSFORMER)) == (9, 23)
