"""The autoregressive objective over ranks, row after row and layer by layer, is that of one process: bytes in documents, and pixels with linear prediction."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from cases import leave, spawn, start

from mmlong.backbone import BackboneConfig
from mmlong.parallel import SequenceMesh
from mmlong.tasks import AutoregressTask

MIXERS: list[Any] = ["mamba2", {"name": "local", "window": 4}, "s4d", "attention"]
NAMES = [f"{kind}/{way}" for kind in ("text", "image") for way in ("rows", "layers")]


def make(kind: str) -> tuple[AutoregressTask, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=8, depth=4, mixers=MIXERS)
    draw = torch.Generator().manual_seed(1)
    batch = {"index": torch.arange(3), "weight": torch.tensor([1.0, 1.0, 0.0])}
    if kind == "image":
        task = AutoregressTask({"name": "image", "size": [5, 5], "channels": 3}, backbone, linear_prediction=[1, 5, 7])
        batch["raw"] = torch.randint(256, (3, 3, 5, 5), dtype=torch.uint8, generator=draw)
        return task.double(), batch
    batch["raw"] = torch.randint(256, (3, 23), dtype=torch.uint8, generator=draw)
    batch["lengths"] = torch.tensor([23, 9, 20])
    batch["resets"] = torch.zeros(3, 23, dtype=torch.bool)
    batch["resets"][0, [6, 12, 13]] = True
    return AutoregressTask({"name": "text"}, backbone).double(), batch


def gradients(task: AutoregressTask) -> dict[str, torch.Tensor]:
    """Of every parameter, as DDP takes them: zero where a rank has no use for it."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in task.named_parameters()}
    return {name: g.clone(memory_format=torch.contiguous_format) for name, g in grads.items()}


def ranks(rank: int, world: int, folder: Path) -> None:
    start(rank, world, folder)
    found = {}
    for name in NAMES:
        kind, way = name.split("/")
        task, batch = make(kind)
        task.ranks = SequenceMesh(world, rows=2, layers=way == "layers")
        total, numbers = task.nats(batch)
        total.backward()
        mean = gradients(task)
        for value in mean.values():
            dist.all_reduce(value)
            value /= world
        with torch.no_grad():
            again, _ = task.nats(batch)
        found[name] = {"loss": total.detach(), "numbers": numbers, "evaluated": again, **mean}
    torch.save(found, folder / f"rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("task")
    spawn(Path(__file__), ranks, 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_process(found: list[dict[str, Any]], name: str) -> None:
    task, batch = make(name.split("/")[0])
    total, numbers = task.nats(batch)
    total.backward()
    expected = {"loss": total.detach(), "numbers": numbers, "evaluated": total.detach(), **gradients(task)}
    # The mixture's loss is single precision.
    digits = 1e-5 if name.startswith("image") else 1e-8
    for rank, every in enumerate(found):
        assert every[name].keys() == expected.keys(), f"rank {rank}"
        for key, value in expected.items():
            torch.testing.assert_close(
                every[name][key], value, rtol=10 * digits, atol=0.1 * digits * float(value.abs().max() + 1),
                msg=lambda m, k=key, r=rank: f"rank {r}: {k}: {m}",
            )  # fmt: skip
