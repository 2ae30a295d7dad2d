"""check_modality accepts a sound modality of another kind than the house's, and refuses each planted fault by the property it breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities import Modality
from mmlong.modalities.image import ImageModality
from mmlong.testing import MODALITY_PROPERTY_NAMES, ConformanceError, check_modality


class Twin(Modality):
    """Sound: steps of a dial, uint8 0..15 in rows of any length, two to a code where they are close (``coarse``)."""

    unit = "step"
    codes = 16
    coarse = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.step = nn.Embedding(16, dim)
        self.where = nn.Linear(2, dim, bias=False)

    def check(self, raw: Tensor, lengths: Tensor | None, resets: Tensor | None) -> Layout:
        if raw.dtype != torch.uint8:
            raise TypeError(f"a dial is uint8 (B, T), got {raw.dtype}")
        if raw.ndim != 2:
            raise ValueError(f"a dial is uint8 (B, T), got {tuple(raw.shape)}")
        layout = Layout(lengths=lengths, resets=resets)
        layout.check(*raw.shape)
        if lengths is not None and bool(((lengths < 0) | (lengths > raw.shape[1])).any()):
            raise ValueError(f"lengths must be 0 .. {raw.shape[1]}")
        return layout

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        layout = self.check(raw, lengths, resets)
        return self.blank(self.to_codes(raw), layout), layout

    def to_codes(self, raw: Tensor) -> Tensor:
        return raw.long() // 2 * 2 if self.coarse else raw.long()

    def blank(self, codes: Tensor, layout: Layout) -> Tensor:
        valid = layout.valid(codes.shape[1])
        return codes if valid is None else codes.where(valid, 0)

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        self.check_codes(tokens)
        return tokens.to(torch.uint8)

    def quantisation(self, raw: Tensor) -> float:
        return 1.0 if self.coarse else 0.0

    def values(self, tokens: Tensor) -> Tensor:
        return self.step(tokens)

    def places(self, index: Tensor | None, length: int) -> Tensor:
        index = torch.arange(length)[None] if index is None else index
        angle = index[..., None].to(self.where.weight.dtype) * 0.1
        return self.where(torch.cat([angle.sin(), angle.cos()], -1))

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        raw = torch.randint(16, (batch, length), generator=generator, dtype=torch.uint8)
        return raw, torch.full((batch,), length), torch.zeros(batch, length, dtype=torch.bool)


class Coarse(Twin):
    """Within its declared quantisation."""

    coarse = True


class Placeless(Twin):
    """Takes no resets and has no places."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.where

    def check(self, raw: Tensor, lengths: Tensor | None, resets: Tensor | None) -> Layout:
        if resets is not None:
            raise ValueError("one dial a row: no resets")
        return super().check(raw, lengths, resets)

    def places(self, index: Tensor | None, length: int) -> None:
        return None

    def example(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, None]:
        return (*super().example(batch, length, generator)[:2], None)


class Bag(Placeless):
    """A set of steps: the least first."""

    unordered = True

    def encode(self, raw, lengths=None, resets=None):
        codes, layout = super().encode(raw, lengths, resets)
        valid = layout.valid(codes.shape[1])
        return self.blank((codes if valid is None else codes.where(valid, 99)).sort(1).values, layout), layout


def test_sound_modalities_pass() -> None:
    ordered = tuple(name for name in MODALITY_PROPERTY_NAMES if name != "set")
    assert check_modality(Twin) == ordered
    assert check_modality(Coarse, dims=(4, 8)) == ordered
    assert set(check_modality(Placeless)) == set(ordered) - {"resets"}
    assert set(check_modality(Bag)) == set(MODALITY_PROPERTY_NAMES) - {"resets"}


# Faults: the property that refuses each, and a word of what it must say


class OneTooMany(Twin):
    """A code that there is not, in the padding."""

    breaks = "tokens", "code 16 at row 1"

    def blank(self, codes, layout):
        valid = layout.valid(codes.shape[1])
        return codes if valid is None else codes.where(valid, 16)


class Int32(Twin):
    breaks = "tokens", "must be int64 (B, L), are torch.int32"

    def to_codes(self, raw):
        return raw.int()


class Draws(Twin):
    breaks = "tokens", "encoded again"

    def to_codes(self, raw):
        return (raw.long() + torch.randint(2, raw.shape)) % 16


class WritesIntoRaw(Twin):
    breaks = "tokens", "changed raw in place"

    def to_codes(self, raw):
        return raw.fill_(3).long()


class OffByALevel(Twin):
    breaks = "round trip", "allowed 0"

    def decode(self, tokens, layout=None):
        return super().decode((tokens + 1).clamp_max(15))


class UndeclaredQuantisation(Coarse):
    breaks = "round trip", "worst difference 1"

    def quantisation(self, raw):
        return 0.0


class DriftsFromTripToTrip(Coarse):
    """Within what it declares each time, and further every time."""

    breaks = "round trip", "tokens of what was decoded"

    def to_codes(self, raw):
        return (raw.long() - 1).clamp_min(0)


