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

from collections.abc import Mapping

import torch
from torch import Tensor

from mmlong.heads import Head
from mmlong.layout import Layout
from mmlong.mixers import State, require_streaming
from mmlong.modalities import Modality
from mmlong.models.model import Config, register_kind
from mmlong.models.spans import Spans
from mmlong.models.spans_model import SpansModel, blank
from mmlong.models.voice import JointVoice


@register_kind("joint")
class JointModel(SpansModel):
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

    own_parts = ("heads", "orders", "linear_prediction")

    def __init__(self, config: Config) -> None:
        super().__init__({**config, "kind": "joint"})

    def make(self, config: Config) -> None:
        """The voices."""
        require_streaming(self.backbone, "a joint model")
        linear = config.get("linear_prediction") or {}
        self.find_modalities(
            config,
            "a joint model",
            lambda name, options, head: JointVoice(options, head, self.backbone, linear.get(name)),
        )

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

    def forward_features(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None
    ) -> tuple[Tensor, State]:
        """Tokens ``(B, L, ...)`` of this modality, going on the span that the state is in, to features and the state after them.

        What :meth:`JointModel.forward_features` does of spans of one modality, without looking for them: a program can hold it.

        Raises:
            ValueError: rows of other lengths than the tokens', or documents in a row.
        """
        if layout is not None and (layout.lengths is not None or layout.resets is not None):
            raise ValueError("a span that goes on has full rows, without lengths and resets: give those to the joint model")  # fmt: skip
        state = self.begin(tokens.shape[0]) if state is None else state
        index = self._index(tokens, state)
        values = self.modality.values(tokens)
        line = torch.cat([state["last"].to(values.dtype), values], 1)
        beside = self.voice.add_to_tokens(index == 0, index)
        x, inner = self.model.backbone(line[:, :-1] + beside, state["backbone"], None)
        after = {"backbone": inner, "last": line[:, -1:], "passed": state["passed"] + tokens.shape[1]}
        return x, {**after, "tails": self._tails(state, tokens)}

    def __call__(self, tokens: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Tokens ``(B, L, ...)`` to the distribution of each of them, and the state after them."""
        state = self.begin(tokens.shape[0]) if state is None else state
        x, after = self.forward_features(tokens, state, layout)
        prediction = self.head(x)
        if self.voice.linear is not None:
            before = torch.cat([state["tails"][self.name].to(tokens.dtype), tokens[:, :-1]], 1)
            prediction = self.voice.moved(prediction, before, tokens.shape[1], self._index(tokens, state))
        return prediction, after

    @staticmethod
    def _index(tokens: Tensor, state: State) -> Tensor:
        """How many tokens of the span come before each."""
        return state["passed"][:, None] + torch.arange(tokens.shape[1], device=tokens.device)

    def _tails(self, state: State, tokens: Tensor) -> dict[str, Tensor]:
        """The tails after tokens of this modality; of the others, nothing has passed."""
        found = {}
        for name, tail in state["tails"].items():
            passed = tokens if name == self.name else blank(self.model.voices[name].modality, tokens)
            found[name] = torch.cat([tail, passed.to(tail.dtype)], 1)[:, tokens.shape[1] :]
        return found

    def peek(self, state: State) -> tuple[Tensor, State]:
        """What the next token may be; as :meth:`mmlong.models.AutoregressiveModel.peek`."""
        index = state["passed"][:, None]
        y, inner = self.model.backbone(
            state["last"] + self.voice.add_to_tokens(index == 0, index), state["backbone"], None
        )
        prediction = self.head(y)
        if self.voice.linear is not None:
            prediction = self.voice.moved(prediction, state["tails"][self.name], 1, index)
        return prediction, {**state, "backbone": inner}

    def put(self, state: State, token: Tensor) -> State:
        """The state after ``token (B, 1, ...)``; as :meth:`mmlong.models.AutoregressiveModel.put`."""
        after = {**state, "last": self.modality.values(token), "passed": state["passed"] + 1}
        return {**after, "tails": self._tails(state, token)}
