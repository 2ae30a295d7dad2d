"""Pairs of documents: the AAN's files line by line, the stand-in by its definition, and batches of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmlong.datamodules.aan import AAN, FILES
from mmlong.datamodules.document_pairs import DocumentPairDataModule
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.stdlib_pairs import StdlibPairs

SMALL = {"train_count": 12, "val_count": 4, "test_count": 6}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eighty files of 1,200 bytes or more, no two stretches alike."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(80):
        (folder / f"file{number}.py").write_text(
            "".join(f"x{number}_{line} = {line}\n" for line in range(100 + number))
        )
    return str(folder)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for name, count in zip(FILES.values(), (8, 3, 4), strict=True):
        lines = [
            f'{number % 2}.0\tA{number}\tB{number}\tfirst "{number}\tsecond text {number}' for number in range(count)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_release(release: Path) -> None:
    module = DocumentPairDataModule("aan", str(release), length=9, batch_size=4)
    module.setup("fit")
    assert module.info()["class_names"] == ["unrelated", "related"]
    batches = list(module.train_dataloader())
    assert sum(len(b["label"]) for b in batches) == 8
    for batch in batches:
        for row, length, at, label, index in zip(*(batch[k] for k in ("raw", "lengths", "second_at", "label", "index")), strict=True):  # fmt: skip
            text = bytes(row[:length].tolist())
            assert text[:at] == f'first "{index}'.encode()[:9]
            assert text[at:] == f"second text {index}".encode()[:9]
            assert not row[length:].any()
            assert label == index % 2
    assert [len(list(b["label"])) for b in module.test_dataloader()] == [4]


def test_the_release_when_it_is_wrong(release: Path) -> None:
    file = release / "lra_release" / "tsv_data" / FILES["val"]
    file.write_text("0\ta\tb\tonly one text\n")
    with pytest.raises(BadSampleError, match="4 fields"):
        AAN(release).pair("val", 0)
    file.write_text("maybe\ta\tb\tc\td\n")
    with pytest.raises(DataError, match="begin with a label 0 or 1"):
        AAN(release)
    file.write_text("")
    with pytest.raises(DataError, match="is empty"):
        AAN(release)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        AAN(release)
    with pytest.raises(DataError, match="holds no new_aan_pairs"):
        AAN(release / "lra_release" / "elsewhere")


@pytest.fixture(scope="module")
def pairs(library: str) -> StdlibPairs:
    return StdlibPairs(500, 0, 200, 50, 50, library)


@given(st.sampled_from(["train", "val", "test"]), st.integers(0, 49))
def test_the_stand_in(pairs: StdlibPairs, split: str, place: int) -> None:
    first, second = pairs.pair(split, place)
    assert len(first) == len(second) == 500
    homes = [{n for n, data in enumerate(pairs.files[split]) if text in data} for text in (first, second)]
    assert all(homes)
    label = pairs.split(split).labels["related"][place]
    assert all(len(home) == 1 for home in homes)
    if label:
        assert homes[0] == homes[1]
        (home,) = homes[0]
        data = pairs.files[split][home]
        assert abs(data.find(first) - data.find(second)) >= 500
    else:
        assert homes[0] != homes[1]
    assert pairs.pair(split, place) == (first, second)


def test_no_file_is_in_two_splits(pairs: StdlibPairs) -> None:
    train = set(pairs.files["train"])
    assert not train & {*pairs.files["val"], *pairs.files["test"]}
    assert not set(pairs.files["val"]) & set(pairs.files["test"])


def test_halves_are_even_and_pairs_do_not_depend_on_how_many(pairs: StdlibPairs, library: str) -> None:
    assert [int(pairs.split(s).labels["related"].sum()) for s in pairs.splits] == [100, 25, 25]
    fewer = StdlibPairs(500, 0, 20, 10, 10, library)
    assert [fewer.pair("train", i) for i in range(20)] == [pairs.pair("train", i) for i in range(20)]
    assert StdlibPairs(500, 1, 20, 10, 10, library).pair("train", 0) != pairs.pair("train", 0)


def test_files_that_are_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * 200)
    with pytest.raises(DataError, match="two are needed: take a smaller length"):
        StdlibPairs(500, folder=str(tmp_path))


def test_a_position_is_kept(library: str) -> None:
    def data(length: int = 100) -> DocumentPairDataModule:
        return DocumentPairDataModule(length=length, options={**SMALL, "folder": library}, batch_size=4)

    module = data()
    seen = [batch["index"] for _, batch in zip(range(2), module.train_dataloader(), strict=False)]
    state, rest = module.state_dict(), data()
    rest.load_state_dict(state)
    last = [batch["index"] for batch in rest.train_dataloader()]
    assert sorted(torch.cat([*seen, *last]).tolist()) == list(range(12))
    other = data(50)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.length|the bytes of"):
        other.train_dataloader()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": "ann"}, "no document pairs 'ann'"), ({"dataset": "aan"}, "needs source_path"), ({"source_path": "x"}, "set dataset: aan"),
        ({"length": 0}, "at least a byte"), ({"dataset": "aan", "source_path": "x", "options": {"seed": 1}}, "has its own"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DocumentPairDataModule(**options)