class DecodesToFloat(Twin):
    breaks = "round trip", "decode gives float32"

    def decode(self, tokens, layout=None):
        return tokens.float()


class KnowsTheBatch(Twin):
    breaks = "rows", "row 1"

    def to_codes(self, raw):
        codes = raw.long()
        return (codes + torch.arange(len(codes))[:, None]) % 16

    def decode(self, tokens, layout=None):
        return super().decode((tokens - torch.arange(len(tokens))[:, None]) % 16)


class ForgetsLengths(Twin):
    breaks = "rows", "its layout counts 7 tokens in the batch, by itself it has 3"

    def encode(self, raw, lengths=None, resets=None):
        tokens, layout = super().encode(raw, lengths, resets)
        return tokens, Layout(resets=layout.resets)


class LeaksPadding(Twin):
    """Garbage stays where it is: the model would embed it."""

    breaks = "padding", "as padding: first wrong at"

    def blank(self, codes, layout):
        return codes


class CarriesAcrossResets(Twin):
    """Differences from the step before, over a reset too."""

    breaks = "resets", "tokens against each alone"

    def to_codes(self, raw):
        return (raw.long().diff(dim=1, prepend=raw[:, :1].long() * 0)) % 16

    def decode(self, tokens, layout=None):
        self.check_codes(tokens)
        return (tokens.cumsum(1) % 16).to(torch.uint8)


class MovesResets(Twin):
    breaks = "resets", "layout.resets are at"

    def encode(self, raw, lengths=None, resets=None):
        tokens, layout = super().encode(raw, lengths, resets)
        return tokens, Layout(lengths=layout.lengths, resets=None if resets is None else resets.roll(1, 1))


class SwallowsDtypes(Twin):
    breaks = "refusals", "accepted raw of "

    def check(self, raw, lengths, resets):
        return super().check(raw.to(torch.uint8), lengths, resets)


class SaysNothing(Twin):
    breaks = "refusals", "must say 'uint8', what was expected"

    def check(self, raw, lengths, resets):
        if raw.dtype != torch.uint8:
            raise TypeError("bad input")
        return super().check(raw, lengths, resets)


class FlattensAnything(Twin):
    breaks = "refusals", "accepted raw of shape"

    def encode(self, raw, lengths=None, resets=None):
        return super().encode(raw.reshape(len(raw), -1) if raw.ndim > 2 else raw, lengths, resets)


class TakesAnyLength(Twin):
    breaks = "refusals", "accepted lengths beyond the raw tensor"

    def check(self, raw, lengths, resets):
        return super().check(raw, None if lengths is None else lengths.clamp(0, raw.shape[-1]), resets)


class DecodesAnyCode(Twin):
    breaks = "refusals", "code -1 to decode"

    def decode(self, tokens, layout=None):
        return tokens.to(torch.uint8)


class SilentlyPacked(Placeless):
    """Its example says that it has no resets, and yet it swallows them."""

    breaks = "refusals", "accepted resets"

    def check(self, raw, lengths, resets):
        return super().check(raw, lengths, None)


class ValuesKnowPlaces(Twin):
    breaks = "values", "values of pieces against the whole"

    def values(self, tokens):
        return self.step(tokens) + 0.01 * torch.arange(tokens.shape[1])[:, None]


class ValuesSeeNeighbours(Twin):
    breaks = "values", "values of p"

    def values(self, tokens):
        x = self.step(tokens)
        return x + 0.1 * x.roll(1, 1)


class FloatValues(Twin):
    breaks = "values", "are torch.float32"

    def values(self, tokens):
        return self.step(tokens).float()


class PlacesStartAnew(Twin):
    """Counts from 0 whatever the index says."""

    breaks = "places", "places(index) against places(None) there"

    def places(self, index, length):
        return super().places(None if index is None else torch.arange(length).expand(index.shape), length)


class PlacesOnlyWhole(Twin):
    breaks = "places", "places(index, 64) is None"

    def places(self, index, length):
        return None if index is not None and length == 64 else super().places(index, length)


class EmbedsTwice(Twin):
    breaks = "embedding", "values and places"

    def embed(self, tokens, layout=None, index=None):
        return super().embed(tokens, layout, index) + self.places(None, tokens.shape[1])


class IgnoresTheIndex(Twin):
    breaks = "embedding", "embed with an index"

    def embed(self, tokens, layout=None, index=None):
        return super().embed(tokens, layout, None)


class Unused(Twin):
    breaks = "gradients", "no gradient reaches parameter spare.weight"

    def __init__(self, dim):
        super().__init__(dim)
        self.spare = nn.Linear(dim, dim)


class CutGradient(Twin):
    breaks = "gradients", "parameter where.weight"

    def places(self, index, length):
        return super().places(index, length).detach()


class HalfPrecision(Twin):
    """Exact only in the dtype it was made in."""

    breaks = "float64", "float64 against float32"

    def values(self, tokens):
        x = super().values(tokens)
        return x if x.dtype == torch.float32 else x.bfloat16().to(x.dtype)


