"""The contract of a modality: how raw tensors of one kind become a sequence and come back.

    tokens, layout = modality.encode(raw, lengths, resets)   raw tensors to tokens, and what the positions are
    raw = modality.decode(tokens, layout)                    the inverse of encode, exact or within the declared quantisation
    x = modality.embed(tokens, layout)                       values(tokens) + places(index): vectors (B, L, D) for the backbone

Tokens are integer codes ``(B, L)`` (``codes`` says how many there are) or real vectors ``(B, L, C)``. ``values`` knows what a token is and not where, ``places``
knows where and not what: an autoregressive model adds the value of the token before to the place of the token it predicts.

A modality knows tensors and nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.registry import Registry


def looks() -> bool:
    """Whether the values of tensors can be looked at, to refuse bad ones: not while a program is exported, which must do the same for all."""
    return not torch.compiler.is_exporting()


def row_layout(
    batch: int, length: int, lengths: Tensor | None, resets: Tensor | None = None
) -> tuple[Layout, Tensor | None]:
    """The layout of right-padded rows, checked, and bool ``(B, L)`` where they are valid (``None``: everywhere).

    Raises:
        ValueError: lengths or resets of another type, batch or length, or lengths outside ``0 .. length``.
    """
    layout = Layout(lengths=lengths, resets=resets)
    layout.check(batch, length)
    if lengths is not None and looks() and bool(((lengths < 0) | (lengths > length)).any()):
        raise ValueError(f"lengths must be 0 .. {length}, got {lengths.tolist()}")
    return layout, layout.valid(length)


class Modality(nn.Module):
    """Base of every modality.

    Args:
        dim: width D that :meth:`embed` makes.

    Attributes:
        kind: what its raw tensors are, and so which files they make (:mod:`mmlong.samples`): ``image``, ``audio``, ``genome``, ``text``, ``video``, or any other.
        unit: what one token is, for people: ``pixel``, ``sample``, ``nucleotide``, ``byte``.
        codes: how many integer codes there are where tokens are ``(B, L)``; ``None`` where they are real vectors ``(B, L, C)``.
        channels: C, numbers of raw data that one token holds: what bits per dimension divides by.
        tokens_per_step: how many tokens one place of the raw tensor's last axis makes, where samples have no length of their own: 2 of two interleaved channels.
        unordered: whether the raw tensor's last axis has no order (a set): whichever order it comes in, :meth:`encode` makes the same tokens.
        levels: values that each number can take (256 for bytes), which a density needs to be a probability; ``None`` where it is not quantised.
        rate: tokens are samples of a signal in time, so many a second of each channel; ``None`` where they are no such thing, or nobody says how far apart they are.
    """

    kind: str = ""
    unit: str = "token"
    codes: int | None = None
    channels: int = 1
    levels: int | None = None
    rate: int | None = None
    tokens_per_step: int = 1
    unordered: bool = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """Raw tensors to tokens and their layout.

        Args:
            raw: a batch of raw tensors, right-padded where they are uneven.
            lengths: int64 ``(B,)``, how much of each row is valid, counted along the raw tensor's last axis; ``None``: all of it.
            resets: bool ``(B, T)``, where a new document begins, counted likewise.

        Raises:
            TypeError: another dtype than the modality's.
            ValueError: another shape, or lengths and resets where the modality has none.
        """
        raise TypeError(f"{type(self).__name__} does not define encode(raw, lengths, resets)")

    def decode(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Tokens back to raw tensors."""
        raise TypeError(f"{type(self).__name__} does not define decode(tokens, layout)")

    def values(self, tokens: Tensor) -> Tensor:
        """What the tokens are, wherever they stand: ``(B, L, D)``."""
        raise TypeError(f"{type(self).__name__} does not define values(tokens)")

    def places(self, index: Tensor | None, length: int) -> Tensor | None:
        """Where tokens stand: ``(B or 1, L, D)``, or ``None`` for a modality whose model learns order from the mixers alone.

        Args:
            index: int64 ``(B or 1, L)``, how many tokens of the sample come before each; ``None``: ``0 .. length - 1``.
            length: L.
        """
        return None

    def embed(self, tokens: Tensor, layout: Layout | None = None, index: Tensor | None = None) -> Tensor:
        """Tokens to ``(B, L, D)``: values and places."""
        x = self.values(tokens)
        places = self.places(index, tokens.shape[1])
        return x if places is None else x + places

    @property
    def code_embedding(self) -> nn.Embedding | None:
        """The embedding whose rows are the codes' vectors, which a head may share (``head.tied``); ``None`` where there is no such."""
        return None

    def tokens_per_sample(self) -> int | None:
        """L, where every sample has the same; else ``None``."""
        return None

    def count_tokens(self, raw: Tensor, lengths: Tensor | None = None) -> int:
        """How many tokens a batch of raw tensors has, padding left out; ``lengths`` as :meth:`encode` takes them."""
        rows, fixed = raw.shape[0], self.tokens_per_sample()
        if fixed is not None:
            return rows * fixed
        return self.tokens_per_step * (rows * raw.shape[-1] if lengths is None else int(lengths.sum()))

    def check_codes(self, tokens: Tensor) -> None:
        """Raise ``ValueError`` unless integer tokens are ``0 .. codes - 1``: for :meth:`decode`, where a wrong code would make wrong data in silence."""
        if self.codes is not None and looks() and tokens.numel():
            least, most = int(tokens.min()), int(tokens.max())
            if least < 0 or most >= self.codes:
                raise ValueError(f"codes must be 0 .. {self.codes - 1}, got {least} .. {most}")

    def resample(self, rate: int) -> None:
        """Take raw tensors of another rate from now on, in samples a second.

        Raises:
            ValueError: tokens are no samples of a signal in time.
        """
        raise ValueError(
            f"{type(self).__name__} makes {self.unit}s, which are no samples of a signal in time: there is no other rate to hear them at"
        )

    def quantisation(self, raw: Tensor) -> Tensor | float:
        """How far ``decode(encode(raw))`` may be from ``raw``, number by number; 0 where it is the same, as here."""
        return 0.0

    @property
    def initialised(self) -> bool:
        """Whether it has what :meth:`initialise` takes; most modalities take nothing."""
        return True

    def initialise(self, raw: Tensor, seed: int = 0) -> None:
        """Take from raw training data what no gradient gives (a palette). A task calls it before training, where it is not ``initialised``."""

    # What the conformance suite asks for; see mmlong.testing.check_modality

    @classmethod
    def example_options(cls) -> list[dict[str, Any]]:
        """Options of small instances worth checking, of every form that the modality has."""
        return [{}]

    def example(
        self, batch: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Raw data as a batch of it may be: ``(raw, lengths, resets)``, what :meth:`encode` takes.

        Args:
            batch: B.
            length: the raw tensor's last axis, where the modality does not fix it.
            generator: draws it.

        Returns:
            ``lengths`` and ``resets`` are ``None`` where the modality takes none; rows are valid to any length and reset anywhere.
        """
        raise TypeError(f"{type(self).__name__} does not define example(batch, length, generator)")


MODALITIES: Registry[type[Modality]] = Registry("modality", group="mmlong.modalities")


def register_modality(name: str) -> Callable[[type[Modality]], type[Modality]]:
    """Class decorator that names a modality."""
    return MODALITIES.register(name)


def create_modality(name: str, dim: int, **options: Any) -> Modality:
    """A registered modality by name; an unknown name or option is answered with the nearest."""
    return MODALITIES.create(name, dim, **options)
