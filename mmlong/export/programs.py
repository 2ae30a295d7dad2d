"""What is exported of a model: modules whose inputs and outputs are flat tensors, with examples of them in any size.

A model that looks at a whole sequence is one program, from raw data to what it says:

    predict(raw[, lengths][, hidden])               -> prediction

``lengths`` is there where rows may be padded, ``hidden`` for a masked model. A model that makes sequences is several:

    step(token (B, 1, ...), *state)                 -> prediction of the token after it, *state
    read(tokens (B, L, ...), *state)                -> predictions of the token after each, *state
    encode(raw) -> tokens,  decode(tokens) -> raw
    sample(prediction) -> token

The state is every tensor of the model's state, in a fixed order, each with the batch as its first axis. The beginning, of one row, is data beside the programs: what the first token may be, and
the state before it. Nothing in a state is empty there: a cache of keys begins with slots that it says are not used, because a program cannot be general in a size that starts at nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.heads import Sampling
from mmlong.heads.readout import ReadoutHead
from mmlong.layout import Layout
from mmlong.mixers import Mixer, State, rebuild_state, select_rows, state_tensors
from mmlong.modalities import Modality
from mmlong.models import AutoregressiveModel, MaskedModel, Model

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Bounds:
    """Sizes that an axis may have; one size where both are the same.

    Attributes:
        least: the smallest.
        most: the largest.

    Raises:
        ValueError: no size at all.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if self.least < 1 or self.most < self.least:
            raise ValueError(f"bounds are two numbers of at least 1, the larger last; got {self.least} and {self.most}")

    @property
    def fixed(self) -> bool:
        """Whether there is one size only."""
        return self.least == self.most

    def clamp(self, size: int) -> int:
        """The size within the bounds that is nearest."""
        return min(max(size, self.least), self.most)


@dataclass(frozen=True)
class Size:
    """How large an example is.

    Attributes:
        batch: rows.
        length: of the raw data's last axis, or tokens; nothing where it is fixed.
        past: tokens that a state has seen.
    """

    batch: int
    length: int
    past: int = 0


@dataclass
class Program:
    """One program.

    Attributes:
        name: of its file.
        module: what is traced.
        inputs, outputs: names of the tensors, in order.
        example: inputs of a size.
        length: sizes that the length may have; ``None`` where nothing has a length that can vary.
        reference: what the outputs must be, by the model's own verbs.
        portable: can be written in every format; otherwise as ``torch.export`` alone.
        past: takes a state, which may have seen tokens.
        whole: tokens of a sample, where all have as many.
        slots: that a cache has in a state which has seen nothing: two that are not used, and that of the start.
    """

    name: str
    module: nn.Module
    inputs: list[str]
    outputs: list[str]
    example: Callable[[Size], Tensors]
    length: Bounds | None
    reference: Callable[..., Any]
    portable: bool = True
    past: bool = False
    whole: int | None = None
    slots: int = 3


