"""The joint objective over ranks is that of one process: rows of two spans in either order, whose border lies in either piece, and what was counted of each modality."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from cases import all_gradients, leave, spawn, start

from mmlong.backbone import BackboneConfig
from mmlong.parallel import SequenceMesh
from mmlong.parallel.strategy import SequenceParallelStrategy
from mmlong.tasks import JointTask

MIXERS: list[Any] = ["mamba2", {"name": "local", "window": 4}, "attention"]
ORDERS = [["picture", "words"], ["words", "picture"]]
KINDS = ("codes", "numbers")


def make(kind: str, segment: int | None = None) -> tuple[JointTask, dict[str, Any]]:
    torch.manual_seed(0)
    picture = {"name": "image_bytes" if kind == "codes" else "image", "size": [3, 4], "channels": 1, "order": "raster"}
    task = JointTask(
        {"picture": picture, "words": {"name": "text"}}, BackboneConfig(dim=8, depth=3, mixers=MIXERS),
        orders=ORDERS, weights={"words": 2.0}, segment=segment,
        linear_prediction=None if kind == "codes" else {"picture": [1, 4]},
    ).double()  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    batch = {
        "parts": {
            "picture": {"raw": torch.randint(256, (4, 1, 3, 4), dtype=torch.uint8, generator=draw)},
            "words": {
                "raw": torch.randint(256, (4, 9), dtype=torch.uint8, generator=draw),
                "lengths": torch.tensor([9, 2, 5, 4]),
            },
        },
        "index": torch.arange(4),
        "weight": torch.tensor([1.0, 1.0, 1.0, 0.0]),
    }
    return task, batch


def measured(task: JointTask, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loss, gradients, and what was counted in evaluation."""
    orders = [ORDERS[row % 2] for row in range(4)]
    loss, _ = task.loss(*task.encode(batch, orders))
    loss.backward()
    gradients = all_gradients(task)
    with torch.no_grad():
        again, counted = task.eval().loss(*task.encode(batch, orders))
    told: dict[str, Any] = {"loss": loss.detach(), "again": again}
    for name, one in counted.items():
        told |= {f"{name}/nats": one.nats, f"{name}/numbers": torch.tensor(one.numbers), f"{name}/wrong": one.wrong}
    return {**told, **gradients}


def ranks(rank: int, world: int, folder: Path) -> None:
    start(rank, world, folder)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind in KINDS:
        for rows, segment in ((1, None), (3, 4)):
            task, batch = make(kind, segment)
            task.ranks = SequenceMesh(world, rows=rows)
            one = measured(task, batch)
            for name, value in one.items():
                if name in dict(task.named_parameters()):
                    dist.all_reduce(value)
                    value /= world
            found[f"{kind}/{rows}"] = one
    task, batch = make("codes")
    task.ranks = SequenceMesh(world)
    torch.manual_seed(rank)  # ranks that draw other orders by themselves
    found["drawn"] = {"kind": torch.stack([task.encode(batch)[0].kind[:, 0] for _ in range(6)])}
    torch.save(found, folder / f"rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("joint")
    spawn(Path(__file__), ranks, 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_process(found: list[dict[str, Any]], kind: str, rows: int) -> None:
    expected = measured(*make(kind))
    # The mixture's loss is single precision.
    digits = 1e-5 if kind == "numbers" else 1e-8
    for rank in found:
        assert rank[f"{kind}/{rows}"].keys() == expected.keys()
        for name, value in rank[f"{kind}/{rows}"].items():
            torch.testing.assert_close(value, expected[name], rtol=digits, atol=digits, msg=name, check_dtype=False)
    assert int(expected["words/wrong"].sum()) > 0


def test_ranks_of_a_sequence_draw_the_same_orders(found: list[dict[str, Any]]) -> None:
    assert torch.equal(found[0]["drawn"]["kind"], found[1]["drawn"]["kind"])
    assert len(found[0]["drawn"]["kind"].unique()) > 1


def test_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="with layers is not for JointTask"):
        SequenceParallelStrategy(layers=True).connect(make("codes")[0])
