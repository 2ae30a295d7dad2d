"""Joint models: several modalities in one model, in one sequence of spans.

    y, state = model(spans, state, layout)      y[name] predicts the tokens of that modality, from all that comes before them in their rows

A picture and its caption, or a sound and its words, are one row: the tokens of the first, then those of the second (:mod:`mmlong.models.spans`). The backbone is one and knows nothing of it; each modality has its own
stem, start vector and head (:class:`mmlong.models.voice.JointVoice`). At position ``t`` the backbone is given the value of token ``t - 1``, whatever its modality, and the place of token ``t``; at the first token of a span the start
vector of its modality is added, which says what begins. So no position is spent on a mark, a row has as many positions as tokens, and a joint model of one modality is an autoregressive model.

What comes first is the order of a row: with ``[picture, text]`` the model makes a text from a picture, with ``[text, picture]`` a picture from a text; with both, drawn sample by sample in training, both. A batch of
one modality alone is spans too, so batches of several modalities may alternate.

A row has no grid, so mixers that read one are refused; ``masked_conv2d``, which counts columns from the row's beginning, is a picture's neighbourhood where the picture comes first, and elsewhere a fixed set of taps.
How long a span is, is not modelled: generation is told, or the data end with a mark of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.heads import Head
from mmlong.layout import Layout
from mmlong.mixers import Mixer, State, require_streaming
from mmlong.modalities import Modality
from mmlong.models.model import Config, Model, register_kind
from mmlong.models.spans import Spans, lay_spans
from mmlong.models.voice import JointVoice
from mmlong.registry import nearest


@register_kind("joint")
class JointModel(Model):
    """Spans of several modalities, each token from those before it.

    Args:
        config: ``{"kind": "joint", "modalities": {name: {"name": ..., **options}}, "backbone": {...}}``, the backbone causal. May have ``heads`` (by name, options of each; those left
            out suit their modality), ``orders`` (lists of names: which spans a row may have, and in which order; left out, all as they stand) and ``linear_prediction`` (by name, a list of offsets).

    Attributes:
        voices: what belongs to each modality, by name.
        orders: the orders that a row may have.

    Raises:
        ValueError: the backbone does not stream, or reads codes or a grid, a name that no modality has, a head that predicts no tokens, or a modality whose tokens have no probability.
    """

    parts = ("modalities", "backbone")
    own_parts = ("heads", "orders", "linear_prediction")

    def __init__(self, config: Config) -> None:
        super().__init__({**config, "kind": "joint"})

    def make(self, config: Config) -> None:
        """The voices."""
        require_streaming(self.backbone, "a joint model")
        if self.backbone.reads_codes:
            raise ValueError("the backbone reads the codes of one modality, and a joint model has several")
        self.reads_codes = False
        for module in self.backbone.modules():
            if isinstance(module, Mixer) and module.traits.grid:
                raise ValueError(
                    f"{type(module).__name__} reads a grid, and a row of spans has none: take a mixer of sequences (`mmlong mixers` shows which)"
                )
        names = list(config["modalities"])
        if not names:
            raise ValueError("a joint model has at least one modality: give modalities, {name: {name: ..., ...}}")
        heads, linear = config.get("heads") or {}, config.get("linear_prediction") or {}
        orders = config.get("orders") or [names]
        for part, given in (("heads", heads), ("linear_prediction", linear), *(("orders", order) for order in orders)):
            for name in given:
                self._known(name, names, part)
        for order in orders:
            if len(set(order)) != len(order) or not order:
                raise ValueError(f"orders has {order}; an order names one modality or more, none twice")
        self.voices: Any = nn.ModuleDict()
        for name, options in config["modalities"].items():
            try:
                self.voices[name] = JointVoice(options, heads.get(name) or {}, self.backbone, linear.get(name))
            except KeyError as error:  # torch's own reasons: a dot, an empty name, a method of the dict
                raise ValueError(f"modalities has {name!r}, which cannot be a name here: {error.args[0]}") from error
        config["heads"] = {name: voice.options for name, voice in self.voices.items()}
        config["orders"] = [list(order) for order in orders]
        self.orders: list[list[str]] = config["orders"]

    @staticmethod
    def _known(name: str, names: Sequence[str], part: str) -> None:
        if name not in names:
            raise ValueError(f"{part} has {name!r}{nearest(name, names)}; the modalities are {', '.join(names)}")

    @property
    def modality(self) -> Modality:  # type: ignore[override]
        """Each voice has one; what asks for the model's is for models of one modality, and gets a clear answer."""
        raise ValueError(
            f"this is for models of one modality, and a joint model has {', '.join(self.names)}: model.voices[name].modality"
        )

    @property
    def names(self) -> list[str]:
        """Names of the modalities, in the order of their numbers."""
        return list(self.voices)

    def tokens_per_sample(self) -> int | None:
        """Tokens of every row, where all orders have as many; else ``None``."""
        each = {name: voice.modality.tokens_per_sample() for name, voice in self.voices.items()}
        totals = {None if None in (found := [each[n] for n in order]) else sum(found) for order in self.orders}
        return totals.pop() if len(totals) == 1 else None

    def encode(  # type: ignore[override]
        self,
        raw: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor] | None = None,
        orders: Sequence[Sequence[str]] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Spans, Layout]:
        """Raw tensors to spans and their layout.

        Args:
            raw: by modality, as the modality takes it. Not all have to be there.
            lengths: by modality, int64, how much of each is valid; of those that are uneven.
            orders: of each row; ``None``: the first of the model's for all.
            rows: by modality, int64 ``(n,)``, in which rows of the batch its ``n`` raw tensors stand; of those that are not in every row.
            counted: bool ``(B,)``, rows that have tokens at all; ``None``: all.

        Raises:
            ValueError: no such modality, or rows that do not fit.
        """
        lengths, rows = lengths or {}, rows or {}
        for name in raw:
            self._known(name, self.names, "the batch")
        sizes = {int(raw[name].shape[0]) for name in raw if name not in rows}
        if orders is not None:
            sizes.add(len(orders))
        if len(sizes) != 1:
            raise ValueError(
                f"the modalities of a batch have {sorted(sizes)} rows; where not all are in each, say rows and orders"
            )
        (batch,) = sizes
        device = next(iter(raw.values())).device
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, voice in self.voices.items():
            modality = voice.modality
            if name not in raw:
                nothing = torch.zeros(batch, dtype=torch.int64, device=device)
                parts[name] = _blank(voice, nothing[:, None][:, :0]), nothing
                continue
            tokens, layout = modality.encode(raw[name], lengths.get(name), None)
            valid = layout.lengths
            if valid is None:
                valid = torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.int64, device=device)
            if name in rows:
                there = torch.zeros(batch, dtype=torch.int64, device=device).index_put((rows[name],), valid)
                tokens = tokens.new_zeros(batch, *tokens.shape[1:]).index_put((rows[name],), tokens)
                valid = there
            parts[name] = tokens, valid if counted is None else valid.masked_fill(~counted, 0)
        return lay_spans(parts, [self.orders[0]] * batch if orders is None else orders)

    def forward_features(  # type: ignore[override]
        self, spans: Spans, state: State = None, layout: Layout | None = None
    ) -> tuple[Tensor, State]:
        """Spans to the features ``(B, L, D)`` that predict each of their tokens, and the state after them."""
        batch, length = spans.kind.shape
        like = next(iter(self.voices.values())).start
        values = like.new_zeros(batch, length, self.backbone.dim_in)
        beside = torch.zeros_like(values)
        for name, voice in self.voices.items():
            rows, columns = spans.where(name)
            index = spans.index[rows, columns][None]
            mine = voice.modality.values(spans.pick(name))[0]
            # Where a modality is not in the batch, this is of no tokens: its parameters still have a gradient, of zeros, as DDP wants it.
            values = values.index_put((rows, columns), mine.to(values.dtype))
            added = voice.add_to_tokens(index == 0, index)[0]
            beside = beside.index_put((rows, columns), added.to(values.dtype))
        last = torch.zeros_like(values[:, :1]) if state is None else state["last"].to(values.dtype)
        line = torch.cat([last, values], 1)
        before = line[:, :-1]
        if layout is not None and layout.resets is not None:
            before = before.masked_fill(layout.resets[..., None], 0)
        x, inner = self.backbone(before + beside, None if state is None else state["backbone"], layout)
        everywhere = torch.full((batch,), length, dtype=torch.int64, device=values.device)
        valid = everywhere if layout is None or layout.lengths is None else layout.lengths
        here = torch.arange(batch, device=values.device)
        # A row with nothing in this piece keeps its count.
        passed = torch.zeros_like(everywhere) if state is None else state["passed"]
        passed = torch.where(valid > 0, spans.index[here, (valid - 1).clamp_min(0)] + 1, passed)
        tails = {
            name: voice.kept(_tail_state(state, name), spans.tokens[name], valid)
            for name, voice in self.voices.items()
            if voice.linear is not None
        }
        return x, {"backbone": inner, "last": line[here, valid].unsqueeze(1), "passed": passed, "tails": tails}

    def forward(  # type: ignore[override]
        self, spans: Spans, state: State = None, layout: Layout | None = None
    ) -> tuple[dict[str, Tensor], State]:
        """Spans to the distribution of each of their tokens, and the state after them.

        Returns:
            By modality, its head's prediction ``(1, N, ...)`` of the ``N`` tokens that the batch has of it, row by row (:meth:`Spans.pick` gives those); and the state.
        """
        x, after = self.forward_features(spans, state, layout)
        found: dict[str, Tensor] = {}
        for number, (name, voice) in enumerate(self.voices.items()):
            rows, columns = spans.where(name)
            prediction = voice.head(x[rows, columns][None])
            if voice.linear is not None:
                tokens = spans.tokens[name]
                before = torch.cat([voice.tail(_tail_state(state, name), tokens), tokens[:, :-1]], 1)
                # What is of another modality has no token of this one before it.
                index = torch.where(spans.kind == number, spans.index, 0)
                moves = voice.linear(before, tokens.shape[1], index)[rows, columns][None]
                prediction = voice.head.move(prediction, moves)
            found[name] = prediction
        return found, after

    def losses(self, prediction: Mapping[str, Tensor], spans: Spans) -> dict[str, tuple[Tensor, Tensor]]:
        """By modality, summed nats of what :meth:`forward` predicted, and how many numbers of raw data that is."""
        return {name: voice.head.loss(prediction[name], spans.pick(name)) for name, voice in self.voices.items()}

    def speaking(self, name: str) -> Speaking:
        """The model as one that goes on in this modality: what :mod:`mmlong.generation` takes.

        Raises:
            ValueError: no such modality.
        """
        self._known(name, self.names, "speaking")
        return Speaking(self, name)

    def forward_head(self, x: Tensor, layout: Layout | None = None, pre_logits: bool = False) -> Tensor:
        """Of one modality only: ``model.voices[name].head``."""
        raise ValueError("a joint model has a head for each modality: model.voices[name].head")

    def reset_classifier(self, num_classes: int, **options: Any) -> None:
        """A joint model predicts tokens."""
        raise ValueError("a joint model has a head for each modality, and none that classifies")

    def get_classifier(self) -> nn.Module:
        """A joint model predicts tokens."""
        raise ValueError("a joint model has a head for each modality: model.voices[name].head")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As the plain model's; the stems are those of the voices."""
        return {**super().group_matcher(coarse), "stem": r"^voices\.\w+\.(?:modality\b|start$)"}