class Predict(nn.Module):
    """Raw data to a prediction, or to the embedding that the head's last layer sees."""

    def __init__(self, model: Model, embedding: bool) -> None:
        super().__init__()
        self.model = model
        self.embedding = embedding

    def forward(self, raw: Tensor, lengths: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        tokens, layout = self.model.encode(raw, lengths)
        more = {} if hidden is None else {"hidden": hidden}
        x, _ = self.model.forward_features(tokens, None, layout, **more)
        layout_out = self.model.backbone.layout_out(layout, tokens.shape[1])
        return self.model.forward_head(x, layout_out, pre_logits=self.embedding)


def pads(model: Model) -> bool:
    """Whether rows of different lengths can stand in one batch."""
    if model.modality.tokens_per_sample() is not None or isinstance(model.head, ReadoutHead):
        return False
    return all(module.traits.padding for module in model.modules() if isinstance(module, Mixer))


def predict_program(model: Model, length: Bounds, embedding: bool, seed: int = 0) -> Program:
    """The program of a model that looks at whole sequences.

    Args:
        model: in evaluation mode.
        length: sizes of the raw data's last axis; not used where that is fixed.
        embedding: what the head pools in place of what it says.
        seed: of the examples.
    """
    modality, padded, masked = model.modality, pads(model), isinstance(model, MaskedModel)
    varies: Bounds | None = length
    if modality.tokens_per_sample() is not None:
        varies = None
    elif isinstance(model.head, ReadoutHead) and model.backbone.tokens_out is None:
        fixed = model.head.tokens * model.backbone.stride
        varies = Bounds(fixed, fixed)
    elif model.backbone.stride > 1:
        # One token that is left after pooling would be traced as a special case.
        least = max(length.least, model.backbone.stride + 1)
        varies = Bounds(least, max(length.most, least))

    def example(size: Size) -> Tensors:
        draw = torch.Generator().manual_seed(seed)
        raw, lengths, _ = modality.example(size.batch, size.length, draw)
        found = [raw]
        if padded:
            # The first row is full; one of several is as short as can be.
            assert lengths is not None
            found.append(torch.cat([torch.tensor([raw.shape[-1]]), lengths[1:]]))
        if masked:
            tokens = modality.encode(raw)[0].shape[1]
            found.append(torch.rand(size.batch, tokens, generator=draw) < 0.3)
        return tuple(found)

    inputs = ["raw", *(["lengths"] if padded else []), *(["hidden"] if masked else [])]
    module: nn.Module = Predict(model, embedding)
    if masked and not padded:
        module = _Hidden(module)
    return Program("predict", module, inputs, ["embedding" if embedding else "prediction"], example, varies, module)


class _Hidden(nn.Module):
    """A masked model of samples that are whole: the second input is what is hidden."""

    def __init__(self, predict: nn.Module) -> None:
        super().__init__()
        self.predict = predict

    def forward(self, raw: Tensor, hidden: Tensor) -> Tensor:
        return self.predict(raw, None, hidden)


# Generators


class Encode(nn.Module):
    """Raw data to tokens."""

    def __init__(self, modality: Modality) -> None:
        super().__init__()
        self.modality = modality

    def forward(self, raw: Tensor) -> Tensor:
        return self.modality.encode(raw)[0]


class Decode(nn.Module):
    """Tokens to raw data."""

    def __init__(self, modality: Modality) -> None:
        super().__init__()
        self.modality = modality

    def forward(self, tokens: Tensor) -> Tensor:
        return self.modality.decode(tokens)


class Sample(nn.Module):
    """A token drawn from a prediction, by torch's own generator."""

    def __init__(self, head: nn.Module, sampling: Sampling) -> None:
        super().__init__()
        self.head: Any = head
        self.sampling = sampling

    def forward(self, prediction: Tensor) -> Tensor:
        return self.head.sample(prediction, self.sampling)


class Continue(nn.Module):
    """Tokens ``(B, L, ...)`` taken after a state: what follows each of them, and the state then.

    It is ``put`` and ``peek`` of :class:`~mmlong.models.AutoregressiveModel` for L tokens at once. The value of the last token is not in the state: the backbone has it already.
    """

    def __init__(self, model: AutoregressiveModel, form: State) -> None:
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, tokens: Tensor, *flat: Tensor) -> Tensors:
        model, state, length = self.model, rebuild_state(self.form, flat), tokens.shape[1]
        index = state["passed"][:, None] + 1 + torch.arange(length, device=tokens.device)
        x, inner = model.backbone(
            model.modality.embed(tokens, None, index), state["backbone"], model.told(tokens, None)
        )
        prediction = model.forward_head(x)
        after = {"backbone": inner, "passed": state["passed"] + length}
        if model.linear is not None:
            line = torch.cat([state["tokens"], tokens.to(state["tokens"].dtype)], 1)
            prediction = model.moved(prediction, line[:, 1:], length, index)
            after["tokens"] = line[:, length:]
        return prediction, *state_tensors(after)


def state_names(state: State, prefix: str = "state") -> list[str]:
    """A name for every tensor of a state, by where it is in the tree, in the order of ``state_tensors``."""
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [prefix]
    named = state.items() if isinstance(state, dict) else enumerate(state)
    return [name for key, value in named for name in state_names(value, f"{prefix}.{key}")]


@torch.no_grad()
def empty_backbone_state(model: Model, last: Tensor) -> State:
    """The backbone's state before the first token of one row, without anything left out.

    Args:
        model: in evaluation mode.
        last: ``(1, 1, D)``, any vector.

    Raises:
        ValueError: a mixer's state before the first token cannot be had as tensors.
    """
    for module in model.modules():
        if isinstance(module, Mixer) and not module.traits.padding:
            raise ValueError(
                f"{type(module).__name__} does not honour lengths, and its state before the first token is that of a row of length 0: it cannot be exported as a generator"
            )
    # The state of a row that has nothing in a piece in which another row has two tokens: all its tensors are there and none is empty.
    layout = Layout(lengths=torch.tensor([0, 2], device=last.device))
    codes = torch.zeros(2, 2, dtype=torch.long, device=last.device)
    _, inner = model.backbone(last.expand(2, 2, -1), None, model.told(codes, layout))
    return select_rows(inner, slice(0, 1))


@torch.no_grad()
def beginning(model: AutoregressiveModel) -> tuple[Tensor, State]:
    """What the first token of one row may be, and the state before it without anything left out.

    Raises:
        ValueError: see :func:`empty_backbone_state`.
    """
    begun = model.begin(1)
    prediction, state = model.peek({**begun, "backbone": empty_backbone_state(model, begun["last"])})
    for taken in ("last", "code"):
        state.pop(taken, None)  # the backbone has them already
    return prediction, state


