"""ListOps of the Long Range Arena: nested lists of digits under operators, whose value (0 to 9) is the label.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]   ->   5

After the grammar of Nangia & Bowman 2018 (arXiv 1804.06028) with the sizes of Tay et al. 2021 (Long Range Arena, arXiv 2011.04006): an operator at any place with chance 1/4, down to a depth of 10, with 2 to 10 arguments;
MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10); kept are expressions of more than 500 and fewer than 2,000 tokens, no two alike.

A token is one byte: digits as they are, ``<`` MIN, ``>`` MAX, ``=`` MED, ``+`` SM, ``]`` the end of a list. (The benchmark's files also bracket every argument with ``(`` and ``)``, which its own reader leaves out.)

Without files they are drawn here, from :data:`SEED`, the same on every machine: for ``listops-lra`` as many as the benchmark has, for ``listops`` about a tenth of them to train on. ``listops-graded`` has shorter expressions of the same
grammar to train on besides (:data:`SHORTER`), which is not the benchmark's training data; it is validated and tested on what ``listops`` is. Given the benchmark's folder (``basic_train.tsv``, ``basic_val.tsv``, ``basic_test.tsv`` with
columns Source and Target; ``lra_release/listops-1000``), its 96,000, 2,000 and 2,000 are read instead, each with its value checked.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .errors import DataError
from .records import KnownSequences, Record, SequenceSource

LABELS = {"value": tuple("0123456789")}
SOURCE = "ListOps of the Long Range Arena (Nangia & Bowman 2018; Tay et al. 2021), drawn here by its grammar unless its files are given"
LICENCE = "Apache-2.0 (the benchmark's files); what is drawn here belongs to nobody"
OPERATORS = {"[MIN": "<", "[MAX": ">", "[MED": "=", "[SM": "+"}
END = "]"
DEPTH, ARGUMENTS, CHANCE = 10, 10, 0.25
SHORTEST, LONGEST = 500, 2000
SIZES = {
    "listops": {"train": 10_000, "val": 2_000, "test": 2_000},
    "listops-graded": {"train": 10_000, "val": 2_000, "test": 2_000},
    "listops-lra": {"train": 96_000, "val": 2_000, "test": 2_000},
}
"""Of the benchmark's lengths."""
SHORTER = {(4, 16): 8_000, (16, 32): 14_000, (32, 64): 16_000, (64, 128): 16_000, (128, 256): 10_000, (256, 500): 8_000}
"""How many training expressions of ``listops-graded`` have more than so many tokens and at most so many."""
SEED = 2021
FILES = {"train": "basic_train.tsv", "val": "basic_val.tsv", "test": "basic_test.tsv"}


def value_of(expression: str) -> int:
    """The value of an expression in one-byte tokens.

    Raises:
        ValueError: it is no whole expression.
    """
    stack: list[tuple[str, list[int]]] = []
    found: int | None = None
    for place, token in enumerate(expression):
        if found is not None:
            raise ValueError(f"goes on after its end, at token {place}")
        if token in "<>=+":
            stack.append((token, []))
            continue
        if token == END:
            if not stack or not stack[-1][1]:
                raise ValueError(f"a list ends at token {place} that has not begun or is empty")
            number = _apply(*stack.pop())
        elif token.isascii() and token.isdigit():
            number = int(token)
        else:
            raise ValueError(f"token {place} is {token!r}")
        if stack:
            stack[-1][1].append(number)
        else:
            found = number
    if found is None:
        raise ValueError("is not closed")
    return found


def _apply(operator: str, numbers: list[int]) -> int:
    if operator == "<":
        return min(numbers)
    if operator == ">":
        return max(numbers)
    if operator == "+":
        return sum(numbers) % 10
    numbers = sorted(numbers)
    middle = len(numbers) // 2
    return numbers[middle] if len(numbers) % 2 else (numbers[middle - 1] + numbers[middle]) // 2


