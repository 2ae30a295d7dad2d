"""What is frozen does not move, in weights, averages and statistics; the rest trains, resumes to the bit, and over ranks."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.models import LoraConfig
from mmlong.models.lora import adapters
from mmlong.tasks import ArchitectureMismatchError, AutoregressTask, ClassifyTask, Task
from mmlong.training.average import averaging
from mmlong.training.checkpoints import AtomicCheckpointIO
from mmlong.training.freeze import freeze, hold_statistics
from mmlong.training.optim import OptimConfig, parameter_groups

LORA = {"rank": 2, "alpha": 4.0}


def classify(mixer: Any = "mamba2", backbone: dict[str, Any] | None = None, **optim: Any) -> ClassifyTask:
    torch.manual_seed(0)
    more = {"dim": 8, "depth": 2, "mixers": [mixer], "direction": "alternate", **(backbone or {})}
    lora = optim.pop("lora", None)
    return ClassifyTask(
        {"name": "text"}, BackboneConfig(**more), {"name": "classify", "num_classes": 2},
        OptimConfig(**{"lr": 0.02, "warmup": 1, "weight_decay": 0.1, "lora": lora and LoraConfig(**lora), **optim}),
    )  # fmt: skip


def autoregress(segment: int | None = None, **optim: Any) -> AutoregressTask:
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=8, depth=2, mixers=["mamba2", {"name": "local", "window": 6}])
    lora = optim.pop("lora", None)
    return AutoregressTask(
        {"name": "text"}, backbone, samples=0, segment=segment,
        optim=OptimConfig(**{"lr": 0.02, "warmup": 1, "lora": lora and LoraConfig(**lora), **optim}),
    )  # fmt: skip


def rows(count: int = 12, length: int = 21) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    raw = torch.randint(256, (count, length), dtype=torch.uint8, generator=draw)
    return [{"raw": raw[i], "index": torch.tensor(i), "label": torch.tensor(i % 2)} for i in range(count)]


def fit(task: Task, steps: int, folder: Path, ckpt: Path | None = None, count: int = 12) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=steps, max_epochs=-1,
        enable_model_summary=False, default_root_dir=folder, plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(task, DataLoader(rows(count), batch_size=3), ckpt_path=ckpt, weights_only=True)  # type: ignore[arg-type]
    return trainer


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, t in before.items() if not torch.equal(t, after[name])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mixer", ["mamba2", "routing"])
def test_a_linear_probe_moves_the_head_alone(mixer: str, tmp_path: Path) -> None:
    """Not by decay, an average's rounding or what a mixer counts; and no graph is kept of the features."""
    task = classify(mixer, freeze=["*", "!head"], ema=0.9)
    before = state(task.model)
    trainer = fit(task, 4, tmp_path)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    averaged = torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"]
    for after in (state(task.model), {name.removeprefix("model."): t for name, t in averaged.items()}):
        changed = moved(before, after)
        assert changed
        assert all(name.startswith("head.") for name in changed), changed
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in task.model.head.parameters()}
    tokens, layout = task.model.encode(torch.stack([row["raw"] for row in rows(3)]))
    features, _ = task.model.forward_features(tokens, None, layout)
    assert features.grad_fn is None
    assert task.model.forward_head(features, layout).requires_grad


@pytest.mark.filterwarnings("ignore")
def test_adapters_move_and_the_backbone_does_not(tmp_path: Path) -> None:
    task = classify("routing", lora=LORA, freeze=["!backbone.norm"], ema=0.9)
    before = state(task.model)
    fit(task, 4, tmp_path)
    changed = moved(before, state(task.model))
    assert {"head.linear.weight", "backbone.norm.weight"} <= changed
    held = {name for name in before if name.startswith("backbone.") and not name.startswith("backbone.norm.")}
    held -= {name for name in held if name.rpartition(".")[2] in ("a", "b", "means", "sums", "counts")}
    assert len(held) > 20
    assert not changed & held
    assert any(name.endswith("0.b") for name in changed)
    assert any(name.endswith("centroids.means") for name in changed), "centroids follow adapters that move"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["*", "!*", "0", "!1.weight", "2.*", "!re:bias$"]), max_size=4))
