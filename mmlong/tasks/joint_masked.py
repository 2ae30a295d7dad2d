"""Masked training of several modalities in one sequence: hide tokens of any of them, or a whole span, and predict them from both sides and from all modalities.

Which tokens are chosen is drawn modality by modality, as :mod:`mmlong.tasks.masking` draws a row's. In ``whole`` of the rows one span, drawn evenly among those that the row has, is hidden whole and nothing else: so a model
learns a caption from its picture and a picture from its caption, as models that draw tokens together do (4M, Mizrahi et al. 2023, draws how much of each modality is given; here it is all of one or a share of each).

Batches and orders are those of :mod:`mmlong.tasks.spans_task`, the model is :class:`mmlong.models.JointMaskedModel`. In training the choice is drawn anew at every step; in evaluation it is a pure function of the sample's index.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmlong.backbone import BackboneConfig
from mmlong.layout import Layout
from mmlong.models import JointMaskedModel, Spans
from mmlong.registry import check_options
from mmlong.tasks.masking import HIDDEN, REPLACED, Masking, replacements
from mmlong.tasks.spans_task import SpansTask, check_named
from mmlong.tasks.views import Generators
from mmlong.training.optim import OptimConfig
from mmlong.training.rng import sample_generators, step_generator

_PURPOSE = 1


class JointMaskedTask(SpansTask):
    """Prediction of chosen tokens of several modalities.

    Logs of each modality ``val/NAME/bits`` (per chosen token) and ``val/NAME/accuracy`` for codes, ``val/NAME/error`` (mean squared) for real values, and ``val/loss``. Where whole spans are hidden in training, the same of a span that
    is hidden whole while all others of its row are seen, of rows that have others: ``val/NAME_from_others/bits``, and of text ``val/NAME_from_others/exact``, the share of spans of which every byte is right.

    Args:
        modalities: ``{NAME: {name: ..., option: ...}}``; what the data fixes is filled in from ``data_info``.
        backbone: see :class:`mmlong.tasks.base.Task`; it sees both sides (direction ``alternate`` or ``both``) and keeps every token (no ``pool``).
        heads: ``{NAME: {name: ..., option: ...}}``; left out, ``categorical`` for codes and ``regress_tokens`` for real values.
        orders: lists of names, the spans that a row may have, in which order; left out, all as they stand in ``modalities``.
        weights: of each modality, what the mean over its chosen tokens weighs in the loss, ``{NAME: number}``, 1 where not named.
        masking: which tokens are chosen and what becomes of them.
        masking_of: ``{NAME: {share: ..., ...}}``, what is different for a modality.
        whole: share of the rows of several spans in which one span is hidden whole.
        optim, compile, data_info, backbone_from, freeze_backbone: see :class:`mmlong.tasks.base.Task`.

    Raises:
        ValueError: a name that no modality has, or a share outside its range.
        TypeError: an option that a masking does not have.
    """

    kind = "joint_masked"

    def __init__(
        self,
        modalities: dict[str, dict[str, Any]],
        backbone: BackboneConfig,
        heads: dict[str, dict[str, Any]] | None = None,
        orders: list[list[str]] | None = None,
        weights: dict[str, float] | None = None,
        masking: Masking | None = None,
        masking_of: dict[str, dict[str, Any]] | None = None,
        whole: float = 0.0,
        optim: OptimConfig | None = None,
        compile: bool = False,
        data_info: dict[str, Any] | None = None,
        backbone_from: str | None = None,
        freeze_backbone: bool | int = False,
    ) -> None:
        check_named("weights", weights, modalities)
        check_named("masking_of", masking_of, modalities)
        if not 0 <= whole <= 1:
            raise ValueError(f"model.whole is {whole}; it is a share of the rows, 0 to 1")
        for name, given in (masking_of or {}).items():
            check_options(f"model.masking_of.{name}", Masking, given)
        own: dict[str, Any] = {} if orders is None else {"orders": [list(order) for order in orders]}
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
        shared = asdict(masking or Masking())
        self.maskings = {name: Masking(**{**shared, **(masking_of or {}).get(name, {})}) for name in modalities}
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in modalities}
        self.whole = whole

    @property
    def masked(self) -> JointMaskedModel:
        """The model, as what it is."""
        assert isinstance(self.model, JointMaskedModel)
        return self.model

    def draw(self, spans: Spans, generators: Generators, whole: float) -> Tensor:
        """Fates of the tokens, int64 ``(B, L)`` (see :mod:`mmlong.tasks.masking`), each row from its own generator; 0 at padding.

        Args:
            spans: of the batch.
            generators: one a row, on the CPU.
            whole: share of the rows of several spans in which one is hidden whole.
        """
        kind = spans.kind.cpu()
        fates = torch.zeros_like(kind)
        for row, fate, draw in zip(kind, fates, generators, strict=True):
            present = row[row >= 0].unique().tolist()
            if whole and len(present) > 1 and float(torch.rand((), generator=draw)) < whole:
                fate[row == present[int(torch.randint(len(present), (), generator=draw))]] = HIDDEN
                continue
            for number in present:
                here = row == number
                fate[here] = self.maskings[self.masked.names[number]].draw(int(here.sum()), draw)
        return fates.to(spans.kind.device)

    def seen(self, spans: Spans, fates: Tensor, generators: Generators) -> Spans:
        """The spans with other tokens where that is their fate: codes drawn evenly, real tokens of other places in the span."""
        tokens = dict(spans.tokens)
        for number, (name, voice) in enumerate(self.masked.voices.items()):
            swapped = (fates == REPLACED) & (spans.kind == number)
            if not bool(swapped.any()):
                continue
            changed = tokens[name].clone()
            for row, draw in enumerate(generators):
                here = spans.kind[row] == number
                if bool(swapped[row].any()):
                    others = replacements(changed[row, here][None], [int(here.sum())], voice.modality.codes, [draw])[0]
                    changed[row, swapped[row]] = others[swapped[row, here]]
            tokens[name] = changed
        return Spans(spans.kind, spans.index, tokens)

    def guessed(self, spans: Spans, layout: Layout, fates: Tensor, generators: Generators) -> dict[str, Guessed]:
        """What the model says of the tokens that have a fate, by modality."""
        model = self.masked
        x, _ = model.forward_features(self.seen(spans, fates, generators), None, layout, fates == HIDDEN)
        found = {}
        for number, (name, (prediction, target)) in enumerate(model.guess(x, spans, fates > 0).items()):
            voice = model.voices[name]
            loss, count = voice.head.loss(prediction, target)
            if voice.modality.codes is not None:
                wrong = prediction.detach()[0].argmax(-1) != target[0]
                rows = ((fates > 0) & (spans.kind == number)).nonzero(as_tuple=True)[0]
                misses = torch.zeros(spans.kind.shape[0], dtype=torch.int64, device=wrong.device).index_add(0, rows, wrong.long())  # fmt: skip
                found[name] = Guessed(loss / math.log(2), float(count), target.shape[1], misses, None)
            else:
                square = (prediction.detach().float() - target.float()).square().sum()
                found[name] = Guessed(loss, float(count), target.numel(), None, square)
        return found

    def loss(self, guessed: dict[str, Guessed]) -> Tensor:
        """Means of the modalities that are there, by their weights: bits of codes, the head's error of numbers."""
        there = {name: one for name, one in guessed.items() if one.count}
        whole = sum(self.weights[name] for name in there) or 1.0
        # Those that are not there are 0, and give their parameters a gradient.
        parts = [one.loss / max(one.count, 1.0) * (self.weights[name] / whole) for name, one in guessed.items()]
        return torch.stack(parts).sum()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss."""
        spans, layout = self.encode(batch)
        draws = [step_generator(self.global_rank)] * spans.kind.shape[0]
        with self.with_own_losses() as own:
            guessed = self.guessed(spans, layout, self.draw(spans, draws, self.whole), draws)
        loss = self.loss(guessed)
        for name, one in guessed.items():
            if one.tokens:
                for what, value in one.told().items():
                    self.log(f"train/{name}/{what}", value, batch_size=one.tokens)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return sum(own, torch.zeros_like(loss)) / math.log(2) + loss

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """Count a batch in each of the orders."""
        orders, count = self.masked.orders, batch["index"].shape[0]
        found: dict[str, list[Guessed]] = {name: [] for name in self.masked.names}
        crossed: dict[str, list[tuple[Guessed, Tensor]]] = {name: [] for name in self.masked.names}
        losses = []
        for order in orders:
            spans, layout = self.encode(batch, [order] * count)
            draws = sample_generators(batch["index"], _PURPOSE)
            guessed = self.guessed(spans, layout, self.draw(spans, draws, 0.0), draws)
            losses.append(self.loss(guessed).detach())
            for name in order:
                found[name].append(guessed[name])
            for name in order if self.whole and len(order) > 1 else ():
                mine = spans.kind == self.masked.names.index(name)
                # As in training: a row of one span has nothing to be predicted from.
                mine = mine & ((spans.kind >= 0) & ~mine).any(1, keepdim=True)
                alone = self.guessed(spans, layout, torch.where(mine, HIDDEN, 0), draws)[name]
                crossed[name].append((alone, mine.any(1)))
        counts = int(self.counted_rows(batch).sum())
        self.log_found(f"{stage}/loss", torch.stack(losses).mean(), counts, prog_bar=True)
        for name, each in found.items():
            self._log_all(f"{stage}/{name}", each)
            self._log_all(f"{stage}/{name}_from_others", [one for one, _ in crossed[name]])
            if crossed[name] and self.is_text(name):
                right = sum(int(((one.misses == 0) & rows).sum()) for one, rows in crossed[name])
                there = sum(int(rows.sum()) for _, rows in crossed[name])
                self.log_found(f"{stage}/{name}_from_others/exact", right / max(there, 1), there)

    def _log_all(self, prefix: str, each: list[Guessed]) -> None:
        if each:
            total = sum_of(each)
            for what, value in total.told().items():
                self.log_found(f"{prefix}/{what}", value, total.tokens)

    @staticmethod
    def counted_rows(batch: dict[str, Any]) -> Tensor:
        """Bool ``(B,)``: rows that count."""
        return batch["weight"] > 0 if "weight" in batch else torch.ones_like(batch["index"], dtype=torch.bool)


@dataclass
class Guessed:
    """What was found of a modality's chosen tokens.

    Attributes:
        loss: summed: bits of codes, the head's error of numbers.
        count: what its mean is over.
        tokens: codes, or numbers, that were guessed.
        misses: int64 ``(B,)``, codes of each row that were not the likeliest; ``None`` for numbers.
        square: summed squared errors of numbers; ``None`` for codes.
    """

    loss: Tensor
    count: float
    tokens: int
    misses: Tensor | None
    square: Tensor | None

    def told(self) -> dict[str, Tensor]:
        """The metrics."""
        if self.misses is not None:
            return {
                "bits": self.loss.detach() / max(self.count, 1.0),
                "accuracy": 1 - self.misses.sum() / max(self.tokens, 1),
            }
        assert self.square is not None
        return {"error": self.square / max(self.tokens, 1)}


def sum_of(each: list[Guessed]) -> Guessed:
    """Several batches, of one modality, together; the rows of one behind those of another."""
    misses = [one.misses for one in each if one.misses is not None]
    squares = [one.square for one in each if one.square is not None]
    return Guessed(
        torch.stack([one.loss.detach() for one in each]).sum(),
        sum(one.count for one in each),
        sum(one.tokens for one in each),
        torch.cat(misses) if misses else None,
        torch.stack(squares).sum() if squares else None,
    )
