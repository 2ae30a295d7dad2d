"""The contract composes: a backbone of any streaming mixers keeps it too, in each direction."""

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


KINDS = ["attention", "hyena", "local", "mamba2", "masked_conv2d", "s4d"]
"""One of each kind of state."""

SMOOTH = {"long_conv": {"squash": 0.0}}
"""Among thousands of free lags one lies so close to the squash's kink that no step of a finite difference is small enough for its gradient."""


def groups() -> list[list[str]]:
    """All streaming mixers, three at a time: gradients are checked parameter by parameter, each by running the whole stack."""
    rest = [name for name in list_mixers(streaming=True) if name not in KINDS]
    return [rest[i : i + 3] for i in range(0, len(rest), 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "mixers"),
    # Directions wrap any causal mixer alike.
    [("both", KINDS), ("alternate", KINDS), *(("causal", some) for some in (KINDS, *groups()))],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_backbone_keeps_the_contract(direction: str, mixers: list[str]) -> None:
    traits = ONE_WAY if direction == "causal" else TWO_WAY
    traits = dataclasses.replace(traits, grid=any(MIXERS[name].traits.grid for name in mixers))

    def backbone(dim: int) -> nn.Module:
        specs = [{"name": name, **SMOOTH.get(name, {})} for name in mixers]
        return Backbone(BackboneConfig(dim=dim, depth=len(mixers), mixers=specs, direction=direction))

    wanted = [p for p in PROPERTY_NAMES if p not in OF_MIXERS]
    ran = check_mixer(backbone, traits=traits, dims=(16,), only=wanted)
    one_way = {"causality", "pieces", "segments"}
    assert set(ran) == set(wanted) - ({"both sides"} if direction == "causal" else one_way)