def _tail_state(state: State, name: str) -> State:
    """What :class:`~mmlong.models.voice.Voice` calls the state: the tail of one modality."""
    return None if state is None else {"tokens": state["tails"][name]}


class Speaking:
    """A joint model that goes on in one modality, with what generation asks of an autoregressive model.

    A state is that of the joint model, so another modality goes on from it::

        picture, caption = model.speaking("picture"), model.speaking("text")
        state = read(picture, tokens)                                the state after a picture
        words = generate(caption, 20, state=caption.open(state))     a caption of it

    Args:
        model: the joint model.
        name: of the modality.
    """

    def __init__(self, model: JointModel, name: str) -> None:
        self.model, self.name = model, name
        self.voice: JointVoice = model.voices[name]

    @property
    def modality(self) -> Modality:
        return self.voice.modality

    @property
    def head(self) -> Head:
        return self.voice.head

    @property
    def training(self) -> bool:
        return self.model.training

    def eval(self) -> Speaking:
        """Put the joint model in evaluation mode."""
        return self.train(False)

    def train(self, mode: bool = True) -> Speaking:
        """Put the joint model in training mode, or out of it."""
        self.model.train(mode)
        return self

    def begin(self, batch: int = 1) -> State:
        """The state before the first token of ``batch`` rows, of which this span is the first."""
        like = self.voice.start_vector().detach()
        tails = {
            name: like.new_zeros(batch, voice.linear.reach, voice.modality.channels)
            for name, voice in self.model.voices.items()
            if voice.linear is not None
        }
        return {
            "backbone": None,
            "last": like.new_zeros(batch, 1, self.model.backbone.dim_in),
            "passed": torch.zeros(batch, dtype=torch.int64, device=like.device),
            "tails": tails,
        }

    def open(self, state: State) -> State:
        """The state with a span of this modality begun behind all that it has seen."""
        return {**state, "passed": torch.zeros_like(state["passed"])}

    def spans(self, tokens: Tensor, passed: Tensor) -> Spans:
        """Tokens ``(B, L, ...)`` that go on a span of which ``passed (B,)`` have come."""
        names, (batch, length) = self.model.names, tokens.shape[:2]
        kind = torch.full((batch, length), names.index(self.name), dtype=torch.int64, device=tokens.device)
        return Spans(
            kind,
            passed[:, None] + torch.arange(length, device=tokens.device),
            {name: tokens if name == self.name else _blank(voice, tokens) for name, voice in self.model.voices.items()},
        )

    def forward_features(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None
    ) -> tuple[Tensor, State]:
        """Tokens ``(B, L, ...)`` of this modality, going on the span that the state is in, to features and the state after them."""
        passed = self.begin(tokens.shape[0])["passed"] if state is None else state["passed"]
        return self.model.forward_features(self.spans(tokens, passed), state, layout)

    def peek(self, state: State) -> tuple[Tensor, State]:
        """What the next token may be; as :meth:`mmlong.models.AutoregressiveModel.peek`."""
        index = state["passed"][None]
        beside = self.voice.add_to_tokens(index == 0, index)[0].unsqueeze(1)
        y, inner = self.model.backbone(state["last"] + beside, state["backbone"], None)
        prediction = self.head(y)
        if self.voice.linear is not None:
            tail = state["tails"][self.name]
            prediction = self.voice.moved(prediction, tail, 1, state["passed"][:, None])
        return prediction, {**state, "backbone": inner}

    def put(self, state: State, token: Tensor) -> State:
        """The state after ``token (B, 1, ...)``; as :meth:`mmlong.models.AutoregressiveModel.put`."""
        after = {**state, "last": self.modality.values(token), "passed": state["passed"] + 1}
        if self.voice.linear is not None:
            tail = torch.cat([state["tails"][self.name][:, 1:], token], 1)
            after["tails"] = {**state["tails"], self.name: tail}
        return after


def _blank(voice: JointVoice, like: Tensor) -> Tensor:
    """No tokens of a modality, ``(B, L, ...)``: what stands where a row is of another."""
    shape = like.shape[:2]
    if voice.modality.codes is not None:
        return torch.zeros(shape, dtype=torch.int64, device=like.device)
    return torch.zeros(*shape, voice.modality.channels, device=like.device)