def test_later_patterns_win(patterns: list[str]) -> None:
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)], nn.Linear(1, 1))
    patterns = [*patterns, "!3"]
    wanted = dict.fromkeys((name for name, _ in net.named_parameters()), True)
    chosen = {
        "*": lambda n: True, "0": lambda n: n[0] == "0", "1.weight": lambda n: n == "1.weight",
        "2.*": lambda n: n[0] == "2", "re:bias$": lambda n: n.endswith("bias"), "3": lambda n: n[0] == "3",
    }  # fmt: skip
    for pattern in patterns:
        for name in wanted:
            if chosen[pattern.removeprefix("!")](name):
                wanted[name] = pattern.startswith("!")
    freeze(net, patterns)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == wanted
    named = dict(net.named_parameters())
    trained = {id(p) for group in parameter_groups(net, OptimConfig()) for p in group["params"]}
    assert trained == {id(named[name]) for name, trains in wanted.items() if trains}


def test_statistics_stay_where_their_weights_are_frozen() -> None:
    class Part(nn.Module):
        def __init__(self, affine: bool) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3, affine=affine)
            self.dropout, self.still = nn.Dropout(0.5), nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    net = nn.Sequential(Part(True), Part(False), Part(True), Part(False))
    freeze(net, ["0", "1"])
    net.train()
    hold_statistics(net)
    assert [part.norm.training for part in net] == [False, False, True, True]
    assert all(part.dropout.training and part.still.training for part in net)
    before = state(net)
    net(torch.randn(5, 3)).sum()
    changed = moved(before, state(net))
    assert {name for name in changed if name.endswith("mean")} == {"2.norm.running_mean", "3.norm.running_mean"}


def test_the_task_holds_them_whenever_it_is_put_into_training(tmp_path: Path) -> None:
    task = classify("routing", freeze=["backbone"])
    centroids = [m for m in task.modules() if hasattr(m, "keeps_statistics")]
    assert centroids
    assert all(m.training for m in centroids), "nothing is frozen yet"
    task.setup("fit")
    for _ in range(2):
        assert not any(m.training for m in centroids)
        assert all(block.mixer.training for block in task.model.backbone.blocks())
        task.eval()
        task.train()


def test_an_average_leaves_alone_what_does_not_move() -> None:
    torch.manual_seed(0)
    weight, average = torch.randn(1000), torch.randn(1000)
    for decay in (0.3, 0.9, 0.999):
        step = averaging(decay)
        assert torch.equal(step(weight, weight, 3), weight)
        long_run = step(average, weight, torch.tensor(100_000))
        torch.testing.assert_close(long_run, decay * average + (1 - decay) * weight)


