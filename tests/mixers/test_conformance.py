"""Every registered mixer keeps the contract, in each form that its traits claim; one test for each property, so that a failure names it."""

from __future__ import annotations

from typing import Any

import pytest

from mmlong.mixers import MIXERS, list_mixers
from mmlong.testing import PROPERTY_NAMES, check_mixer

# Beside the defaults: options that bring windows, blocks and chunks within the lengths that are checked.
NEARER: dict[str, list[dict[str, Any]]] = {}

SLOW = {"compile", "export"}


def forms() -> list[Any]:
    """(name, options) of every form of every mixer, as test parameters."""
    found = []
    for name in list_mixers():
        traits = MIXERS[name].traits
        for options in [{}, *NEARER.get(name, [])]:
            for causal in (True, False):
                if traits.causal if causal else traits.bidirectional:
                    told = [name, "causal" if causal else "two-sided", *(f"{k}={v}" for k, v in options.items())]
                    found.append(pytest.param(name, {"causal": causal, **options}, id="-".join(told)))
    return found


def properties() -> list[Any]:
    return [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PROPERTY_NAMES]


@pytest.mark.parametrize("prop", properties())
@pytest.mark.parametrize(("name", "options"), forms())
def test_conformance(name: str, options: dict[str, Any], prop: str) -> None:
    if not check_mixer(name, options=options, only=prop):
        pytest.skip(f"the traits of {name} exclude {prop!r} here")


def test_nearer_options_name_registered_mixers() -> None:
    assert set(NEARER) <= set(list_mixers())
