"""What is exported of a joint model: for each modality the programs that go on in it, all on one state.

    NAME.read(tokens (B, L, ...), *state)    -> predictions of these tokens, *state after them
    NAME.peek(*state)                        -> prediction of the next token, *state for put
    NAME.put(token (B, 1, ...), *state)      -> *state with it
    NAME.encode(raw) -> tokens,  NAME.decode(tokens) -> raw,  NAME.sample(prediction) -> token

What comes next is said by which program is called, so a state holds the last token and the backbone has not read it yet: only then is it known whether the span goes on or another begins. A span is begun by setting
``state.passed`` to 0. The beginning of one row is data beside the programs, as of a generator of one modality (:mod:`mmlong.export.programs`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.export.programs import (
    Bounds,
    Decode,
    Encode,
    Program,
    Sample,
    Size,
    Tensors,
    empty_backbone_state,
    state_names,
)
from mmlong.heads import Sampling
from mmlong.mixers import State, rebuild_state, state_tensors
from mmlong.models import JointModel, Spans
from mmlong.models.spans_model import blank

SLOTS = 2
"""Slots that a cache has at the beginning, none of them used."""


class _Going(nn.Module):
    """A joint model that goes on in one modality.

    Args:
        model: the joint model.
        name: of the modality.
        form: of the state.
    """

    def __init__(self, model: JointModel, name: str, form: State) -> None:
        super().__init__()
        self.model, self.name, self.form = model, name, form

    @property
    def speaking(self) -> Any:
        return self.model.speaking(self.name)


class Read(_Going):
    """Tokens taken behind a state: what was to be expected of each, and the state then."""

    def forward(self, tokens: Tensor, *flat: Tensor) -> Tensors:
        prediction, after = self.speaking(tokens, rebuild_state(self.form, flat))
        return prediction, *state_tensors(after)


class Peek(_Going):
    """What the next token may be."""

    def forward(self, *flat: Tensor) -> Tensors:
        prediction, state = self.speaking.peek(rebuild_state(self.form, flat))
        return prediction, *state_tensors(state)


class Put(_Going):
    """The state with a token."""

    def forward(self, token: Tensor, *flat: Tensor) -> Tensors:
        return tuple(state_tensors(self.speaking.put(rebuild_state(self.form, flat), token)))


def joint_programs(
    model: JointModel, length: Bounds, sampling: Sampling, seed: int = 0
) -> tuple[list[Program], dict[str, Tensor]]:
    """The programs of a joint model, and its beginning by name.

    Args:
        model: in evaluation mode.
        length: sizes of raw data's last axis, and of what is read at once.
        sampling: how ``sample`` draws.
        seed: of the examples.

    Raises:
        ValueError: a mixer's state before the first token cannot be had as tensors.
    """
    begun = model.speaking(model.names[0]).begin(1)
    state: State = {**begun, "backbone": empty_backbone_state(model, begun["last"])}
    programs = [one for name in model.names for one in _programs(model, name, state, length, sampling, seed)]
    return programs, dict(zip(state_names(state), state_tensors(state), strict=True))


def _programs(
    model: JointModel, name: str, form: State, length: Bounds, sampling: Sampling, seed: int
) -> list[Program]:
    speaking, names = model.speaking(name), state_names(form)
    modality = speaking.modality
    whole = modality.tokens_per_sample()
    device = form["last"].device

    def raw(size: Size) -> Tensors:
        return (modality.example(size.batch, size.length, torch.Generator().manual_seed(seed))[0].to(device),)

    def coded(size: Size) -> Tensors:
        return (modality.encode(*raw(size))[0],)

    def tokens(size: Size) -> Tensor:
        return coded(size)[0][:, : size.length]

    @torch.no_grad()
    def past(size: Size) -> Tensors:
        flat = tuple(t.repeat(size.batch, *[1] * (t.ndim - 1)) for t in state_tensors(form))
        return read(tokens(Size(size.batch, size.past)), *flat)[1:] if size.past else flat

    def read(given: Tensor, *flat: Tensor) -> Tensors:
        """By the joint model itself, which finds spans in rows."""
        before = rebuild_state(form, flat)
        rows, count = given.shape[:2]
        kind = torch.full((rows, count), model.names.index(name), dtype=torch.int64, device=device)
        index = before["passed"][:, None] + torch.arange(count, device=device)
        laid = {
            other: given if other == name else blank(voice.modality, given) for other, voice in model.voices.items()
        }
        found, after = model(Spans(kind, index, laid), before)
        prediction = found[name][0].unflatten(0, given.shape[:2])
        if state_names(after := {key: after[key] for key in form}) != names:
            raise ValueError(f"the state is of another form after a token: {state_names(after)}, before it {names}")
        return prediction, *state_tensors(after)

    def predicted(size: Size) -> Tensors:
        with torch.no_grad():
            first = speaking.peek(rebuild_state(form, past(Size(size.batch, 1))))[0]
        return (first + torch.randn(first.shape, generator=torch.Generator().manual_seed(seed)).to(first),)

    if whole is not None and whole < 8:
        raise ValueError(f"a sample of {whole} tokens of {name} is too short to be made token by token")
    # With a linear prediction torch.export holds a traced program to lengths other than 2; shorter pieces go token by token.
    least = 2 if all(voice.linear is None for voice in model.voices.values()) else 3
    most = length.most if whole is None else min(length.most, whole)
    piece = Bounds(least if whole is not None else max(least, length.least), max(least, most))
    raws = None if whole is not None else length
    make = partial(Program, whole=whole, slots=SLOTS)
    going = (model, name, form)
    encode, decode, sample = Encode(modality), Decode(modality), Sample(speaking.head, sampling)
    peek, put = Peek(*going), Put(*going)
    return [
        make(f"{name}.read", Read(*going), ["tokens", *names], ["prediction", *names], lambda s: (tokens(s), *past(s)), piece, read, past=True),
        make(f"{name}.peek", peek, names, ["prediction", *names], past, None, peek, past=True),
        make(f"{name}.put", put, ["token", *names], names, lambda s: (tokens(Size(s.batch, 1)), *past(s)), None, put, past=True),
        make(f"{name}.encode", encode, ["raw"], ["tokens"], raw, raws, encode),
        make(f"{name}.decode", decode, ["tokens"], ["raw"], coded, raws, decode),
        make(f"{name}.sample", sample, ["prediction"], ["token"], predicted, None, sample, portable=False),
    ]  # fmt: skip
