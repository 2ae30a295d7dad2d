"""``check_modality``: does a modality keep its contract (:mod:`mmlong.modalities.contract`)?

What a modality promises is what everything after it builds on: that tokens are the raw data and can become it again, that padding and packing change nothing,
that values know no place and places no value (an autoregressive model adds one token's value to the next token's place). The raw data to check it on is shown by
the modality itself, ``example(batch, length, generator)``, so registering one is all it takes to be checked. A property is skipped only because the modality takes no lengths
or no resets, which its example shows; then it must refuse them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mmlong.modalities.contract import MODALITIES, Modality, create_modality
from mmlong.testing import modality_tokens as tokens
from mmlong.testing import modality_vectors as vectors
from mmlong.testing.modality_subject import MakeModality, ModalitySubject
from mmlong.testing.suite import Property, run_properties, wanted_properties

# In the order of what a failure of one says about the next: tokens before rows, rows before documents, tokens before vectors.
MODALITY_PROPERTIES: tuple[Property, ...] = (
    Property("tokens", tokens.tokens_are_as_declared),
    Property("round trip", tokens.decode_gives_the_raw_back),
    Property("grid", tokens.grid_is_right),
    Property("rows", tokens.rows_are_encoded_alone),
    Property("padding", tokens.padding_changes_nothing, lambda s: s.takes(s.module())[0]),
    Property("resets", tokens.documents_are_encoded_alone, lambda s: s.takes(s.module())[1]),
    Property("set", tokens.order_of_a_set_changes_nothing, lambda s: s.module().unordered),
    Property("refusals", tokens.what_is_outside_is_refused),
    Property("values", vectors.values_know_no_place),
    Property("places", vectors.places_go_by_the_index),
    Property("embedding", vectors.embedding_is_values_and_places),
    Property("gradients", vectors.gradients_reach_every_parameter),
    Property("float64", vectors.float64_is_closer),
    Property("state_dict", vectors.state_dict_restores),
)

MODALITY_PROPERTY_NAMES: tuple[str, ...] = tuple(p.name for p in MODALITY_PROPERTIES)


def check_modality(
    make: str | MakeModality,
    *,
    dims: Sequence[int] = (16,),
    options: dict[str, Any] | None = None,
    only: str | Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[str, ...]:
    """Check that a modality keeps the contract.

    Args:
        make: a registered name, or ``make(dim)`` returning a fresh module. Modules are checked in eval mode, in float32 and float64, with their parameters moved off
            their initial values.
        dims: widths to check.
        options: for ``make``; default, for a registered name, each of its ``example_options()``.
        only: names of the properties to check (see ``MODALITY_PROPERTY_NAMES``); default all.
        device: where to run.

    Returns:
        names of the properties that were checked: all, but those that it excludes (no lengths, no resets, not a set) or ``only`` leaves out.

    Raises:
        ConformanceError: (an ``AssertionError``) names the first property that does not hold, where, and by how much.
        KeyError, TypeError: an unknown name or option.
        ValueError: an unknown property, or no width.
    """
    wanted = wanted_properties(only, MODALITY_PROPERTY_NAMES)
    if not dims:
        raise ValueError("check_modality needs at least one width in dims")
    if isinstance(make, str):
        forms = MODALITIES[make].example_options() if options is None else [options]
    else:
        forms = [options or {}]
    ran: set[str] = set()
    for form in forms:
        name, build = _maker(make, form)
        with torch.random.fork_rng():
            build(dims[0])  # a wrong option is the caller's mistake, not the modality's
        subjects = [ModalitySubject(name, build, dim, torch.device(device)) for dim in dims]
        ran.update(run_properties(MODALITY_PROPERTIES, wanted, subjects))
    return tuple(name for name in MODALITY_PROPERTY_NAMES if name in ran)


def _maker(make: str | MakeModality, options: dict[str, Any]) -> tuple[str, MakeModality]:
    name = make if isinstance(make, str) else getattr(make, "__name__", type(make).__name__)
    if options:
        name += "(" + ", ".join(f"{k}={v!r}" for k, v in options.items()) + ")"

    def build(dim: int) -> Modality:
        return create_modality(make, dim, **options) if isinstance(make, str) else make(dim, **options)  # type: ignore[call-arg]

    return name, build
