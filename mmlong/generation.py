"""Generation and likelihood through the contract: a prompt is a long piece (or several), a new token a piece of length 1.

There is nothing here that knows a mixer: what streams, generates. Memory is the state's, so it stays flat where the state is constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmlong.heads import Sampling
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.models import AutoregressiveModel

PIECE = 4096
"""Tokens of a prompt or file that are run at a time."""


@contextmanager
def evaluating(model: torch.nn.Module, without: Callable[[], Any] = torch.inference_mode) -> Any:
    """Evaluation mode, without gradients; afterwards the mode it was in. ``torch.no_grad`` for what a graph may be built on later."""
    training = model.training
    model.eval()
    try:
        with without():
            yield
    finally:
        model.train(training)


def read(model: AutoregressiveModel, prompt: Tensor, state: State = None, piece: int = PIECE) -> State:
    """The state after a prompt, read in pieces of bounded memory.

    Args:
        model: in evaluation mode.
        prompt: tokens ``(B, L, ...)``.
        state: of what came before it.
        piece: tokens run at a time.
    """
    for start in range(0, prompt.shape[1], piece):
        _, state = model.forward_features(prompt[:, start : start + piece], state)
    return model.begin(prompt.shape[0]) if state is None else state


def generate(
    model: AutoregressiveModel,
    length: int,
    prompt: Tensor | None = None,
    batch: int = 1,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    piece: int = PIECE,
    on_token: Callable[[Tensor], None] | None = None,
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

    Returns:
        ``(B, L + length, ...)``, the prompt first.

    Raises:
        ValueError: nothing to generate, an empty prompt, or more tokens than the modality has places for.
    """
    _check(model, length, prompt)
    with evaluating(model):
        tokens: list[Tensor] = [] if prompt is None else [prompt]
        for token in _draws(model, length, prompt, batch, sampling or Sampling(), generator, piece):
            tokens.append(token)
            if on_token is not None:
                on_token(token)
        return torch.cat(tokens, 1)


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
    rows = 1 if prompt is None else prompt.shape[0]
    tokens = _draws(model, length, prompt, rows, sampling or Sampling(), generator, piece)

    def one_by_one() -> Iterator[Tensor]:
        for _ in range(length):
            # Only while a token is drawn: between tokens the caller's own code runs, in the caller's own modes.
            with evaluating(model):
                token = next(tokens)
            yield token

    return one_by_one()


def _check(model: AutoregressiveModel, length: int, prompt: Tensor | None) -> None:
    if length < 0 or (prompt is not None and prompt.shape[1] < 1):
        raise ValueError(f"length is {length} and the prompt {None if prompt is None else tuple(prompt.shape)}")
    total, whole = length + (0 if prompt is None else prompt.shape[1]), model.modality.tokens_per_sample()
    if whole is not None and total > whole:
        raise ValueError(f"a sample of this modality has {whole} tokens; {total} were asked for, the prompt included")


def _draws(
    model: AutoregressiveModel, length: int, prompt: Tensor | None, batch: int, sampling: Sampling,
    generator: torch.Generator | None, piece: int,
) -> Iterator[Tensor]:  # fmt: skip
    state = model.begin(batch) if prompt is None else read(model, prompt, piece=piece)
    for _ in range(length):
        prediction, state = model.peek(state)
        token = model.head.sample(prediction, sampling, generator)
        state = model.put(state, token)
        yield token


def score(model: AutoregressiveModel, pieces: Iterable[Tensor], state: State = None) -> tuple[float, int]:
    """Likelihood of a sequence of any length that comes in pieces, in bounded memory.

    Args:
        model: the model; left in the mode it was in.
        pieces: tokens ``(1, l, ...)``, one after another; none may be empty.
        state: of what came before.

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
