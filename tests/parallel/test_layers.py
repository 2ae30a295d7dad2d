"""Layers over ranks are one process: each mixer's own form where it has one, the general one elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from cases import (
    OPTIONS,
    WORLDS,
    WORLDS_AND_MIXERS,
    all_gradients,
    cached_ranks,
    data,
    leave,
    mixers,
    model,
    names,
    start,
)

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.mixers import Mamba2
from mmlong.parallel import take_piece
from mmlong.parallel.layers import FORMS, over_ranks
from mmlong.parallel.links import Links

KINDS = ("full", "padded", "packed")


SPECIAL: dict[str, dict[str, Any]] = {
    "attention": {"heads": 4, "kv_heads": 2, "positions": "none"},
    "hyena": {"order": 3, "max_length": 10},
}
"""Shared keys; a filter that reaches some of the pieces before, twice over."""


def layered(
    mixer: str, kind: str, batch: int, world: int, rank: int, group: Any, only_head: bool = False
) -> dict[str, Any]:
    """The loss over all pieces, and the gradients summed over ranks."""
    module = model(mixer)
    if only_head:
        module.requires_grad_(False).head.requires_grad_(True)
    piece, layout = take_piece(*data(kind, batch), world, rank)
    with over_ranks(module.backbone, group):
        loss, state = module.step(piece, None, layout)
    assert not any(part is not None for part in state)
    loss.backward()
    found = {"loss": loss.detach(), **all_gradients(module)}
    if world > 1:
        found = {name: value.contiguous() for name, value in found.items()}
        for value in found.values():
            dist.all_reduce(value)
    return found


def ranks(rank: int, world: int, folder: Path) -> None:
    start(rank, world, folder)
    group = dist.group.WORLD
    found: dict[str, Any] = {}
    waits: list[str] = []
    receive = Links.receive_state
    for mixer, kind, batch in names(world):
        if kind in KINDS:
            Links.receive_state = lambda links, mixer=mixer: waits.append(mixer) or receive(links)  # type: ignore
            found[f"{mixer}/{kind}/{batch}"] = layered(mixer, kind, batch, world, rank, group)
    found["waits"] = sorted(set(waits))
    # Where only the head is trained, the backward runs all the same.
    for mixer in ("s4d", "local", "attention"):
        found[f"head of {mixer}"] = layered(mixer, "full", 3, world, rank, group, only_head=True)
    # Without its own form, a mixer takes the general one; and where the form declines.
    form = FORMS.pop(Mamba2)
    found["general"] = layered("mamba2", "packed", 3, world, rank, group)
    FORMS[Mamba2] = form
    OPTIONS["local"] = {"window": 20}
    found["wide"] = layered("local", "packed", 3, world, rank, group)
    for name, options in SPECIAL.items():
        OPTIONS[name] = options
        found[f"special {name}"] = layered(name, "packed", 3, world, rank, group)
    with pytest.raises(ValueError, match="a token on every rank"):
        layered("s4d", "short", 1, world, rank, group) if world == 4 else over_nothing(rank, group)
    torch.save(found, folder / f"rank{rank}.pt")
    leave()


def over_nothing(rank: int, group: Any) -> None:
    module = model("s4d").backbone
    with over_ranks(module, group):
        module.stages[0][0].mixer(torch.zeros(1, 1 - rank, 8, dtype=torch.float64))


@pytest.fixture(scope="module")
def found_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each rank found, by the number of ranks."""
    return cached_ranks(Path(__file__), ranks, tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module", params=WORLDS)
def found(request: pytest.FixtureRequest, found_by: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return found_by(request.param)


def same(got: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    assert got.keys() == expected.keys(), where
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name],
            value,
            rtol=1e-7,
            atol=1e-9 * float(value.abs().max() + 1),
            msg=lambda m, n=name: f"{where}: {n}: {m}",
        )


@pytest.mark.parametrize(("world", "mixer"), WORLDS_AND_MIXERS)
def test_ranks_are_one_process(found_by: Callable[[int], list[dict[str, Any]]], world: int, mixer: str) -> None:
    for kind in KINDS:
        for batch in (1, 3):
            module = model(mixer)
            inputs, layout = data(kind, batch)
            loss, _ = module.step(inputs, None, layout)
            loss.backward()
            expected = {"loss": loss.detach(), **all_gradients(module)}
            for rank, every in enumerate(found_by(world)):
                same(every[f"{mixer}/{kind}/{batch}"], expected, f"{kind}, batch {batch}, rank {rank}")
                if (mixer, kind, batch) == ("mamba2", "packed", 3):
                    same(every["general"], expected, f"the general form, rank {rank}")


@pytest.mark.parametrize("mixer", ["s4d", "local", "attention"])
def test_only_the_head_is_trained(found: list[dict[str, Any]], mixer: str) -> None:
    expected = layered(mixer, "full", 3, 1, 0, None, only_head=True)
    assert len(expected) > 1
    for rank, every in enumerate(found):
        same(every[f"head of {mixer}"], expected, f"rank {rank}")


def test_a_window_longer_than_a_piece(found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "local", {"window": 20})
    expected = layered("local", "packed", 3, 1, 0, None)
    for rank, every in enumerate(found):
        same(every["wide"], expected, f"rank {rank}")


@pytest.mark.parametrize("mixer", list(SPECIAL))
def test_other_options(found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, mixer: str) -> None:
    monkeypatch.setitem(OPTIONS, mixer, SPECIAL[mixer])
    expected = layered(mixer, "packed", 3, 1, 0, None)
    for rank, every in enumerate(found):
        same(every[f"special {mixer}"], expected, f"rank {rank}")


def test_those_with_a_form_of_their_own_wait_for_no_state(found: list[dict[str, Any]]) -> None:
    assert all(every["waits"] == found[0]["waits"] for every in found)
    assert set(found[0]["waits"]) == set(mixers(len(found))) - {"s4d", "mamba2", "local", "attention", "hyena"}


def test_one_process_is_itself() -> None:
    module = model("local")
    inputs, layout = data("packed", 3)
    loss, _ = module.step(inputs, None, layout)
    loss.backward()
    same(layered("local", "packed", 3, 1, 0, None), {"loss": loss.detach(), **all_gradients(module)}, "alone")
    module = model("s4d").backbone
    with over_ranks(module, None), pytest.raises(ValueError, match="a state comes from the rank before"):
        module(torch.zeros(1, 3, 8).double(), (torch.zeros(1), None), None)
    _, state = module(torch.zeros(1, 3, 8).double())
    assert state[0] is not None, "and is as it was afterwards"


def test_refuses_what_is_run_again() -> None:
    module = model("s4d").backbone
    module.grad_checkpointing = True
    with pytest.raises(ValueError, match="would ask their neighbours again"), over_ranks(module, None):
        pass


def test_parts_with_a_state_of_their_own_are_refused() -> None:
    made = Backbone(BackboneConfig(dim=8, parts=["mamba2", {"pool": 2, "parts": ["mamba2"]}]))
    with pytest.raises(ValueError, match="Level carries a state of its own past its mixers"), over_ranks(made, None):
        pass
    made = Backbone(BackboneConfig(dim=8, parts=["mamba2", {"retro": 4}]))
    with pytest.raises(ValueError, match="Retro carries a state of its own past its mixers"), over_ranks(made, None):
        pass