def generator_programs(
    model: AutoregressiveModel, length: Bounds, sampling: Sampling, seed: int = 0
) -> tuple[list[Program], dict[str, Tensor]]:
    """The programs of a model that makes sequences, and its beginning by name.

    Args:
        model: in evaluation mode.
        length: sizes of raw data's last axis, and of what is read at once.
        sampling: how :class:`Sample` draws.
        seed: of the examples.
    """
    modality, head = model.modality, model.head
    first, state = beginning(model)
    form, names = state, state_names(state)
    whole = modality.tokens_per_sample()
    device = first.device

    def tokens(size: Size) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return modality.encode(modality.example(size.batch, size.length, draw)[0].to(device))[0][:, : size.length]

    def past(size: Size) -> Tensors:
        flat = tuple(t.repeat(size.batch, *[1] * (t.ndim - 1)) for t in state_tensors(state))
        if not size.past:
            return flat
        return tuple(state_tensors(own(tokens(Size(size.batch, size.past)), *flat)[1]))

    def own(given: Tensor, *flat: Tensor) -> tuple[Tensor, State]:
        """By the model's own verbs."""
        before, parts = model.put(rebuild_state(form, flat), given[:, :1]), []
        if given.shape[1] > 1:
            part, before = model(given[:, 1:], before)
            parts.append(part)
        part, after = model.peek(before)
        after = {key: after[key] for key in form}
        return torch.cat([*parts, part], 1), after

    def flattened(given: Tensor, *flat: Tensor) -> Tensors:
        prediction, after = own(given, *flat)
        if state_names(after) != names:
            raise ValueError(f"the state is of another form after a token: {state_names(after)}, before it {names}")
        return prediction, *state_tensors(after)

    def raw(size: Size) -> Tensors:
        return (modality.example(size.batch, size.length, torch.Generator().manual_seed(seed))[0].to(device),)

    def coded(size: Size) -> Tensors:
        return (modality.encode(*raw(size))[0],)

    def predicted(size: Size) -> Tensors:
        draw = torch.Generator().manual_seed(seed)
        shape = (size.batch, *first.shape[1:])
        return (first + torch.randn(shape, generator=draw).to(first),)

    if whole is not None and whole < 8:
        raise ValueError(f"a sample of {whole} tokens is too short to be made token by token")
    # After the last token of a picture there is nothing to predict.
    piece = length if whole is None else Bounds(2, max(2, min(length.most, whole - 1)))
    raws = None if whole is not None else length
    module = Continue(model, form)
    encode, decode, sample = Encode(modality), Decode(modality), Sample(head, sampling)
    ports: dict[str, Any] = {"inputs": ["tokens", *names], "outputs": ["prediction", *names]}
    programs = [
        Program("step", module, **ports, example=lambda s: (tokens(Size(s.batch, 1)), *past(s)), length=None, reference=flattened, past=True, whole=whole),
        Program("read", module, **ports, example=lambda s: (tokens(s), *past(s)), length=piece, reference=flattened, past=True, whole=whole),
        Program("encode", encode, ["raw"], ["tokens"], raw, raws, encode),
        Program("decode", decode, ["tokens"], ["raw"], coded, raws, decode),
        Program("sample", sample, ["prediction"], ["token"], predicted, None, sample, portable=False),
    ]  # fmt: skip
    return programs, dict(zip(["prediction", *names], [first, *state_tensors(state)], strict=True))


def axes(shapes: Sequence[tuple[int, ...]], sizes: Sequence[Size], slots: int = 3) -> list[int | str]:
    """What each axis of a tensor is, from its shapes in examples of two sizes: a number where it is always the same, else a word for what it goes with.

    Args:
        shapes: of the tensor, in each example.
        sizes: of the examples, that differ in everything that can.
        slots: see :class:`Program`.
    """
    known: dict[str, tuple[int, ...]] = {
        "batch": tuple(s.batch for s in sizes),
        "length": tuple(s.length for s in sizes),
        "past": tuple(s.past + slots for s in sizes),
        "past + 1": tuple(s.past + slots + 1 for s in sizes),
        "past + length": tuple(s.past + slots + s.length for s in sizes),
    }
    for k in range(2, 65):
        known.setdefault(f"{k} * length", tuple(k * s.length for s in sizes))
        known.setdefault(f"ceil(length / {k})", tuple(-(-s.length // k) for s in sizes))
    found: list[int | str] = []
    for each in zip(*shapes, strict=True):
        same = len(set(each)) == 1
        found.append(each[0] if same else next((word for word, seen in known.items() if seen == each), "varies"))
    return found
