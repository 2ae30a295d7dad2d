"""Joint training: several modalities in one causal model, in one sequence of spans or in batches that alternate, each in bits of its own.

A batch says of each modality what it has::

    parts    {name: {raw, lengths, rows}}   as its modality takes it; `lengths` where it is uneven, `rows` int64 (n,) where it is not in every row
    index    int64   (B,)                   sample ids
    weight   float32 (B,)                   0: not to be counted

Which spans a row has and in which order is one of ``orders``: in training drawn sample by sample; evaluation counts every sample in each of them. What a batch has nothing of is left out of its rows, so batches of one
modality each may alternate (:mod:`mmlong.datamodules.mixed`). See :class:`mmlong.models.JointModel`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.backbone.segmented import check_keep, segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.own_loss import own_losses, sum_own_loss
from mmlong.models import JointModel, Spans
from mmlong.registry import nearest
from mmlong.tasks.base import Task
from mmlong.tasks.joint_report import JointReport
from mmlong.training.optim import OptimConfig

Parts = dict[str, dict[str, Tensor]]


class JointTask(Task):
    """Likelihood training of a joint model.

    Logs ``val/bits`` (of all numbers together) and, of each modality, ``val/NAME/bits``; of text also ``val/NAME/exact``, the share of spans of which every byte is the likeliest: those that greedy generation gets
    wholly right. With several orders the same of each, by what comes before: ``val/words_after_sound/bits``, ``val/words_after_nothing/bits``.

    Args:
        modalities: ``{NAME: {name: ..., option: ...}}``; what the data fixes is filled in from ``data_info``.
        backbone, optim, compile, data_info, backbone_from, freeze_backbone: see :class:`mmlong.tasks.base.Task`. The backbone's direction is ``causal``.
        heads: ``{NAME: {name: ..., option: ...}}``; those left out suit their modality.
        orders: lists of names, the spans that a row may have, in which order; left out, all as they stand in ``modalities``.
        weights: of each modality, what its mean bits weigh in the loss, ``{NAME: number}``, 1 where not named; null: every number weighs the same, which is the likelihood of the rows (and leaves little to words beside pictures).
        linear_prediction: ``{NAME: offsets}``; see :mod:`mmlong.models.linear_prediction`.
        segment, keep: see :class:`mmlong.tasks.AutoregressTask`.
        samples: how many samples of each order a test draws from the model and leaves in the run folder; 0: none.
        sample_lengths: ``{NAME: tokens}`` in each; a modality of one fixed size knows its own.
    """

    kind = "joint"

    def __init__(
        self,
        modalities: dict[str, dict[str, Any]],
        backbone: BackboneConfig,
        heads: dict[str, dict[str, Any]] | None = None,
        orders: list[list[str]] | None = None,
        weights: dict[str, float] | None = None,
        optim: OptimConfig | None = None,
        compile: bool = False,
        linear_prediction: dict[str, list[int]] | None = None,
        segment: int | None = None,
        keep: int | Literal["sqrt"] = 1,
        samples: int = 4,
        sample_lengths: dict[str, int] | None = None,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        if segment is not None and segment < 1:
            raise ValueError(f"model.segment is {segment}; it is a number of tokens, or null for whole rows")
        check_keep(keep, "model.keep")
        for option, named in (("weights", weights), ("sample_lengths", sample_lengths)):
            for name, value in (named or {}).items():
                if name not in modalities:
                    raise ValueError(f"model.{option} has {name!r}{nearest(name, list(modalities))}; the modalities are {', '.join(modalities)}")  # fmt: skip
                if value < 0:
                    raise ValueError(f"model.{option} has {value} for {name}; it is 0 or more")
        own: dict[str, Any] = {} if orders is None else {"orders": [list(order) for order in orders]}
        if linear_prediction:
            own["linear_prediction"] = {name: list(offsets) for name, offsets in linear_prediction.items()}
        super().__init__(
            modalities,
            backbone,
            heads or {},
            optim,
            compile,
            data_info,
            backbone_from,
            freeze_backbone,
            model_parts=own,
        )
        self.weights = None if weights is None else {name: float(weights.get(name, 1.0)) for name in modalities}
        self.segment, self.keep = segment, keep
        self.samples, self.sample_lengths = samples, dict(sample_lengths or {})

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
    def joint(self) -> JointModel:
        """The model, as what it is."""
        assert isinstance(self.model, JointModel)
        return self.model

    def configure_callbacks(self) -> list[pl.Callback]:
        """Samples at the end of a test, beside the base's."""
        return [*super().configure_callbacks(), *([JointReport()] if self.samples else [])]

    def show_data(self, data: Any) -> None:
        """Give each modality what it takes from training data."""
        missing = {name: voice.modality for name, voice in self.joint.voices.items() if not voice.modality.initialised}
        if missing and hasattr(data, "samples"):
            parts = self.sample_rows(data)["parts"]
            for name, modality in missing.items():
                if name in parts:
                    modality.initialise(parts[name]["raw"])

    def tokens_in(self, batch: dict[str, Any]) -> int:
        """Tokens that a batch holds, for throughput."""
        used = {name for order in self.joint.orders for name in order}
        total = 0
        for name, part in batch["parts"].items():
            if name in used:
                fixed = self.joint.voices[name].modality.tokens_per_sample()
                rows, longest = part["raw"].shape[0], part["raw"].shape[-1]
                total += int(part["lengths"].sum()) if "lengths" in part else rows * (fixed or longest)
        return total

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
            known, count = self.joint.orders, batch["index"].shape[0]
            chosen = torch.randint(len(known), (count,)).tolist() if len(known) > 1 else [0] * count
            orders = [known[number] for number in chosen]
        counted = batch["weight"] > 0 if "weight" in batch else None
        return self.joint.encode(given("raw"), given("lengths"), orders, given("rows"), counted)

    def _share(self, spans: Spans) -> dict[str, float]:
        """What a nat of each modality weighs in the loss of a batch, so that the sum is bits."""
        numbers = {
            name: int((spans.kind == number).sum()) * voice.modality.channels
            for number, (name, voice) in enumerate(self.joint.voices.items())
        }
        if self.weights is None:
            return dict.fromkeys(numbers, 1 / max(sum(numbers.values()), 1) / math.log(2))
        whole = sum(self.weights[name] for name, count in numbers.items() if count) or 1.0
        return {name: self.weights[name] / whole / max(count, 1) / math.log(2) for name, count in numbers.items()}

    def _is_text(self, name: str) -> bool:
        return self.joint.voices[name].modality.kind == "text"

    def loss(self, spans: Spans, layout: Layout) -> tuple[Tensor, dict[str, Counted]]:
        """The loss in bits (in training with the mixers' own), and what was counted of each modality."""
        share, batch = self._share(spans), spans.kind.shape[0]
        own_share = 1 / max(int((spans.kind >= 0).sum()), 1) / math.log(2)
        asks = self.training and self.model.backbone.has_own_loss
        counted = {name: Counted.nothing(batch, spans.kind.device) for name in self.joint.names}

        def step(pieces: list[Tensor], state: State, piece: Layout | None) -> tuple[Tensor, State]:
            here = Spans.of(pieces, self.joint.names)
            collecting: Any = own_losses() if asks else nullcontext([])
            with collecting as found:
                prediction, state = self.model(here, state, piece)
            total = torch.zeros((), device=here.kind.device)
            for name, (nats, numbers) in self.joint.losses(prediction, here).items():
                total = total + share[name] * nats
                counted[name].add(nats, numbers)
                if not self.training and self._is_text(name):
                    wrong = prediction[name][0].argmax(-1) != here.pick(name)[0]
                    counted[name].add_wrong(here.where(name)[0], wrong)
            if found and (own := sum_own_loss(found)) is not None:
                total = total + own * own_share
            return total, state

        segment = self.segment or spans.kind.shape[1]
        total, _ = segmented_loss(self.model, step, spans.tensors(), segment, None, layout, self.keep)
        # The backward of segments computes them again, and that is not to be counted.
        return total, {name: found.copy() for name, found in counted.items()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss, in bits."""
        loss, counted = self.loss(*self.encode(batch))
        for name, found in counted.items():
            if found.numbers:
                self.log(f"train/{name}/bits", found.bits, batch_size=found.numbers)
        self.log("train/bits", sum_of(counted).bits, prog_bar=True, batch_size=1)
        self.log("train/loss", loss, batch_size=1)
        return loss

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Count a batch in each of the orders."""
        orders, count = self.joint.orders, batch["index"].shape[0]
        found: list[tuple[list[str], dict[str, Counted], Spans]] = []
        for order in orders:
            spans, layout = self.encode(batch, [order] * count)
            found.append((order, self.loss(spans, layout)[1], spans))
        everything = sum_of({str(k): sum_of(counted) for k, (_, counted, _) in enumerate(found)})
        self._log(f"{stage}/bits", everything.bits, everything.numbers, prog_bar=True)
        for number, name in enumerate(self.joint.names):
            mine = [(order, counted[name], spans) for order, counted, spans in found if name in order]
            for order, counted, spans in mine if len(orders) > 1 else []:
                before = "_".join(order[: order.index(name)]) or "nothing"
                self._log_one(f"{stage}/{name}_after_{before}", name, counted, [(counted, spans)], number)
            if mine:
                whole = sum_of({str(k): counted for k, (_, counted, _) in enumerate(mine)})
                self._log_one(f"{stage}/{name}", name, whole, [(counted, spans) for _, counted, spans in mine], number)

    def _log_one(self, prefix: str, name: str, whole: Counted, each: list[tuple[Counted, Spans]], number: int) -> None:
        self._log(f"{prefix}/bits", whole.bits, whole.numbers)
        if self._is_text(name):
            there = [(spans.kind == number).any(1) for _, spans in each]
            right = sum(int((counted.wrong == 0)[rows].sum()) for (counted, _), rows in zip(each, there, strict=True))
            count = sum(int(rows.sum()) for rows in there)
            self._log(f"{prefix}/exact", right / max(count, 1), count)

    def _log(self, name: str, value: Any, count: int, **options: Any) -> None:
        # Of nothing, a weight of nothing: ranks must all log the same names.
        self.log(name, value, batch_size=count, on_step=False, on_epoch=True, sync_dist=True, **options)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count a batch."""
        self._evaluate(batch, "test")


@dataclass
class Counted:
    """What was found of a modality in a batch.

    Attributes:
        nats: summed.
        numbers: of raw data that they are of.
        wrong: int64 ``(B,)``, tokens of each row that were not the likeliest; counted of text in evaluation.
    """

    nats: Tensor
    numbers: int
    wrong: Tensor

    @classmethod
    def nothing(cls, batch: int, device: torch.device) -> Counted:
        """Of ``batch`` rows."""
        return cls(torch.zeros((), device=device), 0, torch.zeros(batch, dtype=torch.int64, device=device))

    @property
    def bits(self) -> Tensor:
        """Per number."""
        return self.nats / max(self.numbers, 1) / math.log(2)

    def add(self, nats: Tensor, numbers: Tensor) -> None:
        """Count a piece."""
        self.nats = self.nats + nats.detach()
        self.numbers += int(numbers)

    def add_wrong(self, rows: Tensor, wrong: Tensor) -> None:
        """Count tokens, each in its row."""
        self.wrong = self.wrong.index_add(0, rows, wrong.long())

    def copy(self) -> Counted:
        """As it is now."""
        return replace(self)


def sum_of(counted: dict[str, Counted]) -> Counted:
    """Nats and numbers of several together."""
    each = list(counted.values())
    return Counted(torch.stack([one.nats for one in each]).sum(), sum(one.numbers for one in each), each[0].wrong)
