"""A backbone at another rate: every step of time is changed, every part that counts in tokens is named, and nothing is changed where that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlong.backbone import Backbone, BackboneConfig, resample


def build(**options: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**{"dim": 8, "depth": 2, "mixers": ["s4d"], "ffn_ratio": 1.0, **options}))


def steps(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in backbone.named_parameters() if name.endswith("log_dt")}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["stages.0.0.mixer", "stages.0.1.mixer"]),
        ({"direction": "both"}, ["stages.0.0.mixer", "stages.0.1.mixer"]),
        (
            {"direction": "both", "mixers": ["lru"], "depth": 1},
            ["stages.0.0.mixer.forwards", "stages.0.0.mixer.backwards.mixer"],
        ),
        (
            {"direction": "alternate", "mixers": ["s5", "lru"]},
            ["stages.0.0.mixer", "stages.0.1.mixer.mixer"],
        ),
        ({"reversible": True, "depth": 1}, ["stages.0.0.mixer"]),
    ],
)
def test_every_mixer_is_changed(options: dict[str, Any], names: list[str]) -> None:
    backbone = build(**options)
    done = resample(backbone, 2)
    assert list(done.changed) == names
    assert done.left == {}
    before = steps(build(**options))
    for name, now in steps(backbone).items():
        torch.testing.assert_close(now, before[name] + torch.tensor(2.0).log())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mixers": ["s4d", "mamba2"]}, {"stages.0.1.mixer": "Mamba2 counts in tokens"}),
        ({"mixers": ["hyena"], "depth": 1}, {"stages.0.0.mixer": "Hyena counts in tokens"}),
        (
            {"dim": [8, 16], "depth": [1, 1], "pool": [4], "direction": "alternate"},
            {"merges.0": "makes one token of 4"},
        ),
        ({"parts": ["s4d", ["pool 4", ["s4d"], "up"]]}, {"stages.0.1": "Level counts in tokens"}),
        (
            {"ffn": "colt5", "direction": "both", "depth": 1},
            {"stages.0.0.ffn": "CoLT5 chooses among tokens"},
        ),
    ],
)
def test_what_counts_in_tokens_is_refused_or_named(options: dict[str, Any], why: dict[str, str]) -> None:
    backbone = build(**options)
    before = steps(backbone)
    ((name, reason),) = why.items()
    with pytest.raises(ValueError, match=f"not all of this model .*{name}: {reason}.* lru, s4, s4d, s4nd, s5"):
        resample(backbone, 2)
    assert all(now.equal(before[name]) for name, now in steps(backbone).items())
    done = resample(backbone, 2, strict=False)
    assert done.left == why
    assert len(done.changed) == len(before)
    assert not any(now.equal(before[name]) for name, now in steps(backbone).items())


def test_one_changes_nothing_whatever_the_parts() -> None:
    backbone = build(mixers=["attention", "s4d"])
    before = steps(backbone)
    assert resample(backbone, 1).changed == ()
    assert all(now.equal(before[name]) for name, now in steps(backbone).items())
    with pytest.raises(ValueError, match="a number above 0"):
        resample(backbone, 0)


def test_of_many_parts_an_error_names_the_first() -> None:
    with pytest.raises(ValueError, match=r"stages\.0\.4\.mixer: .*; and 2 more\. Train at that rate"):
        resample(build(mixers=["local"], depth=7), 2)
