"""What a command found is written whole or not at all, read again or refused in words, and told as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlong.results import markdown_table, read_json, write_json


class BadFileError(ValueError):
    """Of these tests."""


def read(path: Path) -> Any:
    return read_json(path, "numbers", lambda content: sum(content["numbers"]), BadFileError, 3)


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "found.json"
    write_json(path, {"format": 3, "numbers": [1, 2]})
    assert read(path) == 3
    with pytest.raises(TypeError):
        write_json(path, {"numbers": {1, 2}})
    assert read(path) == 3
    assert json.loads(path.read_text()) == {"format": 3, "numbers": [1, 2]}
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 3}', '{"format": 3, "numbers": 7}', '{"format": 3, "numbers": ["a"]}'])  # fmt: skip
def test_something_else_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(BadFileError, match=r"found\.json holds no numbers: "):
        read(path)


def test_another_format_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"format": 2, "numbers": [1]}')
    with pytest.raises(BadFileError, match=r"old\.json has format 2; this reads 3"):
        read(tmp_path / "old.json")
    with pytest.raises(BadFileError, match=r"none\.json cannot be read: No such file"):
        read(tmp_path / "none.json")


cells = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\"), max_size=6)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_a_table_has_every_cell(rows: list[list[str]]) -> None:
    head, *others = rows
    lines = markdown_table(head, others).split("\n")
    assert lines.pop() == ""
    assert lines.pop(1) == "|" + "---|" * len(head)
    for line, row in zip(lines, rows, strict=True):
        found = line.replace("\\|", "\0").removeprefix("| ").removesuffix(" |").split(" | ")
        assert [cell.replace("\0", "|") for cell in found] == row
