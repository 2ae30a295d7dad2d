"""ListOps: values by Python's own arithmetic, lengths and mixture as published, the benchmark's files read and checked."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmlong.datamodules import listops
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.listops import LONGEST, OPERATORS, SHORTEST, draw_expression, generate, value_of

NAMES = {byte: name for name, byte in OPERATORS.items()}
CALLS = {
    "<": "min", ">": "max", "=": "(lambda *a: int(statistics.median(a)))", "+": "(lambda *a: sum(a) % 10)",
}  # fmt: skip


def by_python(expression: str) -> int:
    """The expression as a call of Python's own functions; one from our own generator, nothing read from a file."""
    code = "".join(f"{CALLS[t]}((" if t in CALLS else ")," if t == "]" else f"{t}," for t in expression)
    for call in CALLS.values():
        code = code.replace(f"{call}((", f"{call}(*(")
    return eval(code.replace("),", ")),").rstrip(","), {"statistics": statistics})


@given(st.integers(0, 10**6))
def test_values(seed: int) -> None:
    expression = draw_expression(random.Random(seed))
    if expression is not None and len(expression) < 400:
        assert value_of(expression) == by_python(expression)


@pytest.mark.parametrize(
    ("text", "value"), [(">43<23]10=15892]]", 5), ("=12]", 1), ("=9987]", 8), ("+99]", 8), ("7", 7), ("<>12]3]", 2)]
)
def test_values_by_hand(text: str, value: int) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("text", "why"), [("", "not closed"), (">12", "not closed"), (">]", "empty"), ("1]", "goes on"), ("12", "goes on"), (">1x]", "'x'")]
)  # fmt: skip
def test_what_is_no_expression(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        value_of(text)


def test_the_grammar() -> None:
    draw = random.Random(0)
    drawn = [draw_expression(draw) for _ in range(20_000)]
    whole = [e for e in drawn if e is not None]
    lists = sum(e is None or len(e) > 1 for e in drawn)
    assert abs(lists / len(drawn) - 0.25) < 0.02
    arguments, depths = set(), set()
    for expression in whole:
        stack: list[int] = []
        for token in expression:
            if token == "]":
                arguments.add(stack.pop())
            elif stack:
                stack[-1] += 1
            if token in NAMES:
                stack.append(0)
                depths.add(len(stack))
        assert not stack
    assert arguments == set(range(2, 11))
    assert max(depths) == 9, "operators down to the last depth but one"


def test_what_is_drawn_is_the_same_everywhere() -> None:
    some = list(generate(30))
    assert len(set(some)) == 30
    assert all(SHORTEST < len(e) < LONGEST for e in some)
    assert some == list(generate(30))
    assert some[0].startswith("+2><02=32871611+0++><857]3=060]]768]")


def test_shorter_ones_to_begin_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of every length as many as are told, behind the same that `listops` trains on; validation and test are the same."""
    monkeypatch.setattr(listops, "SHORTER", {(4, 16): 9, (16, 32): 5, (32, 64): 2})
    for name in ("listops", "listops-graded"):
        monkeypatch.setitem(listops.SIZES, name, {"train": 6, "val": 3, "test": 2})
    plain, graded = (listops.load(name=name).records for name in ("listops", "listops-graded"))
    assert [record.load() for record in graded[:11]] == [record.load() for record in plain]
    lengths = [len(record.load()) for record in graded[11:]]
    assert len(lengths) == 16
    assert all(4 < one <= 16 for one in lengths[:9])
    assert all(16 < one <= 32 for one in lengths[9:14])
    assert all(32 < one <= 64 for one in lengths[14:])
    assert all(record.split == "train" for record in graded[11:])
    assert all(value_of(record.load().decode()) == record.labels["value"] for record in graded)
    assert len({record.name for record in graded}) == len(graded)
    with pytest.raises(DataError, match="take dataset: listops-lra"):
        listops.load(str(tmp_path), "listops-graded")


def as_in_the_files(expression: str) -> str:
    """With names and brackets as the benchmark writes them."""
    words = [NAMES.get(t, t) for t in expression]
    return "( " * 3 + " ".join(words) + " )" * 3


def write(folder: Path, name: str, rows: list[tuple[str, int]]) -> None:
    lines = ["Source\tTarget", *(f"{as_in_the_files(e)}\t{v}" for e, v in rows)]
    (folder / name).write_text("\n".join(lines) + "\n")


def test_the_files_of_the_benchmark(tmp_path: Path) -> None:
    some = list(generate(6))
    for place, name in enumerate(listops.FILES.values()):
        write(tmp_path, name, [(e, value_of(e)) for e in some[2 * place : 2 * place + 2]])
    source = listops.load(str(tmp_path))
    assert [r.load().decode() for r in source.records] == some
    assert [r.split for r in source.records] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    assert [r.labels["value"] for r in source.records] == [value_of(e) for e in some]


def test_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="basic_train.tsv"):
        listops.load(str(tmp_path))
    write(tmp_path, "basic_train.tsv", [(">12]", 2), (">13]", 1)])
    with pytest.raises(DataError, match=r"value 3, and the file says 1") as error:
        listops.load(str(tmp_path))
    assert "line 3" in str(error.value)
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n[AVG 1 2 ]\t1\n")
    with pytest.raises(DataError, match="unknown token: '\\[AVG'"):
        listops.load(str(tmp_path))


@pytest.mark.slow
def test_sizes() -> None:
    source = listops.load()
    parts = [sum(r.split == name for r in source.records) for name in ("train", "val", "test")]
    assert parts == [10_000, 2_000, 2_000]
    counts = [sum(r.labels["value"] == value for r in source.records) for value in range(10)]
    assert min(counts) > 600
    assert counts[0] + counts[9] > 3500, "minima and maxima are most often at an end"
