"""Each probe's answers follow from what stands before them, by a rule that is written again here."""

from __future__ import annotations

import numpy as np
import pytest

from mmlong.diagnose.probes import FAR_KEYS, FAR_VALUES, FUZZY, KEYS, NOISE, PROBES, SILENT, TOLD, Size, list_probes

CASES = [
    (name, size) for name in list_probes() for size in (*PROBES[name].train, *PROBES[name].tests.values())
]  # fmt: skip


def drawn(name: str, size: Size, rows: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return PROBES[name].draw(np.random.default_rng(seed), rows, **size)


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_codes_and_answers_are_in_range(name: str, size: Size) -> None:
    probe = PROBES[name]
    codes, answers = drawn(name, size)
    assert codes.dtype == answers.dtype == np.int64
    assert codes.min() >= 0
    assert codes.max() < probe.vocabulary
    asked = answers[answers != SILENT]
    assert asked.min() >= 0
    assert asked.max() < probe.vocabulary
    assert answers.shape == ((4, probe.from_last) if probe.from_last else codes.shape)
    assert all((row != SILENT).any() for row in answers)
    assert [t.tolist() for t in drawn(name, size)] == [codes.tolist(), answers.tolist()], "a seed says which"
    assert drawn(name, size, seed=1)[0].tolist() != codes.tolist()


@pytest.mark.parametrize("size", PROBES["recall"].tests.values(), ids=str)
def test_recall(size: Size) -> None:
    codes, answers = drawn("recall", size, rows=16)
    for row, said in zip(codes.tolist(), answers.tolist(), strict=True):
        n = 2 * size["pairs"]
        pairs = dict(zip(row[0:n:2], row[1:n:2], strict=True))
        assert len(pairs) == size["pairs"]
        asked = {row[t]: said[t] for t in range(len(row)) if said[t] != SILENT}
        assert asked == pairs, "each key once"
        assert all(t >= n for t in range(len(row)) if said[t] != SILENT)
        assert all(row[t + 1] == said[t] for t in range(len(row)) if said[t] != SILENT)
    assert codes[codes > KEYS].min() == KEYS + 1


def test_recall_asks_soon_more_often() -> None:
    _, answers = drawn("recall", {"pairs": 4, "length": 256}, rows=400)
    places = np.nonzero(answers != SILENT)[1]
    near, far = (places < 8 + 62).sum(), (places >= 256 - 62).sum()
    assert near > 3 * far > 0


def test_selective_copy() -> None:
    codes, answers = drawn("selective_copy", {"length": 64, "letters": 8}, rows=16)
    for row, said in zip(codes, answers, strict=True):
        assert row[:64][row[:64] > 1].tolist() == said[64:].tolist()
        assert (row[64:] == 1).all()


@pytest.mark.parametrize(("name", "query"), [("induction", 0), ("needle", 1)])
def test_what_followed_the_mark(name: str, query: int) -> None:
    codes, answers = drawn(name, {"length": 20}, rows=200)
    first = set()
    for row, said in zip(codes.tolist(), answers.tolist(), strict=True):
        assert row[-1] == query
        at = row.index(0)
        first.add(at)
        assert row[:-1].count(0) == 1
        assert said[:-1] == [SILENT] * 19
        assert said[-1] == row[at + 1] > query
    assert first == set(range(18))


def test_copy() -> None:
    codes, answers = drawn("copy", {"letters": 9})
    for row, said in zip(codes.tolist(), answers.tolist(), strict=True):
        assert said[9:] == row[:9]
        assert row[10:] == row[:8]
        assert row[9] == 0


@pytest.mark.parametrize("modulus", [2, 5])
def test_sums(modulus: int) -> None:
    codes, answers = drawn("parity", {"length": 30, "modulus": modulus, "start": 7})
    for row, said in zip(codes.tolist(), answers.tolist(), strict=True):
        assert said == [sum(row[: t + 1]) % modulus if t >= 7 else SILENT for t in range(30)]


def test_compression() -> None:
    codes, answers = drawn("compression", {"length": 32})
    assert codes[:, :-1].tolist() == answers.tolist()
    assert not codes[:, -1].any()


def test_fuzzy_recall() -> None:
    """A reader that knows only what it has read names every asked letter."""
    for size in PROBES["fuzzy_recall"].tests.values():
        codes, answers = drawn("fuzzy_recall", size, rows=16)
        for row, said in zip(codes.tolist(), answers.tolist(), strict=True):
            known: dict[tuple[int, ...], list[int]] = {}
            at, asked, found = 0, 0, 0
            while at < len(row) and row[at]:
                start = at
                if len(known) < size["pairs"]:
                    while row[at] <= FUZZY:
                        at += 1
                    key = tuple(row[start:at])
                else:
                    key = next(k for k in known if tuple(row[at : at + len(k)]) == k)
                    at += len(key)
                value = []
                while at < len(row) and row[at] > FUZZY and (key not in known or len(value) < len(known[key])):
                    if said[at - 1] != SILENT:
                        asked += 1
                        found += said[at - 1] == known[key][len(value)] == row[at]
                    value.append(row[at])
                    at += 1
                assert known.setdefault(key, value) == value
            assert len(known) == size["pairs"]
            assert asked == found == sum(answer != SILENT for answer in said)
            assert asked > 0


def test_far_recall() -> None:
    codes, answers = PROBES["far_recall"].draw(np.random.default_rng(0), 5, length=300, near=100)
    told = NOISE + FAR_KEYS
    for line, said in zip(codes, answers, strict=True):
        where = {(code - told) // FAR_VALUES: at for at, code in enumerate(line) if code >= told}
        assert sorted(where) == list(range(FAR_KEYS))
        assert max(where.values()) - min(where.values()) < TOLD
        for at, code in enumerate(line):
            key = code - NOISE
            if 0 <= key < FAR_KEYS:
                want = (line[where[key]] - told) % FAR_VALUES if at - where[key] > 100 else SILENT
                assert said[at] == want
            else:
                assert said[at] == SILENT
