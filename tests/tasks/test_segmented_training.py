"""Whatever a trainer does to a loss, it does to a segmented one: the same weights come out as without segments."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.tasks import AutoregressTask
from mmlong.training.optim import OptimConfig

MIXERS = ["mamba2", {"name": "local", "window": 6}]


def task(segment: int | None, **options: Any) -> AutoregressTask:
    torch.manual_seed(0)
    ema = options.pop("ema", 0.0)
    backbone = BackboneConfig(**{"dim": 8, "depth": 2, "mixers": MIXERS, **options})
    optim = OptimConfig(lr=0.01, warmup=1, ema=ema)
    return AutoregressTask({"name": "text"}, backbone, optim=optim, segment=segment, samples=0)


def rows(count: int, length: int = 31) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    raw = torch.randint(256, (count, length), dtype=torch.uint8, generator=draw)
    return [{"raw": raw[i], "index": torch.tensor(i), "weight": torch.tensor(1.0)} for i in range(count)]


def fit(folder: Path, segment: int | None, checkpoint: bool = False, ema: float = 0.0, **options: Any) -> Any:
    module = task(segment, checkpoint=checkpoint, ema=ema)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder,
        enable_model_summary=False, max_steps=3, **{"precision": "64-true", **options},
    )  # fmt: skip
    data: Any = DataLoader(rows(12), batch_size=2)
    trainer.fit(module, data)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"ema": 0.5},
        {"checkpoint": True},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_the_same_weights_come_out(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, cut = (fit(tmp_path, segment, **options).state_dict() for segment in (None, 9))
    start = task(None).state_dict()
    # Adam's first steps follow signs, so in half the digits few elements may differ by a step; on the whole they must not.
    limit = 0.15 if options.get("precision") == "bf16-mixed" else 1e-6
    moved = sum(float((whole[name].double() - start[name].double()).norm() ** 2) for name in start) ** 0.5
    apart = sum(float((whole[name].double() - cut[name].double()).norm() ** 2) for name in start) ** 0.5
    assert moved > 0.1
    assert apart < limit * moved


def gradients(module: AutoregressTask, batch: dict[str, torch.Tensor], inside: bool) -> list[torch.Tensor]:
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = module.nats(batch)
        if inside:
            total.backward()
    if not inside:
        total.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_under_autocast(inside: bool) -> None:
    """Also where the backward is called within autocast, whose cache may hold weights cast while no graph was recorded."""
    batch = {key: torch.stack([row[key] for row in rows(2)]) for key in ("raw", "index")}
    whole, cut = (gradients(task(segment), batch, inside) for segment in (None, 9))
    for p, a, b in zip(task(None).parameters(), whole, cut, strict=True):
        assert float((a - b).norm()) <= 0.05 * float(a.norm()) + 1e-3, p.shape
        assert bool(b.any()) == bool(a.any())


@pytest.mark.slow
def test_compiled_blocks() -> None:
    """With dropout: a compiled block draws the same in the forward without a graph and in the recomputation with one."""

    def run(compiled: bool) -> list[torch.Tensor]:
        module = task(9, dropout=0.3, depth=1, mixers=["local"])
        if compiled:
            torch._dynamo.reset()
            for block in module.model.backbone.blocks():
                block.compile(backend="aot_eager")
        batch = {key: torch.stack([row[key] for row in rows(2, 27)]) for key in ("raw", "index")}
        torch.manual_seed(1)
        module.nats(batch)[0].backward()
        return [p.grad for p in module.parameters()]

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[3])
from test_segmented_training import Loss, rows, task
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
batch = {key: torch.stack([row[key] for row in rows(4)[2 * rank : 2 * rank + 2]]) for key in ("raw", "index")}
ddp = torch.nn.parallel.DistributedDataParallel(Loss(task(9)))
ddp(batch).backward()
found = [p.grad for p in ddp.module.parameters()]
sharded = Loss(task(9))
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
sharded(batch).backward()
gathered = [p.grad.full_tensor() for p in sharded.parameters()]
if rank == 0:
    torch.save((found, gathered), f"{folder}/out.pt")
dist.barrier()  # a rank that leaves while the other still sends can abort in gloo
dist.destroy_process_group()
"""


class Loss(torch.nn.Module):
    """What DDP and FSDP wrap."""

    def __init__(self, task: AutoregressTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total, numbers = self.task.nats(batch)
        return total / numbers


@pytest.mark.slow
def test_two_ranks_are_one_batch(tmp_path: Path) -> None:
    """DDP, and FSDP2 where it has sharded the task as a whole: the gradient of both ranks' rows in one process, without segments."""
    here = str(Path(__file__).parent)
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path), here]) for rank in range(2)]
    assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
    whole = Loss(task(None))
    whole({key: torch.stack([row[key] for row in rows(4)]) for key in ("raw", "index")}).backward()
    for found in torch.load(tmp_path / "out.pt", weights_only=True):
        for p, got in zip(whole.parameters(), found, strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"reversible": True}])
def test_sharded_blocks_are_refused(options: dict[str, Any]) -> None:
    """FSDP2 on parts of the model: the gradients of what is recomputed in the backward would be lost, so it is not begun."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            module = task(None if options else 9, **options)
            for block in module.model.backbone.blocks():
                fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
            batch = {key: torch.stack([row[key] for row in rows(2)]) for key in ("raw", "index")}
            with pytest.raises(ValueError, match=r"FSDP has sharded.*would never reach the shards"):
                module.nats(batch)
        finally:
            dist.destroy_process_group()
