"""Autoregressive models: the distribution of each token, given those before it.

    y, state = model(tokens, state, layout)      y[:, t] predicts tokens[:, t] from tokens[:, :t] and the state

The shift is inside. At position ``t`` the backbone is given the value of token ``t - 1`` and the place of token ``t``; before the first token of a document stands a
learned start vector, or the vector of a code of one's choice. So every token, the first included, has a probability, nothing crosses a reset, and a piece needs nothing of the next one. The state is the backbone's, the last token's value and how many tokens
have passed; that is all that generation needs:

    prediction, state = model.peek(state)        the distribution of the next token
    state = model.put(state, token)              take it (or any other) as the next token

The head predicts one token at every position: ``categorical`` for codes, ``logistic_mixture`` for real values, whose means may start from a learned linear
prediction (:mod:`mmlong.models.linear_prediction`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlong.layout import Layout, document_index
from mmlong.mixers import State, require_streaming
from mmlong.models.model import Config, Model, register_kind
from mmlong.models.voice import Voice, predicting_head


@register_kind("autoregressive")
class AutoregressiveModel(Voice, Model):
    """Each token from those before it.

    Args:
        config: see :class:`mmlong.models.Model`; the backbone causal, the head one that predicts every token. ``head`` may be left out: ``categorical`` for a
            modality of codes, else ``logistic_mixture``, with the modality's numbers. ``linear_prediction``, a list of offsets, moves the means of a mixture by a
            linear function of the tokens that far back. With ``linear_each: true`` each component of the mixture has one of its own. ``start``, a code, stands before the first token in place of a learned vector: what published models call the beginning of a sequence.

    Raises:
        ValueError: the backbone does not stream, the head predicts no tokens, the modality's tokens have no probability, linear prediction of codes, or a start that is no code.
    """

    own_parts = ("linear_prediction", "linear_each", "start")

    def __init__(self, config: Config) -> None:
        config = {"head": {}, **config, "kind": "autoregressive"}
        super().__init__(config)
        require_streaming(self.backbone, "an autoregressive model")
        self.find_voice(
            self.backbone.dim_in,
            self.config["head"]["name"],
            self.config.get("linear_prediction"),
            self.config.get("start"),
            bool(self.config.get("linear_each")),
        )

    def complete_head(self, head: dict[str, Any]) -> dict[str, Any]:
        """The head's options with what the modality fixes."""
        return predicting_head(self.modality, head)

    def forward_features(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None
    ) -> tuple[Tensor, State]:
        """Tokens ``(B, L, ...)`` to the features ``(B, L, D)`` that predict each of them, and the state after them.

        Features know nothing of a linear prediction; :meth:`forward` adds it.
        """
        batch, length = tokens.shape[:2]
        values = self.modality.values(tokens)
        start = self.start_vector().to(values.dtype).expand(batch, 1, -1)
        last = start if state is None else state["last"].to(values.dtype)
        passed = torch.zeros(batch, dtype=torch.int64, device=tokens.device) if state is None else state["passed"]
        line = torch.cat([last, values], 1)
        before, index = line[:, :-1], None
        resets = None if layout is None else layout.resets
        if resets is not None:
            before = torch.where(resets[..., None], start, before)
        if state is not None or resets is not None or length != self.modality.tokens_per_sample():
            index = document_index(passed, length, layout)
        places = self.modality.places(index, length)
        codes = self._codes(state, tokens) if self.reads_codes else None
        told = layout
        if codes is not None:
            told = self.told(codes[:, :-1] if resets is None else torch.where(resets, -1, codes[:, :-1]), layout)
        x, inner = self.backbone(
            before if places is None else before + places, None if state is None else state["backbone"], told
        )
        valid = torch.full_like(passed, length) if layout is None or layout.lengths is None else layout.lengths
        rows = torch.arange(batch, device=tokens.device)
        if resets is not None:
            assert index is not None
            # A row with nothing in this piece keeps its count.
            passed = torch.where(valid > 0, index[rows, (valid - 1).clamp_min(0)] + 1, passed)
        else:
            passed = passed + valid
        after = {"backbone": inner, "last": line[rows, valid].unsqueeze(1), "passed": passed}
        if codes is not None:
            after["code"] = codes[rows, valid].unsqueeze(1)
        if self.linear is not None:
            after["tokens"] = self.kept(state, tokens, valid)
        return x, after

    def state_before(self, tokens: Tensor, start: int, layout: Layout | None = None) -> State:
        """The state after ``tokens[:, :start]``, without the backbone's (``None``): what a piece that begins there needs of the tokens themselves.

        Args:
            tokens: ``(B, L, ...)``, the whole rows.
            start: where the piece begins, at least 1. Rows that end before it get some state.
            layout: of the whole rows.
        """
        passed = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        index = document_index(passed, start, None if layout is None else layout.slice(0, start))
        state = {
            "backbone": None,
            "last": self.modality.values(tokens[:, start - 1 : start]),
            "passed": index[:, -1] + 1,
        }
        if self.reads_codes:
            state["code"] = tokens[:, start - 1 : start]
        if self.linear is not None:
            line = torch.cat([self.tail(None, tokens), tokens[:, :start]], 1)
            state["tokens"] = line[:, line.shape[1] - self.linear.reach :]
        return state

    def _codes(self, state: State, tokens: Tensor) -> Tensor:
        """The code before the piece, -1 for the start vector, and those of the piece: ``(B, 1 + L)``."""
        last = tokens.new_full((tokens.shape[0], 1), -1) if state is None else state["code"]
        return torch.cat([last, tokens], 1)

    def forward(self, tokens: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Tokens to the distribution of each of them, and the state after them."""
        x, after = self.forward_features(tokens, state, layout)
        prediction = self.forward_head(x, layout)
        if self.linear is not None:
            batch, length = tokens.shape[:2]
            passed = torch.zeros(batch, dtype=torch.int64, device=tokens.device) if state is None else state["passed"]
            before = torch.cat([self.tail(state, tokens), tokens[:, :-1]], 1)
            prediction = self.moved(prediction, before, length, document_index(passed, length, layout))
        return prediction, after

    # generation

    def begin(self, batch: int = 1) -> State:
        """The state before the first token of ``batch`` rows."""
        start = self.start_vector().detach()
        passed = torch.zeros(batch, dtype=torch.int64, device=start.device)
        state = {"backbone": None, "last": start.expand(batch, 1, -1), "passed": passed}
        if self.reads_codes:
            state["code"] = torch.full((batch, 1), -1, dtype=torch.int64, device=start.device)
        if self.linear is not None:
            state["tokens"] = start.new_zeros(batch, self.linear.reach, self.modality.channels)
        return state

    def peek(self, state: State) -> tuple[Tensor, State]:
        """What the next token may be.

        Args:
            state: from :meth:`begin`, :meth:`put`, or a call of the model on a prompt.

        Returns:
            ``(prediction, state)``: the head's prediction ``(B, 1, ...)``, and a state for :meth:`put` only.
        """
        places = self.modality.places(state["passed"][:, None], 1)
        x = state["last"] if places is None else state["last"] + places
        y, inner = self.backbone(x, state["backbone"], self.told(state.get("code"), None))
        prediction = self.forward_head(y)
        if self.linear is not None:
            prediction = self.moved(prediction, state["tokens"], 1, state["passed"][:, None])
        return prediction, {**state, "backbone": inner}

    def put(self, state: State, token: Tensor) -> State:
        """The state after ``token (B, 1, ...)``, for the state that :meth:`peek` gave."""
        after = {**state, "last": self.modality.values(token), "passed": state["passed"] + 1}
        if self.reads_codes:
            after["code"] = token
        if self.linear is not None:
            after["tokens"] = torch.cat([state["tokens"][:, 1:], token], 1)
        return after
