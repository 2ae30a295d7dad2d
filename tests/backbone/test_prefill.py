"""Reading without outputs: states to the bit, ragged rows too, and the same tokens generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.prefill import states_only
from mmlong.generation import generate
from mmlong.heads import Sampling
from mmlong.layout import Layout
from mmlong.mixers import MIXERS, Mixer
from mmlong.mixers.document import DocumentMixer
from mmlong.models import build_model
from mmlong.testing.streaming import same_state

LASTS: list[Any] = [
    "attention",
    {"name": "local", "window": 7},
    {"name": "memorizing", "segment": 8, "near": 8, "topk": 4},
    "mamba2",
    {"pool": 3, "parts": ["attention"]},
]


def build(last: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(dim=16, parts=["mamba2", last])).double().eval()


def ragged(batch: int, length: int) -> Layout:
    resets = torch.zeros(batch, length, dtype=torch.bool)
    resets[0, 5] = resets[-1, 11] = True
    return Layout(lengths=torch.tensor([length, length - 4, 0][:batch]), resets=resets)


@pytest.mark.parametrize("last", LASTS, ids=lambda last: next(iter(last.values())) if isinstance(last, dict) else last)
def test_states_are_the_same_and_outputs_are_none(last: Any) -> None:
    backbone = build(last)
    x = torch.randn(3, 41, 16, dtype=torch.float64)
    with torch.no_grad():
        for layout in (None, ragged(3, 20)):
            state: Any = None
            read: Any = None
            for a, b in ((0, 20), (20, 41)):
                here = layout if a == 0 else None
                _, state = backbone(x[:, a:b], state, here)
                with states_only():
                    nothing, read = backbone(x[:, a:b], read, here)
                assert same_state(read, state)
                if not (isinstance(last, dict) and "pool" in last):
                    assert nothing.isnan().all()
    y, _ = backbone(x)
    assert y.isfinite().all()


def test_a_prompt_is_read_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last attention attends at the tokens that are drawn, and not at the prompt's."""
    torch.manual_seed(0)
    model = build_model({"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 16, "depth": 2, "mixers": ["attention"]}})  # fmt: skip
    prompt = torch.randint(256, (2, 30))
    greedy = Sampling(temperature=0.0)
    got = generate(model, 5, prompt, sampling=greedy, piece=7)
    for t in range(5):
        with torch.no_grad():
            want = model.eval()(got[:, : 30 + t + 1])[0][:, -1].argmax(-1)
        assert torch.equal(got[:, 30 + t], want)
    lengths: list[int] = []
    last = model.backbone.blocks()[-1].mixer
    read = last.read

    def counted(x: Tensor, *rest: Any) -> Tensor:
        lengths.append(x.shape[1])
        return read(x, *rest)

    monkeypatch.setattr(last, "read", counted)
    generate(model, 5, prompt, sampling=greedy, piece=7)
    assert lengths == [1] * 5


def test_only_the_asked_for_block_and_thread() -> None:
    backbone = build("attention")
    with states_only():
        pass
    assert backbone(torch.randn(1, 3, 16, dtype=torch.float64))[0].isfinite().all()
    # One that sees both sides has no state to leave.
    both = Backbone(BackboneConfig(dim=16, depth=2, mixers=["attention"], direction="both"))
    with states_only():
        y, state = both(torch.randn(1, 3, 16))
    assert state is None
    assert y.isfinite().all()


def test_whoever_says_how_is_held_to_it() -> None:
    """Those with an ``absorb`` of their own carry a state; the conformance suite compares it."""
    own = [
        name
        for name in MIXERS.names()
        if MIXERS[name].absorb not in (Mixer.absorb, DocumentMixer.absorb)
        or getattr(MIXERS[name], "absorb_document", None) not in (None, DocumentMixer.absorb_document)
    ]
    assert {"attention", "local", "memorizing"} <= set(own)
    assert all(MIXERS[name].traits.streaming for name in own)
