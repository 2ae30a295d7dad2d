"""Joint training: several modalities in one causal model, in one sequence of spans or in batches that alternate, each in bits of its own.

Batches and orders are those of :mod:`mmlong.tasks.spans_task`. See :class:`mmlong.models.JointModel`. With ``strategy: sequence_parallel`` each rank takes a piece of every row, whatever spans lie in it (see :mod:`mmlong.parallel`).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.backbone.segmented import check_keep, segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.own_loss import own_losses, sum_own_loss
from mmlong.models import JointModel, Spans
from mmlong.parallel import SequenceMesh, sequence_parallel_loss, take_piece
from mmlong.tasks.joint_report import JointReport
from mmlong.tasks.spans_task import SpansTask, check_named
from mmlong.training.optim import OptimConfig


class JointTask(SpansTask):
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
    ranks: SequenceMesh | None = None
    """Where this rank stands, when several share a sequence: the strategy sets it."""
    ranks_take_layers = False
    """Row after row only: a piece that runs layer by layer would have to know what stands before it."""

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
        check_named("weights", weights, modalities)
        check_named("sample_lengths", sample_lengths, modalities)
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

    @property
    def joint(self) -> JointModel:
        """The model, as what it is."""
        assert isinstance(self.model, JointModel)
        return self.model

    def configure_callbacks(self) -> list[pl.Callback]:
        """Samples at the end of a test, beside the base's."""
        return [*super().configure_callbacks(), *([JointReport()] if self.samples else [])]

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

    def loss(self, spans: Spans, layout: Layout) -> tuple[Tensor, dict[str, Counted]]:
        """The loss in bits (in training with the mixers' own), and what was counted of each modality."""
        share, batch = self._share(spans), spans.kind.shape[0]
        own_share = 1 / max(int((spans.kind >= 0).sum()), 1) / math.log(2)
        asks = self.training and self.model.backbone.has_own_loss
        counted = {name: Counted.nothing(batch, spans.kind.device) for name in self.joint.names}

        # Which row each position is of goes with it: ranks may run a few rows at a time.
        row = torch.arange(batch, device=spans.kind.device)[:, None].expand_as(spans.kind)

        def step(pieces: list[Tensor], state: State, piece: Layout | None) -> tuple[Tensor, State]:
            *pieces, row = pieces
            here = Spans.of(pieces, self.joint.names)
            collecting: Any = own_losses() if asks else nullcontext([])
            with collecting as found:
                prediction, state = self.model(here, state, piece)
            total = torch.zeros((), device=here.kind.device)
            for name, (nats, numbers) in self.joint.losses(prediction, here).items():
                total = total + share[name] * nats
                counted[name].add(nats, numbers)
                if not self.training and self.is_text(name):
                    wrong = prediction[name][0].argmax(-1) != here.pick(name)[0]
                    counted[name].add_wrong(row[here.where(name)], wrong)
            if found and (own := sum_own_loss(found)) is not None:
                total = total + own * own_share
            return total, state

        inputs = [*spans.tensors(), row]
        if self.ranks is not None:
            pieces, here = take_piece(inputs, layout, self.ranks.sequence_size, self.ranks.sequence_rank)
            total = sequence_parallel_loss(
                self.model, step, pieces, self.ranks.sequence_group, here, segment=self.segment, keep=self.keep,
                rows=self.ranks.rows, reduce="mean",
            )  # fmt: skip
        else:
            segment = self.segment or spans.kind.shape[1]
            total, _ = segmented_loss(self.model, step, inputs, segment, None, layout, self.keep)
        # The backward of segments computes them again, and that is not to be counted.
        found = {name: one.copy() for name, one in counted.items()}
        if self.ranks is not None:
            for one in found.values():
                one.add_ranks(self.ranks)
        return total, found

    def draw_orders(self, known: int, count: int) -> list[int]:
        """Which of the orders each row has; the ranks that share a sequence draw alike."""
        chosen = torch.tensor(super().draw_orders(known, count), device=self.device)
        if self.ranks is not None:
            dist.broadcast(chosen, group=self.ranks.sequence_group, group_src=0)
        return chosen.tolist()

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
        self.log_found(f"{stage}/bits", everything.bits, everything.numbers, prog_bar=True)
        for number, name in enumerate(self.joint.names):
            mine = [(order, counted[name], spans) for order, counted, spans in found if name in order]
            for order, counted, spans in mine if len(orders) > 1 else []:
                before = "_".join(order[: order.index(name)]) or "nothing"
                self._log_one(f"{stage}/{name}_after_{before}", name, counted, [(counted, spans)], number)
            if mine:
                whole = sum_of({str(k): counted for k, (_, counted, _) in enumerate(mine)})
                self._log_one(f"{stage}/{name}", name, whole, [(counted, spans) for _, counted, spans in mine], number)

    def _log_one(self, prefix: str, name: str, whole: Counted, each: list[tuple[Counted, Spans]], number: int) -> None:
        self.log_found(f"{prefix}/bits", whole.bits, whole.numbers)
        if self.is_text(name):
            there = [(spans.kind == number).any(1) for _, spans in each]
            right = sum(int((counted.wrong == 0)[rows].sum()) for (counted, _), rows in zip(each, there, strict=True))
            count = sum(int(rows.sum()) for rows in there)
            self.log_found(f"{prefix}/exact", right / max(count, 1), count)


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

    def add_ranks(self, ranks: SequenceMesh) -> None:
        """Count what the other ranks of a sequence found: a collective."""
        for t in (nats := self.nats.double(), numbers := torch.tensor(self.numbers, device=nats.device), self.wrong):
            dist.all_reduce(t, group=ranks.sequence_group)
        self.nats, self.numbers = nats, int(numbers)

    def copy(self) -> Counted:
        """As it is now."""
        return replace(self)


def sum_of(counted: dict[str, Counted]) -> Counted:
    """Nats and numbers of several together."""
    each = list(counted.values())
    return Counted(torch.stack([one.nats for one in each]).sum(), sum(one.numbers for one in each), each[0].wrong)
