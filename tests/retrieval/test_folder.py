"""Folders of arrays: whole or not there, and refused with the reason when they are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlong.retrieval.folder import BadFolderError, FolderWriter, open_folder

ARRAYS: dict[str, tuple[tuple[str, ...], int]] = {"a": (("float16", "float32"), 2), "b": (("uint8",), 1)}


def write(folder: Path, rows: int = 5) -> Path:
    with FolderWriter(folder, "it.json", 3, {"a": ("float16", (4,)), "b": ("uint8", ())}) as out:
        for start in range(0, rows, 2):
            n = min(2, rows - start)
            out.add("a", np.arange(start * 4, (start + n) * 4).reshape(n, 4))
            out.add("b", np.arange(start, start + n))
        out.said = {"more": "said"}
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return open_folder(folder, "it.json", 3, ARRAYS, "mmlong make it")


@pytest.mark.parametrize("rows", [5, 0])
def test_what_is_written_is_read(tmp_path: Path, rows: int) -> None:
    said, arrays = read(write(tmp_path / "it", rows))
    assert said["more"] == "said"
    assert arrays["a"].dtype == np.dtype("<f2")
    assert arrays["a"].tolist() == np.arange(rows * 4).reshape(rows, 4).tolist()
    assert arrays["b"].tolist() == list(range(rows))
    if rows:
        with pytest.raises(ValueError, match="read-only"):
            arrays["a"][0] = 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "it")
    with pytest.raises(BadFolderError, match="there already"):
        write(tmp_path / "it")


def change(file: str, **entries: Any) -> Any:
    def changed(folder: Path) -> None:
        said = json.loads((folder / file).read_text())
        for path, value in entries.items():
            at = said
            *keys, last = path.split("__")
            for key in keys:
                at = at[key]
            at[last] = value
        (folder / file).write_text(json.dumps(said))

    return changed


def cut(file: str, by: int) -> Any:
    def changed(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:by] if by < 0 else data + b"\0" * by)

    return changed


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut("a.bin", -1), r"a\.bin is cut short: 39 bytes, where it\.json says 40"),
        (cut("b.bin", 2), r"b\.bin is too long: 7 bytes"),
        (lambda folder: (folder / "b.bin").unlink(), r"b\.bin is missing"),
        (lambda folder: (folder / "it.json").unlink(), "interrupted"),
        (lambda folder: (folder / "it.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "it.json").write_text("[]"), "of version None"),
        (change("it.json", version=4), "of version 4; this mmlong reads version 3"),
        (change("it.json", arrays__a__dtype="int64"), "'int64'; it can be float16 or float32"),
        (change("it.json", arrays__a__dtype="float32"), "cut short"),
        (change("it.json", arrays__a__shape=[5]), "does not say what"),
        (change("it.json", arrays={}), "does not say what"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_whole_is_refused(tmp_path: Path, harm: Any, said: str) -> None:
    folder = write(tmp_path / "it")
    harm(folder)
    with pytest.raises(BadFolderError, match=said) as refused:
        read(folder)
    assert "mmlong make it" in str(refused.value)
    with pytest.raises(BadFolderError, match="is no folder"):
        read(tmp_path / "other")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_an_interrupted_one_is_not_there(tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        with FolderWriter(tmp_path / "it", "it.json", 3, {"a": ("float16", (4,))}) as out:
            out.add("a", np.zeros((3, 4)))
            raise error

    with pytest.raises(type(error)):
        broken()
    assert list(tmp_path.iterdir()) == []
    # Also when it is the last of it that does not fit.
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_left_does_not_open_and_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "it.partial"
    left.mkdir()
    (left / "a.bin").write_bytes(b"half")
    with pytest.raises(BadFolderError, match="interrupted"):
        read(left)
    read(write(tmp_path / "it"))
    assert not left.exists()


def test_entries_of_another_shape(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"entries of \(4,\), got \(3,\)"),
        FolderWriter(tmp_path / "it", "it.json", 3, {"a": ("float16", (4,))}) as out,
    ):
        out.add("a", np.zeros((2, 3)))
