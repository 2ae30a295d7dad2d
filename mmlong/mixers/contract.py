"""The contract of a token mixer: ``y, state = mixer(x, state=None, layout=None)``.

For a causal mixer, running a sequence whole, in any pieces with the state carried, or one token at a time gives the same result. Nothing
else is asked, and streaming, prefill in pieces, exact training in bounded memory and sequence parallelism follow from it.

A mixer class declares what its mechanism can do in a :class:`Traits` record, by ``@register_mixer``. An instance is built causal or not
(``causal=``) and from then on *is* one of the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.state import State
from mmlong.registry import Registry, nearest

StateKind = Literal["none", "constant", "growing"]
Cost = Literal["n", "n log n", "n sqrt n", "n^2"]


@dataclass(frozen=True)
class Traits:
    """What a mechanism can do.

    Attributes:
        paper: authors, year and identifier of the paper it follows.
        causal: can be built causal.
        bidirectional: can be built to see both sides.
        streaming: built causal, it carries a state, so it can run in pieces.
        state: how the state grows with the tokens seen.
        cost: growth of the work with the length.
        grid: reads ``layout.grid`` or ``layout.positions``.
        padding: honours ``layout.lengths``.
        resets: honours ``layout.resets``.
        continuous: samples a system of continuous time, whose step can be changed (:meth:`Mixer.resample`).
        note: fidelity: where it departs from the paper, or what it was proved against.
        survey: rows of :mod:`mmlong.mixers.survey` that it implements, each with what it takes beside the mixer's name, e.g. an option; empty for nothing.
    """

    paper: str
    causal: bool = True
    bidirectional: bool = False
    streaming: bool = True
    state: StateKind = "constant"
    cost: Cost = "n"
    grid: bool = False
    padding: bool = True
    resets: bool = True
    continuous: bool = False
    note: str = ""
    survey: tuple[tuple[str, str], ...] = ()


class Mixer(nn.Module):
    """Base of every token mixer: checks what comes in, then calls :meth:`mix`.

    Args:
        dim: width D of the tokens in and out.
        causal: see only the past (and carry a state, if the traits say streaming), or both sides.

    Attributes:
        optim_hints: parameter name -> optimiser options for it, e.g. ``{"A_log": {"weight_decay": 0.0, "lr_scale": 0.1}}``;
            read by :mod:`mmlong.training.optim`. Names are relative to the module that declares them.
    """

    traits: ClassVar[Traits] = Traits(paper="unregistered")
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(self, dim: int, *, causal: bool = True) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__} needs dim >= 1, got {dim}")
        if causal and not self.traits.causal:
            raise ValueError(f"{type(self).__name__} has no causal form: build it with causal=False")
        if not causal and not self.traits.bidirectional:
            raise ValueError(
                f"{type(self).__name__} is causal only: for both sides use it with direction 'both' or 'alternate'"
            )
        self.dim = dim
        self.causal = causal

    @property
    def streaming(self) -> bool:
        """Whether this instance carries a state and so can run in pieces."""
        return self.causal and self.traits.streaming

    @property
    def stops_gradient(self) -> bool:
        """Whether its mechanism keeps the gradient from something that its output depends on, so that finite differences are not its gradient."""
        return False

    @property
    def has_own_loss(self) -> bool:
        """Whether it has a loss of its own for training steps that ask (:mod:`mmlong.mixers.own_loss`)."""
        return False

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        """The mechanism itself; ``x`` and ``layout`` have been checked. Subclasses define this."""
        raise TypeError(f"{type(self).__name__} does not define mix(x, state, layout)")

    def absorb(self, x: Tensor, state: State = None, layout: Layout | None = None) -> State:
        """The state alone of :meth:`forward`, to the bit. Mixers whose outputs cost more than what they leave behind say how."""
        return self(x, state, layout)[1]

    def resample(self, factor: float) -> None:
        """Change the time from one token to the next, in place, so that a signal sampled at another rate is heard as one at the rate of training was.

        Args:
            factor: the old rate over the new. Trained at 16 kHz, a mixer hears 8 kHz after ``resample(2)``: a token stands for twice the time. A state from before is none of after.

        Raises:
            ValueError: the mechanism counts in tokens and has no time of its own, or a factor that is not above 0 and finite.
        """
        if not self.traits.continuous:
            raise ValueError(
                f"{type(self).__name__} counts in tokens: it samples no system of continuous time, so there is no step to change. Mixers that do: {', '.join(list_mixers(continuous=True))}"
            )
        check_factor(factor)
        with torch.no_grad():
            self.change_step(factor)

    def change_step(self, factor: float) -> None:
        """Multiply the time between tokens; ``factor`` has been checked. Mixers whose traits say ``continuous`` define this."""
        raise TypeError(f"{type(self).__name__} does not define change_step(factor)")

    def state_bytes(self, length: int) -> int:
        """Bytes of one row's float32 state after ``length`` tokens; 0 for a mixer without a state."""
        raise TypeError(f"{type(self).__name__} does not define state_bytes(length)")

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Mix tokens.

        Args:
            x: real ``(B, L, D)``, L >= 1.
            state: what an earlier call returned for these rows, or ``None`` from the beginning.
            layout: what the positions are, or ``None`` for full rows of one document.

        Returns:
            ``(y, state)``: ``y`` like ``x`` (anything at padding), the state at each row's own length, ``None`` if it has none.

        Raises:
            ValueError: wrong shape, a state for a mixer without one, or a layout it does not honour.
            TypeError: tokens that are not floating point.
        """
        name = type(self).__name__
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] < 1:
            raise ValueError(f"{name} takes (B, L, {self.dim}) with L >= 1, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} takes floating-point tokens, got {x.dtype}: embed them first")
        if state is not None and not self.streaming:
            raise ValueError(f"{name} was given a state but has none: " + why_not_streaming(self))
        if layout is not None:
            layout.check(x.shape[0], x.shape[1])
            if layout.lengths is not None and not self.traits.padding:
                raise ValueError(f"{name} does not honour layout.lengths: give it full rows")
            if layout.resets is not None and not self.traits.resets:
                raise ValueError(f"{name} does not honour layout.resets: give it one document a row")
        return self.mix(x, state, layout)


def check_factor(factor: float) -> None:
    """Raise ``ValueError`` unless ``factor`` can be the quotient of two rates."""
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"resample takes the old rate over the new, a number above 0, got {factor}")


def why_not_streaming(module: nn.Module) -> str:
    """Why a module cannot run in pieces, and what to do, as a clause for an error."""
    if not getattr(module, "causal", False):
        return "it sees both sides. Build it causal (direction: causal) to stream, generate or train in segments"
    return "its mechanism needs the whole length. Choose a mixer that `mmlong mixers` lists as streaming"


def require_streaming(module: nn.Module, power: str) -> None:
    """Raise ``ValueError`` naming ``power`` (e.g. "generation") when a mixer, block, backbone or model cannot run in pieces."""
    if not getattr(module, "streaming", False):
        raise ValueError(f"{power} needs a streaming model, but {type(module).__name__}: {why_not_streaming(module)}")


MIXERS: Registry[type[Mixer]] = Registry("mixer", group="mmlong.mixers")


def register_mixer(name: str, **traits: Any) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: give a mixer its name and :class:`Traits`. Tests, benchmarks and configs see it from then on."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        cls.traits = Traits(**traits)
        return MIXERS.register(name)(cls)

    return add


def create_mixer(name: str, dim: int, **options: Any) -> Mixer:
    """A registered mixer by name, e.g. ``create_mixer("mamba2", 256)``.

    Raises:
        KeyError: unknown name (the nearest is named).
        TypeError: an option the mixer does not take (the nearest is named).
    """
    return MIXERS.create(name, dim, **options)


def list_mixers(pattern: str = "*", **traits: Any) -> list[str]:
    """Names of registered mixers that match a shell pattern and the given traits, e.g. ``list_mixers(streaming=True)``."""
    fields = [f.name for f in dataclasses.fields(Traits)]
    for key in traits:
        if key not in fields:
            raise TypeError(f"no trait {key!r}{nearest(key, fields)}; traits: {', '.join(fields)}")
    return [
        name
        for name in MIXERS.names(pattern)
        if all(getattr(MIXERS[name].traits, key) == value for key, value in traits.items())
    ]