def test_a_short_run_is_not_averaged_with_where_it_began() -> None:
    """The weight of each step in torch's averaged model, against the product of the decays written out."""
    model = nn.Linear(1, 1, bias=False).double()
    averaged = AveragedModel(model, avg_fn=averaging(0.99))
    values = torch.randn(151, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = 0.0
    for n, value in enumerate(values.tolist()):
        nn.init.constant_(model.weight, value)
        averaged.update_parameters(model)
        decay = min(0.99, (1 + n) / (10 + n)) if n else 0.0
        want = decay * want + (1 - decay) * value
    assert float(averaged.module.weight) == pytest.approx(want, rel=1e-9)
    decays = [min(0.99, (1 + n) / (10 + n)) for n in range(1, 151)]
    assert math.prod(decays) < 1e-9, "what is left of the first"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optim", [{"freeze": ["*", "!head"]}, {"lora": LORA}], ids=["probe", "lora"])
def test_resumed_it_is_the_same_to_the_bit(optim: dict[str, Any], tmp_path: Path) -> None:
    # Other schedules know how long a run is; and a plain loader, without a state, must have the same batch at every step.
    optim = {**optim, "schedule": "constant"}
    straight = classify(**optim)
    fit(straight, 8, tmp_path, count=3)
    part = classify(**optim)
    trainer = fit(part, 4, tmp_path, count=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = classify(**optim)
    fit(resumed, 8, tmp_path, tmp_path / "half.ckpt", count=3)
    assert moved(state(part), state(resumed))
    assert not moved(state(straight), state(resumed))
    other = classify(lora={**LORA, "rank": 3})
    with pytest.raises(
        ArchitectureMismatchError, match="trained other parts.*" if "freeze" in optim else "lora.rank: 2"
    ):
        fit(other, 8, tmp_path, tmp_path / "half.ckpt")
    plain = classify()
    with pytest.raises(ArchitectureMismatchError, match="trained other parts"):
        fit(plain, 8, tmp_path, tmp_path / "half.ckpt")


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim.freeze: no parameter matches 'haed' \(did you mean 'head'\?\)"):
        fit(classify(freeze=["haed"]), 1, tmp_path)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        fit(classify(freeze=["*"]), 1, tmp_path)
    with pytest.raises(ValueError, match="freeze_backbone would freeze the adapters"):
        ClassifyTask(
            {"name": "text"}, BackboneConfig(dim=8, depth=1), {"name": "classify", "num_classes": 2},
            OptimConfig(lora=LoraConfig()), freeze_backbone=True,
        )  # fmt: skip
    net = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        parameter_groups(net, OptimConfig())


def test_layer_decay_and_muon_know_adapters() -> None:
    task = classify(lora=LORA)
    named = {id(p): name for name, p in task.model.named_parameters()}
    groups = parameter_groups(task.model, OptimConfig(lr=1.0, layer_decay=0.5, weight_decay=0.3))
    rate = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    first, second = (
        {lr for name, lr in rate.items() if name.startswith(f"backbone.stages.0.{block}.")} for block in (0, 1)
    )
    assert len(first) == len(second) == 1
    assert next(iter(first)) == next(iter(second)) / 2
    fallback = [group for group in parameter_groups(task.model, OptimConfig(name="muon")) if group.get("use_fallback")]
    assert {id(p) for *_, one in adapters(task.model) for p in (one.a, one.b)} <= {
        id(p) for group in fallback for p in group["params"]
    }, "a step that makes matrices orthogonal is not for halves of a product"


def gradients(task: AutoregressTask, whole: bool = False) -> dict[str, Tensor]:
    batch = {key: torch.stack([row[key] for row in rows(2)]) for key in ("raw", "index")}
    torch.manual_seed(7)
    if whole:  # the segments one after another, in one graph, without a recomputation
        tokens, _ = task.encode(batch)
        total, carried = torch.zeros(()), None
        for i in range(0, tokens.shape[1], 8):
            loss, carried = task._step([tokens[:, i : i + 8]], carried, None)
            total = total + loss
    else:
        total, _ = task.nats(batch)
    total.backward()
    return {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_in_segments_adapters_get_the_gradient_of_the_whole(dropout: float) -> None:
    """With dropout of theirs: what the forward dropped is dropped in the recomputation."""
    pair = []
    for whole in (False, True):
        task = autoregress(8, lora={**LORA, "dropout": dropout}).double()
        task.hold()
        with torch.no_grad():
            for *_, one in adapters(task.model):
                one.b.copy_(torch.linspace(-0.3, 0.3, one.b.numel(), dtype=torch.float64).view_as(one.b))
        pair.append(gradients(task, whole))
    segmented, together = pair
    assert segmented.keys() == together.keys()
    assert any(".0.a" in name for name in together)
    for name, gradient in together.items():
        torch.testing.assert_close(segmented[name], gradient, rtol=1e-9, atol=1e-9)


RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[3])
from test_freeze import Loss, probe, rows
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
batch = {key: torch.stack([row[key] for row in rows(4)[2 * rank : 2 * rank + 2]]) for key in ("raw", "index")}
ddp = torch.nn.parallel.DistributedDataParallel(Loss(probe()))
ddp(batch).backward()
found = [p.grad for p in ddp.module.parameters()]
sharded = Loss(probe())
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
sharded(batch).backward()
gathered = [None if p.grad is None else p.grad.full_tensor() for p in sharded.parameters()]
if rank == 0:
    torch.save((found, gathered), f"{folder}/out.pt")
dist.barrier()  # a rank that leaves while the other still sends can abort in gloo
dist.destroy_process_group()
"""


def probe() -> AutoregressTask:
    task = autoregress(lora=LORA, freeze=["modality", "!backbone.norm"])
    task.hold()
    with torch.no_grad():
        for *_, one in adapters(task.model):
            one.b.fill_(0.1)
    return task


class Loss(nn.Module):
    """What DDP and FSDP wrap."""

    def __init__(self, task: AutoregressTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        total, numbers = self.task.nats(batch)
        return total / numbers


@pytest.mark.slow
def test_over_two_ranks(tmp_path: Path) -> None:
    """DDP and FSDP2, with frozen parameters, adapters and trained ones side by side: one process's gradient of all rows."""
    here = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), folder, here]) for rank in range(2)]
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
        both = torch.load(f"{folder}/out.pt", weights_only=True)
    whole = Loss(probe())
    whole({key: torch.stack([row[key] for row in rows(4)]) for key in ("raw", "index")}).backward()
    for found in both:
        for (name, p), gradient in zip(whole.named_parameters(), found, strict=True):
            assert (p.grad is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
