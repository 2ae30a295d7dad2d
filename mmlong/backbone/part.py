"""What stands in a backbone's list beside blocks: a part round other parts, with the mixer's own signature, registered under the key that writes it.

``@register_part("within")`` on ``class Within(Part)`` with ``__init__(self, inner, k)`` makes ``{within: 8, parts: [...]}`` a part: the key's value is the first argument after ``inner``, the other arguments are its options. An argument ``dim`` is given the width of the tokens; one called ``inner_dim`` that of
the parts inside, written as the option ``dim``. A class without ``inner`` is written without ``parts``. Other people's packages add theirs by the entry-point group ``mmlong.parts``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.registry import Registry

GIVEN = ("inner", "dim", "inner_dim")
"""Arguments that are not written, or not by that name."""


class Part(nn.Module):
    """Parts inside, round which something is done: ``y, state = part(x, state, layout)``, ``(B, L, D)`` to ``(B, L, D)``.

    Args:
        inner: what the part runs on what it makes of ``x``; it has the same signature, ``causal`` and ``streaming``.

    Attributes:
        tokens_out: what a row has after the part, always, if that is not as many tokens as before; such a part stands last in a backbone. ``None``: as many as before.
        width_out: width of those.
        inside: direction of the blocks inside (:mod:`mmlong.backbone.directions`), where that is not the backbone's: ``both`` for a part that keeps the future out itself.
    """

    tokens_out: int | None = None
    width_out: int | None = None
    inside: ClassVar[str | None] = None

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    @property
    def causal(self) -> bool:
        return bool(self.inner.causal)

    @property
    def streaming(self) -> bool:
        return bool(self.inner.streaming)


def codes_of(what: str, layout: Layout | None) -> Tensor:
    """The codes that the tokens were made of, int64 ``(B, L)``, for a part that goes by them; its class says so by ``reads_codes``, a kind of modality or ``any``, and the model then tells them.

    Raises:
        ValueError: they were not told.
    """
    if layout is None or layout.codes is None:
        raise ValueError(
            f"{what} goes by what the tokens are and was not told (layout.codes): use it on the tokens of a model, not inside a part that makes tokens of its own"
        )
    return layout.codes


PARTS: Registry[type[nn.Module]] = Registry("part", group="mmlong.parts")

P = TypeVar("P", bound=type[nn.Module])


def register_part(key: str) -> Callable[[P], P]:
    """Decorator: what is written ``{key: size, ...}`` in ``backbone.parts`` is one of these."""
    return PARTS.register(key)  # type: ignore[return-value]


def arguments(key: str) -> Mapping[str, inspect.Parameter]:
    """What the part of this key is made with, in order."""
    return inspect.signature(PARTS[key]).parameters


def written_keys(key: str) -> tuple[str, ...]:
    """What may be written of the part of this key, the key first."""
    taken = arguments(key)
    named = [name for name in taken if name not in GIVEN]
    inside = ("parts",) if "inner" in taken else ()
    return (key, *inside, *(("dim",) if "inner_dim" in taken else ()), *named[1:])


def make_part(key: str, size: Any, dim: int, inner: nn.Module | None, inner_dim: int, options: dict[str, Any]) -> Any:
    """The part of this key: ``size`` is the key's value, ``options`` what else is written."""
    taken = arguments(key)
    given = {"inner": inner, "dim": dim, "inner_dim": inner_dim}
    first = next(name for name in taken if name not in GIVEN)
    return PARTS[key](**{first: size}, **{name: given[name] for name in GIVEN if name in taken}, **options)
