"""Sentences composed from what is packed beside each sample: a caption that says what the labels say.

A template is filled from a sample's JSON (`mmlong.datamodules.splits.sample_json`): for each label field its class id and, as ``FIELD_name``, the class's name, and what else the source knows::

    "{type_name}crystalline, defect probability {defect_probability:.0%}"      polycrystalline, defect probability 33%

A sentence ends with a newline: how long it is, is part of it.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .errors import BadSampleError, DataError
from .indexed import IndexedReader
from .packed import Split

END = b"\n"


def text_rows(rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """``raw`` uint8 ``(B, T)``, right-padded with zeros, and ``lengths`` of rows of bytes."""
    raw = np.zeros((len(rows), max(map(len, rows))), np.uint8)
    for place, row in zip(raw, rows, strict=True):
        place[: len(row)] = row
    return {"raw": torch.from_numpy(raw), "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int64)}


def check_template(template: str) -> list[str]:
    """Names of the facts that a template asks for.

    Raises:
        ValueError: it asks for none, or is no template of plain names.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"sentence {template!r} is no template: {error}; {{NAME}} stands for a fact, {{{{ for a brace") from error  # fmt: skip
    if odd := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"sentence {template!r} asks for {odd[0]!r}; {{NAME}} is the plain name of a fact")
    if not names:
        raise ValueError(f"sentence {template!r} is the same for all: {{NAME}} stands for a fact of the sample")
    return names


class Sentences:
    """The sentence of each sample of a split.

    Args:
        template: with ``{NAME}`` for each fact, formatted as Python's ``str.format`` does.
        split: whose samples.
        on_bad: ``"stop"`` or ``"skip"``.

    Raises:
        DataError: samples have no such facts; found at the first sample.
    """

    def __init__(self, template: str, split: Split, on_bad: str = "stop") -> None:
        self.template, self.names, self.on_bad = template, check_template(template), on_bad
        self.reader = IndexedReader(split)

    def sentence(self, sample: int) -> bytes:
        """The sentence of one sample, with its end.

        Raises:
            BadSampleError: its JSON is damaged, lacks a fact, or has one that cannot be written so.
        """
        facts = self._facts(sample)
        try:
            return self.template.format(**{name: facts[name] for name in self.names}).encode() + END
        except KeyError as error:
            raise BadSampleError(
                *self._told(
                    sample, f"has no fact {error.args[0]!r} for the sentence {self.template!r}; it has {', '.join(facts)}"
                )
            ) from error  # fmt: skip
        except (ValueError, TypeError) as error:
            raise BadSampleError(
                *self._told(sample, f"does not fit the sentence {self.template!r}: {error}")
            ) from error

    def _facts(self, sample: int) -> dict[str, Any]:
        data = self.reader.read(sample, "json")
        try:
            found = json.loads(data)
        except ValueError as error:
            raise BadSampleError(*self._told(sample, f"is not JSON: {error}")) from error
        if not isinstance(found, dict):
            raise BadSampleError(*self._told(sample, "is not a JSON object"))
        return found

    def _told(self, sample: int, what: str) -> tuple[Any, str, str]:
        shard, member = self.reader.place(sample, "json")
        return shard, what, member

    def fetch(self, samples: Sequence[int]) -> tuple[dict[str, torch.Tensor], list[DataError]]:
        """``raw``, ``lengths`` and ``weight`` (0 where one was skipped) of samples, and what was skipped."""
        rows, weights, problems = [], [], []
        for sample in samples:
            try:
                said, weight = self.sentence(sample), 1.0
            except BadSampleError as error:
                if self.on_bad == "stop":
                    raise
                problems.append(error)
                said, weight = END, 0.0
            rows.append(np.frombuffer(said, np.uint8))
            weights.append(weight)
        return {**text_rows(rows), "weight": torch.tensor(weights)}, list[DataError](problems)
