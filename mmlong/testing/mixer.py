"""``check_mixer``: does a part keep the contract ``y, state = mixer(x, state=None, layout=None)``?

The contract is small, and everything else (streaming, prefill in pieces, exact training at any length, packed and padded batches)
follows from it without code of its own; so it is checked hard. Each property is a function in one of the files beside this one; this file
says which there are, in which order, and to whom each applies. A property is skipped because of a trait, never because it failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mmlong.mixers.contract import Traits, create_mixer
from mmlong.testing import causality, cost, gradients, isolation, layouts, module, numerics, streaming, stress
from mmlong.testing.subject import PROBED, Make, Subject
from mmlong.testing.suite import Property, run_properties, wanted_properties

# In the order of what a failure of one says about the next: rows before time, time before state, state before layouts.
PROPERTIES: tuple[Property, ...] = (
    Property("manners", module.manners),
    Property("determinism", isolation.eval_is_deterministic),
    Property("arguments", isolation.arguments_are_left_alone),
    Property("rows", isolation.rows_are_independent),
    Property("causality", causality.no_leak_from_the_future, lambda s: s.causal),
    Property("both sides", causality.both_sides_are_seen, lambda s: not s.causal),
    Property("pieces", streaming.whole_is_pieces, lambda s: s.streaming),
    Property("padding", layouts.padding_changes_nothing, lambda s: s.traits.padding),
    Property("resets", layouts.resets_separate, lambda s: s.traits.resets),
    Property("grid", streaming.grid_is_read_or_ignored),
    Property("gradients", gradients.gradients_are_right, lambda s: not s.stops_gradient),
    Property("segments", gradients.segments_give_the_whole_gradient, lambda s: s.streaming),
    Property("state", streaming.state_is_as_declared),
    Property("bfloat16", numerics.bfloat16_autocast_works),
    Property("finite", numerics.large_and_flat_inputs_are_finite),
    Property("stress", stress.near_float64_under_stress, every_dim=False),
    Property("cost", cost.cost_is_as_declared, every_dim=False),
    Property("state_dict", module.state_dict_restores, every_dim=False),
    Property("compile", module.compiles, every_dim=False),
    Property("export", module.exports, every_dim=False),
)

PROPERTY_NAMES: tuple[str, ...] = tuple(p.name for p in PROPERTIES)

# Minutes, not seconds: only when asked for by name.
LONG_PROPERTIES: tuple[Property, ...] = (
    Property("long stress", stress.near_float64_under_long_stress, every_dim=False),
)


def check_mixer(
    make: str | Make,
    *,
    traits: Traits | None = None,
    dims: Sequence[int] = (16, 32),
    options: dict[str, Any] | None = None,
    only: str | Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    prepare: Callable[[nn.Module], None] | None = None,
    probed: int = PROBED,
) -> tuple[str, ...]:
    """Check that a mixer (or a block, or a backbone: anything with the contract's signature) keeps the contract.

    Args:
        make: a registered name, or ``make(dim)`` returning a fresh module. Modules are checked in eval mode, in float64 and float32,
            with their parameters moved off their initial values.
        traits: what it claims; default the module's own ``traits``.
        dims: widths to check. Costs and exports are checked at the first only.
        options: for ``make``, e.g. ``{"causal": False}`` for the two-sided form.
        only: names of the properties to check (see ``PROPERTY_NAMES``); default all that the traits do not exclude. ``"long stress"``, at
            65,536 tokens, is checked only if it is named here.
        device: where to run.
        prepare: called with every module that is built, after its parameters were moved: to set some of them, for example decays as strong
            as its mechanism can have.

    Returns:
        names of the properties that were checked: all, but those that the traits exclude or ``only`` leaves out.

    Raises:
        ConformanceError: (an ``AssertionError``) names the first property that does not hold, where results first part (row, position, channel;
            at which batch, length and dtype), and by how much.
        KeyError, TypeError: an unknown name or option.
        ValueError: an unknown property, or no width.
    """
    wanted = wanted_properties(only, PROPERTY_NAMES, tuple(p.name for p in LONG_PROPERTIES))
    given = options or {}
    if isinstance(make, str):
        registered = make
        name = registered

        def build(dim: int) -> nn.Module:
            return create_mixer(registered, dim, **given)
    else:
        maker = make
        name = getattr(maker, "__name__", type(maker).__name__)

        def build(dim: int) -> nn.Module:
            return maker(dim, **given)

    if given:
        name += "(" + ", ".join(f"{k}={v!r}" for k, v in given.items()) + ")"
    if not dims:
        raise ValueError("check_mixer needs at least one width in dims")
    if traits is None:
        with torch.random.fork_rng():
            traits = getattr(build(dims[0]), "traits", None)
        if traits is None:
            raise ValueError(f"{name} has no traits: pass traits=Traits(...)")
    place = torch.device(device)
    subjects = [Subject(name, build, traits, dim, place, prepare, probed) for dim in dims]
    return run_properties(PROPERTIES + LONG_PROPERTIES, wanted, subjects)
