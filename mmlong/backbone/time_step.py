"""Another sampling rate for a trained backbone: the time between tokens is multiplied wherever there is one, and what counts in tokens is named.

A mixer that samples a system of continuous time (S4, Gu, Goel & Re 2021, arXiv 2111.00396, and its successors) hears a signal at another rate once its step is changed, without training ("zero-shot" on Speech Commands). The norms and feed-forwards of a block see one token at a time and do not mind.
Everything else that looks beyond a token counts them: a short convolution, a window of attention, four tokens pooled to one. Such a part goes on counting, over another stretch of time than it was trained on, so by default a backbone that has any is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mmlong.backbone.block import Block, Merge
from mmlong.backbone.colt5 import CoLT5
from mmlong.backbone.directions import BothWays, Reversed
from mmlong.mixers import Mixer, list_mixers
from mmlong.mixers.contract import check_factor

if TYPE_CHECKING:
    from mmlong.backbone.stack import Backbone

SHOWN = 5
"""Parts that an error names."""


@dataclass(frozen=True)
class Resampled:
    """What became of a resampling.

    Attributes:
        factor: the old rate over the new.
        changed: names of the mixers whose step was multiplied by it.
        left: names of the parts that count in tokens and went on as they were, and why.
    """

    factor: float
    changed: tuple[str, ...]
    left: Mapping[str, str]


def survey(backbone: Backbone) -> tuple[dict[str, Mixer], dict[str, str]]:
    """The mixers with a step of time, and why each other part that looks beyond a token has none, both by name."""
    names = {module: name for name, module in backbone.named_modules()}
    systems: dict[str, Mixer] = {}
    left: dict[str, str] = {}
    for merge in backbone.merges:
        assert isinstance(merge, Merge)
        left[names[merge]] = f"makes one token of {merge.k}"
    for part in backbone.parts():
        if not isinstance(part, Block):
            left[names[part]] = f"{type(part).__name__} counts in tokens"
    for block in backbone.blocks():
        for mixer in _mixers(block.mixer):
            if isinstance(mixer, Mixer) and mixer.traits.continuous:
                systems[names[mixer]] = mixer
            else:
                left[names[mixer]] = f"{type(mixer).__name__} counts in tokens"
        if isinstance(block.ffn, CoLT5):
            left[names[block.ffn]] = "CoLT5 chooses among tokens"
    return systems, left


def _mixers(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, Reversed):
        yield from _mixers(module.mixer)
    elif isinstance(module, BothWays):
        yield from _mixers(module.forwards)
        yield from _mixers(module.backwards)
    else:
        yield module


def require_all(left: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if any part is left, naming the first few."""
    if left:
        named = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:SHOWN])
        more = f"; and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise ValueError(
            f"not all of this model can be heard at another rate: {named}{more}. Train at that rate, build it of {', '.join(list_mixers(continuous=True))} without pooling, or resample what can be (strict=False; --rescale partly)"
        )


def resample(backbone: Backbone, factor: float, strict: bool = True) -> Resampled:
    """Multiply the time between tokens, in place.

    Args:
        backbone: the backbone.
        factor: the old rate over the new; 1 changes nothing.
        strict: refuse a backbone of which a part counts in tokens. Otherwise such parts stay as they are and are named in the result.

    Raises:
        ValueError: a factor that is not above 0 and finite, or parts that have no time of their own. Nothing has been changed then.
    """
    check_factor(factor)
    if factor == 1:
        return Resampled(1.0, (), {})
    systems, left = survey(backbone)
    if strict:
        require_all(left)
    for mixer in systems.values():
        mixer.resample(factor)
    return Resampled(factor, tuple(systems), left)