def draw_expression(draw: random.Random, longest: int = LONGEST) -> str | None:
    """An expression in one-byte tokens, or ``None`` where it would be of ``longest`` tokens or more.

    Only ``draw.random()`` is used, which gives the same numbers in every version of Python.
    """
    tokens: list[str] = []
    open_lists: list[int] = []  # arguments that are still to come, of each
    while True:
        depth = len(open_lists) + 1
        if len(tokens) >= longest:
            return None
        if depth < DEPTH and draw.random() < CHANCE:
            count = 2 + int(draw.random() * (ARGUMENTS - 1))
            tokens.append("<>=+"[int(draw.random() * 4)])
            open_lists.append(count)
            continue
        tokens.append(str(int(draw.random() * 10)))
        while open_lists:
            open_lists[-1] -= 1
            if open_lists[-1]:
                break
            open_lists.pop()
            tokens.append(END)
        if not open_lists:
            return "".join(tokens)


def generate(count: int, seed: int = SEED) -> Iterator[str]:
    """Different expressions of the benchmark's lengths."""
    draw, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        expression = draw_expression(draw)
        if expression is not None and SHORTEST < len(expression) < LONGEST and expression not in seen:
            seen.add(expression)
            yield expression


def generate_shorter(seed: int = SEED + 1) -> Iterator[str]:
    """The expressions of :data:`SHORTER`, the shortest first; the same one may come twice."""
    draw = random.Random(seed)
    for (above, most), count in SHORTER.items():
        while count:
            expression = draw_expression(draw, most + 1)
            if expression is not None and above < len(expression) <= most:
                count -= 1
                yield expression


def load(given: str | None = None, name: str = "listops") -> SequenceSource:
    """Draw the expressions, or read the benchmark's.

    Args:
        given: the folder of the benchmark's three files; with ``listops-graded``, to which others are added, it is refused.
        name: how many are drawn, a key of :data:`SIZES`.

    Raises:
        DataError: a file is missing, or a line of it is no expression with its value.
    """
    records: list[Record] = []
    if given is not None and name == "listops-graded":
        raise DataError(
            Path(given), "are the benchmark's own expressions: take dataset: listops-lra, without short_first"
        )
    if given is None:
        expressions = generate(sum(SIZES[name].values()))
        for split, count in SIZES[name].items():
            records += [_record(split, place, next(expressions)) for place in range(count)]
        if name == "listops-graded":
            records += [
                _record("train", SIZES[name]["train"] + place, one) for place, one in enumerate(generate_shorter())
            ]
    else:
        for split, file in FILES.items():
            records += [_record(split, place, expression) for place, expression in _read(Path(given) / file)]
    return SequenceSource(
        name=name, modality="text", extension="txt", about={}, source=SOURCE, licence=LICENCE,
        records=records, labels=LABELS, default_label="value",
    )  # fmt: skip


def _record(split: str, place: int, expression: str) -> Record:
    return Record(f"{split}/{place:05d}", partial(str.encode, expression), {"value": value_of(expression)}, split=split)


def _read(file: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(file, f"cannot be read ({error}); the folder must hold {', '.join(FILES.values())}") from error
    for place, row in enumerate(csv.DictReader(lines, delimiter="\t")):
        tokens = [OPERATORS.get(token, token) for token in (row.get("Source") or "").split() if token not in "()"]
        expression, told = "".join(tokens), (row.get("Target") or "").strip()
        try:
            if len(expression) != len(tokens):
                raise ValueError(f"has an unknown token: {max(tokens, key=len)!r}")
            if (found := value_of(expression)) != int(told):
                raise ValueError(f"has the value {found}, and the file says {told}")
        except ValueError as error:
            raise DataError(file, f"its expression {error}", f"line {place + 2}") from error
        yield place, expression


KNOWN = {
    name: KnownSequences(
        load=partial(load, name=name), modality="text", about={}, labels=LABELS,
        splits={split: count for split, count in sizes.items() if split != "train"}, source=SOURCE, licence=LICENCE,
    )
    for name, sizes in SIZES.items()
}  # fmt: skip
