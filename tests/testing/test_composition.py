"""The contract composes: a backbone of any streaming mixers keeps it too, in each direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from torch import nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.mixers import MIXERS, Traits, list_mixers
from mmlong.testing import PROPERTY_NAMES, check_mixer
from mmlong.testing.kinds import KINDS_OF_STATE

# What a backbone does not declare (bytes of its state), or asks of its parts (what they refuse, what they cost, how they compile).
OF_MIXERS = {"manners", "state", "cost", "compile", "export"}
ONE_WAY = Traits(paper="none")
TWO_WAY = Traits(paper="none", causal=False, bidirectional=True, streaming=False, state="none")


OF_STATES = ("pieces", "padding", "segments")
"""What a stack could spoil for a mixer that keeps the contract by itself: the tree of its states."""


def groups() -> list[list[str]]:
    """The other streaming mixers, six at a time."""
    rest = [name for name in list_mixers(streaming=True) if name not in KINDS_OF_STATE]
    return [rest[i : i + 6] for i in range(0, len(rest), 6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "direction",
    # Directions wrap any causal mixer alike.
    ["both", "alternate", "causal"],
)
def test_a_backbone_keeps_the_contract(direction: str) -> None:
    wanted = [p for p in PROPERTY_NAMES if p not in OF_MIXERS]
    ran = _check(direction, KINDS_OF_STATE, wanted)
    one_way = {"causality", "pieces", "segments"}
    assert set(ran) == set(wanted) - ({"both sides"} if direction == "causal" else one_way)


@pytest.mark.slow
@pytest.mark.parametrize("mixers", groups(), ids="-".join)
def test_any_streaming_mixers_stack(mixers: list[str]) -> None:
    assert set(_check("causal", mixers, OF_STATES)) == set(OF_STATES)


def _check(direction: str, mixers: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    traits = ONE_WAY if direction == "causal" else TWO_WAY
    traits = dataclasses.replace(traits, grid=any(MIXERS[name].traits.grid for name in mixers))

    def backbone(dim: int) -> nn.Module:
        return Backbone(BackboneConfig(dim=dim, depth=len(mixers), mixers=list(mixers), direction=direction))

    return check_mixer(backbone, traits=traits, dims=(16,), only=wanted)
