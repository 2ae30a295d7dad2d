"""Named forms: what each writes, what a saved configuration has of it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.feedforward import Mlp
from mmlong.backbone.forms import FORMS, write_form
from mmlong.models import build_model


@pytest.mark.parametrize("name", FORMS.names())
def test_a_form_is_the_list_that_it_writes(name: str) -> None:
    config = BackboneConfig(dim=16, form=name)
    assert config.parts == write_form(name, 16) == json.loads(json.dumps(config.parts))
    # And a saved configuration, which has both, is read again.
    assert BackboneConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert FORMS[name].paper
    assert FORMS[name].note


def test_what_they_write() -> None:
    attention = {"pool": 4, "down": "attention", "up": "attention"}
    assert write_form({"name": "hourglass", "pool": [2, 4], "layers": [1, 2, 3]}, 8) == [
        "attention",
        {
            **attention,
            "pool": 2,
            "parts": ["attention x 2", {**attention, "parts": ["attention x 3"]}, "attention x 2"],
        },
        "attention",
    ]
    ssm: dict[str, Any] = {"name": "mamba2", "d_state": 128, "ffn": "none", "repeat": 3}
    near = {"name": "local", "window": 1023}
    inside = {"dynamic": 3, "weight": 0.03, "dim": 32, "parts": ["attention x 16"]}
    assert write_form({"name": "hnet", "stages": 2, "layers": 16}, 16) == [
        ssm, {"dynamic": 3, "weight": 0.03, "dim": 24, "parts": [near, ssm, inside, ssm, near]}, ssm,
    ]  # fmt: skip
    s4 = {"name": "s4", "ffn": {"name": "mlp", "ratio": 2.0}, "repeat": 8}
    assert write_form("sashimi", 64) == [
        {"pool": 4, "dim": 128, "lag": 1, "parts": [{"pool": 4, "dim": 256, "lag": 1, "parts": [s4]}, s4]}, s4,
    ]  # fmt: skip


def test_a_model_by_the_name_of_a_form() -> None:
    backbone = {"dim": 16, "form": {"name": "megabyte", "patch": 4, "global_layers": 1, "local_layers": 1}}
    m = build_model({"kind": "autoregressive", "modality": {"name": "text"}, "backbone": backbone})
    saved = m.config["backbone"]["parts"]
    assert saved == [{"pool": 4, "dim": 64, "parts": ["attention"]}, {"within": 4, "parts": ["attention"]}]
    other = build_model({**m.config, "backbone": {"dim": 16, "parts": saved}})
    other.load_state_dict(m.state_dict())
    tokens = torch.randint(256, (1, 11))
    torch.testing.assert_close(other.eval()(tokens)[0], m.eval()(tokens)[0])


def test_a_block_may_have_a_feed_forward_of_its_own() -> None:
    parts = [{"name": "gru", "ffn": "none"}, {"name": "gru", "ffn": {"name": "mlp", "ratio": 2}}, "gru"]
    for spelled in ({"parts": parts}, {"mixers": parts, "depth": 3}):
        none, own, usual = Backbone(BackboneConfig(dim=16, **spelled)).blocks()  # type: ignore[arg-type]
        assert none.ffn is None
        assert isinstance(own.ffn, Mlp)
        assert isinstance(own.ffn[0], nn.Linear)
        assert own.ffn[0].out_features == 32
        assert hasattr(usual.ffn, "w_out")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"form": "megabite"}, KeyError, "did you mean 'megabyte'"),
        ({"form": {"name": "hnet", "stage": 2}}, TypeError, "did you mean 'stages'"),
        ({"form": {"name": "hnet", "stages": 3}}, ValueError, "1 stage or 2"),
        ({"form": {"name": "hnet", "dims": [8, 8]}}, ValueError, "a width for each stage"),
        ({"form": {"name": "hourglass", "layers": [1]}}, ValueError, "one more number of layers"),
        ({"form": {"name": "megabyte", "dim": 4}}, ValueError, "from backbone.dim"),
        ({"form": {"patch": 4}}, ValueError, "a name or"),
        ({"form": "hourglass", "parts": ["gru"]}, ValueError, "leave one of the two empty"),
        ({"form": "hourglass", "dim": [8, 16]}, ValueError, "of one width"),
        ({"form": {"name": "rmt", "layers": -1}}, ValueError, "at least no blocks"),
        ({"form": {"name": "block_recurrent", "layers": 0}}, ValueError, "at least 1 layer"),
    ],
)
def test_what_is_refused(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BackboneConfig(**{"dim": 16, **config})