class HiddenWeights(Twin):
    breaks = "state_dict", "a fresh module with the weights loaded"

    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("hidden", torch.randn(dim), persistent=False)

    def values(self, tokens):
        return super().values(tokens) * self.hidden


class ExtraState(Twin):
    breaks = "state_dict", "tensors only"

    def get_extra_state(self):
        return {"pickled": object()}

    def set_extra_state(self, state):
        pass


class SharedWeights(Twin):
    breaks = "state_dict", "after its deep copy was changed"

    def __deepcopy__(self, memo: Any):
        twin = type(self)(self.dim)
        twin.load_state_dict(self.state_dict())
        twin.step = self.step
        return twin.to(self.step.weight.dtype) if self.step.weight.dtype == torch.float32 else twin


class Picture(ImageModality):
    """The house's own as the sound twin of grids."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, [3, 4], 3, "serpentine")


class WrongOrder(Picture):
    breaks = "grid", "position 4 is at cell [1, 0]"

    def encode(self, raw, lengths=None, resets=None):
        tokens, _ = super().encode(raw, lengths, resets)
        return tokens, Layout(grid=self.size, order="raster")


class WrongGrid(Picture):
    breaks = "tokens", "the layout against the tokens"

    def encode(self, raw, lengths=None, resets=None):
        return super().encode(raw, lengths, resets)[0], Layout(grid=(3, 5))


class TurnedGrid(Picture):
    """Read from the other corner: the same cells, but not where the layout says."""

    breaks = (
        "grid",
        "position 0 is at cell [0, 0] of the grid (3, 4) by its layout; another token there changes index [0, 2, 3]",
    )

    def decode(self, tokens, layout=None):
        return super().decode(tokens).flip(2, 3)

    def encode(self, raw, lengths=None, resets=None):
        return super().encode(raw.flip(-2, -1) if raw.ndim == 4 else raw, lengths, resets)


class NotFinite(Picture):
    breaks = "tokens", "nan"

    def encode(self, raw, lengths=None, resets=None):
        tokens, layout = super().encode(raw, lengths, resets)
        return tokens.where(tokens > -0.9, torch.nan), layout


class Truncates(Picture):
    """Off by one level where a float is just below a whole number."""

    breaks = "round trip", "worst difference 1"

    def decode(self, tokens, layout=None):
        return self.roll(((tokens.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8))


class Ordered(Placeless):
    """Says that it is a set and keeps the order that it is given."""

    breaks = "set", "tokens of the set in another order"
    unordered = True


class SortsPadding(Placeless):
    """Sorts what is past a row's length among the rest."""

    breaks = "round trip", "first wrong at index"
    unordered = True

    def encode(self, raw, lengths=None, resets=None):
        codes, layout = super().encode(raw, lengths, resets)
        return codes.sort(1).values, layout


class Miscounts(Twin):
    """Says that a step makes two tokens."""

    breaks = "tokens", "count_tokens() says"
    tokens_per_step = 2


class LosesOne(Bag):
    """A set of which equal ones are one."""

    breaks = "round trip", "first wrong at index"

    def decode(self, tokens, layout=None):
        raw = super().decode(tokens, layout)
        return raw.where(torch.cat([raw[:, :1] == raw[:, :1], raw.diff(dim=1) != 0], 1), 15)


def faults() -> list[Any]:
    found = [c for c in globals().values() if isinstance(c, type) and issubclass(c, Modality) and "breaks" in vars(c)]
    return [pytest.param(c, *c.breaks, id=c.__name__) for c in found]


@pytest.mark.parametrize(("fault", "prop", "says"), faults())
def test_a_planted_fault_is_refused_by_name(fault: type[Modality], prop: str, says: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_modality(fault)
    assert caught.value.property == prop, str(caught.value)
    assert f"{fault.__name__} (dim 16) breaks the contract: {prop}: " in str(caught.value)
    assert says in str(caught.value)


def test_the_sound_picture_passes() -> None:
    assert "grid" in check_modality(Picture)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: check_modality("imgae"), KeyError, "did you mean 'image'"),
        (
            lambda: check_modality("image", options={"size": [2, 2], "odrer": "raster"}),
            TypeError,
            "did you mean 'order'",
        ),
        (lambda: check_modality(Twin, only="reset"), ValueError, r"did you mean 'resets'"),
        (lambda: check_modality(Twin, dims=()), ValueError, "at least one width"),
    ],
)
def test_names_options_and_arguments(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_options_are_named() -> None:
    assert check_modality("image", options={"size": [2, 3]}, only="tokens") == ("tokens",)
    with pytest.raises(
        ConformanceError,
        match=r"example_less\(rate=3\) \(dim 16\) breaks the contract: tokens: example.*does not define",
    ):
        check_modality(example_less, options={"rate": 3})


def example_less(dim: int, rate: int) -> Modality:
    """A modality that shows no example."""
    module = Modality(dim)
    module.rate = rate  # type: ignore[assignment]
    return module
