"""Generation and likelihood through the contract: a prompt is a long piece (or several), a new token a piece of length 1.

There is nothing here that knows a mixer: what streams, generates. Memory is the state's, so it stays flat where the state is constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmlong.backbone.prefill import states_only
from mmlong.heads import Sampling
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.models import AutoregressiveModel, JointModel, Speaking
from mmlong.models.lora import merged

PIECE = 4096
"""Tokens of a prompt or file that are run at a time."""


@contextmanager
def evaluating(model: torch.nn.Module | Speaking, without: Callable[[], Any] = torch.inference_mode) -> Any:
    """Evaluation mode, without gradients; afterwards the mode it was in. ``torch.no_grad`` for what a graph may be built on later."""
    training = model.training
    model.eval()
    try:
        with without():
            yield
    finally:
        model.train(training)


def read(model: AutoregressiveModel | Speaking, prompt: Tensor, state: State = None, piece: int = PIECE) -> State:
    """The state after a prompt, read in pieces of bounded memory.

    Args:
        model: in evaluation mode.
        prompt: tokens ``(B, L, ...)``.
        state: of what came before it.
        piece: tokens run at a time.
    """
    for start in range(0, prompt.shape[1], piece):
        with states_only():
            _, state = model.forward_features(prompt[:, start : start + piece], state)
    return model.begin(prompt.shape[0]) if state is None else state


def generate(
    model: AutoregressiveModel | Speaking,
    length: int,
    prompt: Tensor | None = None,
    batch: int = 1,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    piece: int = PIECE,
    on_token: Callable[[Tensor], None] | None = None,
    state: State = None,
) -> Tensor:
    """Tokens drawn one after another.

    Args:
        model: the model; left in the mode it was in.
        length: how many new tokens.
        prompt: tokens ``(B, L, ...)`` to go on from; ``None``: from nothing.
        batch: rows, where there is no prompt.
        sampling: how to draw; temperature 0 is greedy.
        generator: of the draws; the same generator state gives the same tokens.
        piece: tokens of the prompt run at a time.
        on_token: called with each token ``(B, 1, ...)`` as it comes.
        state: of what came before, the prompt behind it; ``None``: nothing. Of a joint model, what it has of other modalities: ``model.open(state)`` begins a span of this one.

    Returns:
        ``(B, L + length, ...)``, the prompt first.

    Raises:
        ValueError: nothing to generate, an empty prompt, or more tokens than the modality has places for.
    """
    _check(model, length, prompt)
    # A token costs what it does without adapters; a stream, whose caller runs between tokens, makes them at each.
    with merged(model if isinstance(model, torch.nn.Module) else model.model), evaluating(model):
        state = _begun(model, prompt, batch, piece, state)
        tokens, _ = _drawn(model, length, state, sampling or Sampling(), generator, on_token)
        return torch.cat([*([] if prompt is None else [prompt]), *tokens], 1)


def stream(
    model: AutoregressiveModel,
    length: int,
    prompt: Tensor | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    piece: int = PIECE,
) -> Iterator[Tensor]:
    """The new tokens of :func:`generate`, each ``(B, 1, ...)`` when it is asked for: who stops asking stops the drawing. One row where there is no prompt.

    Raises:
        ValueError: as there, at once.
    """
    _check(model, length, prompt)

    def one_by_one() -> Iterator[Tensor]:
        state: State = None
        for place in range(length):
            # Only while a token is drawn: between tokens the caller's own code runs, in the caller's own modes.
            with evaluating(model):
                if place == 0:
                    state = _begun(model, prompt, 1, piece, None)
                token, state = _draw(model, state, sampling or Sampling(), generator)
            yield token

    return one_by_one()


def _check(model: AutoregressiveModel | Speaking, length: int, prompt: Tensor | None) -> None:
    if length < 0 or (prompt is not None and prompt.shape[1] < 1):
        raise ValueError(f"length is {length} and the prompt {None if prompt is None else tuple(prompt.shape)}")
    total, whole = length + (0 if prompt is None else prompt.shape[1]), model.modality.tokens_per_sample()
    if whole is not None and total > whole:
        raise ValueError(f"a sample of this modality has {whole} tokens; {total} were asked for, the prompt included")


def _begun(model: AutoregressiveModel | Speaking, prompt: Tensor | None, batch: int, piece: int, state: State) -> State:
    if prompt is not None:
        return read(model, prompt, state, piece)
    return model.begin(batch) if state is None else state


def _draw(
    model: AutoregressiveModel | Speaking, state: State, sampling: Sampling, generator: torch.Generator | None
) -> tuple[Tensor, State]:
    prediction, state = model.peek(state)
    token = model.head.sample(prediction, sampling, generator)
    return token, model.put(state, token)


def _drawn(
    model: AutoregressiveModel | Speaking,
    length: int,
    state: State,
    sampling: Sampling,
    generator: torch.Generator | None,
    on_token: Callable[[Tensor], None] | None = None,
) -> tuple[list[Tensor], State]:
    tokens: list[Tensor] = []
    for _ in range(length):
        token, state = _draw(model, state, sampling, generator)
        tokens.append(token)
        if on_token is not None:
            on_token(token)
    return tokens, state


def generate_spans(
    model: JointModel,
    order: Sequence[str],
    lengths: Mapping[str, int],
    given: Mapping[str, Tensor] | None = None,
    batch: int = 1,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    piece: int = PIECE,
) -> dict[str, Tensor]:
    """Spans of several modalities, each from those before it in its row: those that are given are read, the others drawn.

    Args:
        model: the joint model; left in the mode it was in.
        order: names of the spans.
        lengths: tokens in each span that is drawn; a modality of one fixed size knows its own.
        given: by name, tokens ``(B, L, ...)``.
        batch: rows, where nothing is given.
        sampling, generator, piece: see :func:`generate`.

    Returns:
        tokens of every span, by name.

    Raises:
        ValueError: no order, a span that is neither given nor has a length, or rows that differ in number.
    """
    known, sampling = dict(given or {}), sampling or Sampling()
    if rows := {tokens.shape[0] for tokens in known.values()}:
        if len(rows) > 1:
            raise ValueError(f"the spans that are given have {sorted(rows)} rows")
        (batch,) = rows
    if not order:
        raise ValueError("the order is empty: name the spans of a row")
    if unused := [name for name in known if name not in order]:
        raise ValueError(f"{', '.join(unused)} is given, and the order has only {', '.join(order)}")
    made: dict[str, Tensor] = {}
    state: State = None
    with evaluating(model):
        for name in order:
            speaking = model.speaking(name)
            state = speaking.begin(batch) if state is None else speaking.open(state)
            if name in known:
                made[name] = known[name]
                state = read(speaking, known[name], state, piece)
                continue
            length = speaking.modality.tokens_per_sample() or lengths.get(name)
            if not length:
                raise ValueError(f"how many {speaking.modality.unit}s of {name} to draw is not said: lengths[{name!r}]")
            tokens, state = _drawn(speaking, length, state, sampling, generator)
            made[name] = torch.cat(tokens, 1)
    return made


def score(model: AutoregressiveModel | Speaking, pieces: Iterable[Tensor], state: State = None) -> tuple[float, int]:
    """Likelihood of a sequence of any length that comes in pieces, in bounded memory.

    Args:
        model: the model; left in the mode it was in.
        pieces: tokens ``(1, l, ...)``, one after another; none may be empty.
        state: of what came before; of a joint model, with the span begun (``model.open(state)``).

    Returns:
        ``(bits, numbers)``: bits in all, and numbers of raw data; their ratio is bits per number.
    """
    nats, numbers = 0.0, 0
    with evaluating(model):
        for tokens in pieces:
            prediction, state = model(tokens, state, Layout())
            loss, count = model.head.loss(prediction, tokens)
            nats += float(loss)
            numbers += int(count)
    return nats / math.log(2), numbers
