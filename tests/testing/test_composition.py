"""The contract composes: a backbone of every streaming mixer keeps it too, in each direction."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.mixers import MIXERS, Traits, list_mixers
from mmlong.testing import PROPERTY_NAMES, check_mixer

# What a backbone does not declare (bytes of its state), or asks of its parts (what they refuse, what they cost, how they compile).
OF_MIXERS = {"manners", "state", "cost", "compile", "export"}
ONE_WAY = Traits(paper="none")
TWO_WAY = Traits(paper="none", causal=False, bidirectional=True, streaming=False, state="none")


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "traits"), [("causal", ONE_WAY), ("both", TWO_WAY), ("alternate", TWO_WAY)])
def test_a_backbone_keeps_the_contract(direction: str, traits: Traits) -> None:
    mixers = list_mixers(streaming=True)
    traits = dataclasses.replace(traits, grid=any(MIXERS[name].traits.grid for name in mixers))

    def backbone(dim: int) -> nn.Module:
        return Backbone(BackboneConfig(dim=dim, depth=len(mixers), mixers=mixers, direction=direction))

    wanted = [p for p in PROPERTY_NAMES if p not in OF_MIXERS]
    ran = check_mixer(backbone, traits=traits, dims=(16,), only=wanted)
    one_way = {"causality", "pieces", "segments"}
    assert set(ran) == set(wanted) - ({"both sides"} if direction == "causal" else one_way)
