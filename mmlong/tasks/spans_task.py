"""What the objectives of several modalities in one sequence share: their options by name, and batches to rows of spans.

A batch says of each modality what it has::

    parts    {name: {raw, lengths, rows}}   as its modality takes it; `lengths` where it is uneven, `rows` int64 (n,) where it is not in every row
    index    int64   (B,)                   sample ids
    weight   float32 (B,)                   0: not to be counted

Which spans a row has and in which order is one of ``orders``: in training drawn sample by sample; evaluation counts every sample in each of them. What a batch has nothing of is left out of its rows, so batches of one
modality each may alternate (:mod:`mmlong.datamodules.mixed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.models import Spans, SpansModel
from mmlong.registry import nearest
from mmlong.tasks.base import Task

Parts = dict[str, dict[str, Tensor]]


def check_named(option: str, named: Mapping[str, Any] | None, modalities: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what an option has of a modality that is not there, or for a number below 0."""
    for name, value in (named or {}).items():
        if name not in modalities:
            raise ValueError(f"model.{option} has {name!r}{nearest(name, list(modalities))}; the modalities are {', '.join(modalities)}")  # fmt: skip
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"model.{option} has {value} for {name}; it is 0 or more")


class SpansTask(Task):
    """Base of the objectives whose rows are spans of several modalities."""

    def both_sides(self, modality: dict[str, Any], head: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """Modalities and heads by name, with what the data fixes of each.

        Raises:
            ValueError: the data has a modality that the model has not.
        """
        fixed = info.get("modalities", {})
        for name in fixed:
            if name not in modality:
                raise ValueError(f"the data has {name!r}{nearest(name, list(modality))}, and model.modalities only {', '.join(modality)}")  # fmt: skip
        return {
            "modalities": {name: {**fixed.get(name, {}), **options} for name, options in modality.items()},
            "heads": head,
        }

    @property
    def rows_of_spans(self) -> SpansModel:
        """The model, as what it is."""
        assert isinstance(self.model, SpansModel)
        return self.model

    def show_data(self, data: Any) -> None:
        """Give each modality what it takes from training data."""
        voices = self.rows_of_spans.voices
        missing = {name: voice.modality for name, voice in voices.items() if not voice.modality.initialised}
        if missing and hasattr(data, "samples"):
            parts = self.sample_rows(data)["parts"]
            for name, modality in missing.items():
                if name in parts:
                    modality.initialise(parts[name]["raw"])

    def tokens_in(self, batch: dict[str, Any]) -> int:
        """Tokens that a batch holds, for throughput."""
        used = {name for order in self.rows_of_spans.orders for name in order}
        voices = self.rows_of_spans.voices
        return sum(
            voices[name].modality.count_tokens(part["raw"], part.get("lengths"))
            for name, part in batch["parts"].items()
            if name in used
        )

    def encode(  # type: ignore[override]
        self, batch: dict[str, Any], orders: list[list[str]] | None = None
    ) -> tuple[Spans, Layout]:
        """The spans and layout of a batch; rows of weight 0 have no tokens.

        Args:
            batch: see the module's docstring.
            orders: of each row; ``None``: drawn, each of the model's with the same chance.
        """
        parts: Parts = batch["parts"]

        def given(key: str) -> dict[str, Tensor]:
            return {name: part[key] for name, part in parts.items() if key in part}

        if orders is None:
            known, count = self.rows_of_spans.orders, batch["index"].shape[0]
            chosen = self.draw_orders(len(known), count) if len(known) > 1 else [0] * count
            orders = [known[number] for number in chosen]
        counted = batch["weight"] > 0 if "weight" in batch else None
        return self.rows_of_spans.encode(given("raw"), given("lengths"), orders, given("rows"), counted)

    def draw_orders(self, known: int, count: int) -> list[int]:
        """Which of ``known`` orders each of ``count`` rows has, from torch's global generator."""
        return torch.randint(known, (count,)).tolist()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        raise TypeError(f"{type(self).__name__} does not define _evaluate(batch, stage)")

    def is_text(self, name: str) -> bool:
        """Whether a modality is text, of which whole spans can be right."""
        return self.rows_of_spans.voices[name].modality.kind == "text"

    def log_found(self, name: str, value: Any, count: int, **options: Any) -> None:
        """Log what evaluation found of ``count`` things."""
        # Of nothing, a weight of nothing: ranks must all log the same names.
        self.log(name, value, batch_size=count, on_step=False, on_epoch=True, sync_dist=True, **options)
